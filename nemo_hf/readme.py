# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Update a README: a section of ours between two marks, metadata merged, all else as a person wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .errors import CheckpointError


BEGIN = "<!-- nemo_hf: begin. Saving or pushing again rewrites what stands between the two marks, nothing else. -->"
END = "<!-- nemo_hf: end -->"
_RESULTS = re.compile(r"<!-- nemo_hf results: (\[.*?\]) -->")  # which results are ours: the next card has its own
_SECTION = re.compile(r"<!-- nemo_hf: begin.*?<!-- nemo_hf: end -->", re.DOTALL)


def parse_card(text: str, where: str) -> ModelCard:
    """
    The card in the text of a README.

    Args:
        text (`str`): the whole file.
        where (`str`): the file's name, for errors.

    Returns:
        `ModelCard`: with empty metadata where the file has none.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the metadata cannot be read.
    """
    try:
        return ModelCard(text if REGEX_YAML_BLOCK.search(text) else f"---\n\n---\n{text}")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"The metadata of {where} cannot be read: {problem}. Nothing was written. Correct the lines between the "
            "two '---' at its top, or move the file away."
        ) from error


def read_text(path: Path, where: str | None = None) -> str | None:
    """
    The text of a README; `None` if there is none. Line ends stay as they are.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if it is not UTF-8.
    """
    if not path.exists():
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where or path} is not UTF-8 text ({error}). Nothing was written. Save it as UTF-8, or move it away."
        ) from error


def as_list(value: str | list[str] | None) -> list[str]:
    """Metadata that may be one value or several."""
    return [value] if isinstance(value, str) else list(value or [])


def has_section(text: str) -> bool:
    """Whether nemo_hf wrote a part of this README."""
    return _SECTION.search(text) is not None


def update_card(existing: str | None, section: str, data: ModelCardData, where: str) -> str:
    """
    A README with a renewed section and merged metadata.

    Lists (tags, datasets) are united, `base_model` is renewed, and new results replace those that nemo_hf wrote before
    and any of the same metric on the same data; any other value that is there already stays.

    Args:
        existing (`str`, *optional*): the README so far.
        section (`str`): Markdown; it replaces the marked section, or is appended where there is none.
        data (`ModelCardData`): metadata.
        where (`str`): the file's name, for errors.

    Returns:
        `str`: the whole README.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the metadata of the existing README cannot be read.
    """
    marked = f"{BEGIN}\n\n{section.strip()}\n\n{_result_names(data)}{END}"
    if existing is None or not existing.strip():
        return f"---\n{data.to_yaml()}\n---\n\n{marked}\n"
    card = parse_card(existing, where)
    head = REGEX_YAML_BLOCK.search(existing)
    before = card.data.to_dict()
    _merge(card.data, data, _written_results(card.text))
    line_break = "\r\n" if "\r\n" in existing else "\n"
    marked = marked.replace("\n", line_break)
    if has_section(card.text):
        card.text = _SECTION.sub(lambda _match: marked, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}{line_break * 2}{marked}{line_break}"
    if head and card.data.to_dict() == before:  # as it stands, comments included
        return existing[: head.end()] + card.text
    return str(card) if head else f"---\n{card.data.to_yaml()}\n---\n{card.text}"


def _merge(data: ModelCardData, new: ModelCardData, written: list[list[str]]) -> None:
    """Put new metadata into that of an existing card; `written` are the results that it got from us before."""
    for key, value in new.__dict__.items():
        old = data.get(key)
        if key == "eval_results":
            if merged := _merged_results(old or [], value or [], written):
                data.eval_results = merged
            elif old:
                data.eval_results = data.model_name = None
        elif key in ("tags", "datasets") and value:
            data[key] = list(dict.fromkeys([*as_list(old), *value]))
        elif value is not None and (key == "base_model" or not old):
            data[key] = value


def _merged_results(old: list[EvalResult], new: list[EvalResult], written: list[list[str]]) -> list[EvalResult]:
    replaced = [*written, *map(_identity, new)]
    return [*(result for result in old if _identity(result) not in replaced), *new]


def _identity(result: EvalResult) -> list[str]:
    return [result.task_type, result.dataset_type, result.metric_name or result.metric_type]


def _result_names(data: ModelCardData) -> str:
    """A comment that names our results: neither of the marks of a comment can occur in it."""
    names = json.dumps([_identity(result) for result in data.eval_results or []])
    names = names.replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- nemo_hf results: {names} -->\n\n" if data.eval_results else ""


def _written_results(text: str) -> list[list[str]]:
    """The results of the comment in the section that is there."""
    section = _SECTION.search(text)
    names = section and _RESULTS.search(section[0])
    try:
        return json.loads(names[1]) if names else []
    except ValueError:  # edited by hand: then the results are taken for those of a person
        return []


def table(rows: list[tuple[str, str]]) -> str:
    """A table of names and values in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows)])


def cell(text: str) -> str:
    """Text as a cell of a table: on one line, and neither a column nor a tag of HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def shorten(labels: Sequence[Any]) -> str:
    """The first of many labels, as text that is no HTML."""
    text = ", ".join(map(str, labels[:8])) + (", …" if len(labels) > 8 else "")
    return " ".join(text.split()).replace("<", "&lt;")


def quoted(text: str) -> str:
    """A string literal of Python."""
    return json.dumps(text, ensure_ascii=False)
