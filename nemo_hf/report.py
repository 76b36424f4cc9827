# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`write_report`]: a table, plots and a page about the modules that a modular checkpoint holds."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .auto import AutoModularModel
from .errors import CheckpointError, NemoValueError
from .files import atomic_path, find_file, finite
from .module_masks import Label
from .report_data import describe, measure, page_data, training_panels
from .report_plots import check_matplotlib, write_plots
from .statistics import NeuronStatistics


SCRIPTS = ("report.js", "report_charts.js", "report_heatmap.js")  # of the page, in this order
TRAINER_STATE = "trainer_state.json"


def write_report(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    dataloader: Iterable[Mapping[str, torch.Tensor]] | None = None,
    threshold: float = 0.9,
    groups: Mapping[int, Label] | None = None,
    max_pair_labels: int = 20,
    model: PreTrainedModel | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """
    Write what a modular checkpoint holds: `report.html`, one page that needs nothing else, `report.md`, `report.json`
    and the plots as PNG. Accuracies are in it if there are data to measure them on, training curves if there is a
    `trainer_state.json`. Needs matplotlib (`pip install nemo_hf[report]`).

    Args:
        checkpoint (`str` or `os.PathLike`): a modular checkpoint with its statistics: a folder or a repository.
        output (`str` or `os.PathLike`): the folder to write to.
        dataloader (`Iterable`, *optional*): batches of held-out samples with one integer label each.
        threshold (`float`, *optional*, defaults to 0.9): share of a label's samples that open a neuron, see
            [`NeuronStatistics.module_masks`].
        groups (`Mapping[int, str | int]`, *optional*): for statistics by group, with a `dataloader`: integer in the
            batch → name of the group, as `names` of [`collect_statistics`].
        max_pair_labels (`int`, *optional*, defaults to 20): with more labels the modules of pairs are left out.
        model (`PreTrainedModel`, *optional*): the model of the checkpoint, if it is loaded already.
        hub_kwargs: `revision`, `token`, `subfolder`, … as everywhere in transformers.

    Returns:
        `dict`: what `report.json` holds.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the checkpoint is not a modular one, or a file of it is missing or
            damaged.
        [`~nemo_hf.errors.NemoError`]: if matplotlib is missing, or the data do not fit the masks.

    Example:

    ```python
    >>> figures = write_report("modular-vit", "report", dataloader=test_loader)
    >>> smallest = min(figures["modules"], key=lambda module: module["parameters"])
    ```
    """
    check_matplotlib()
    model = AutoModularModel.from_pretrained(checkpoint, **hub_kwargs) if model is None else model
    statistics = NeuronStatistics.from_pretrained(checkpoint, **hub_kwargs)
    log_history = read_log_history(checkpoint, **hub_kwargs)
    masks = statistics.module_masks(threshold)
    if dataloader is not None and (masks.grouped_by is None) != (groups is None):
        raise NemoValueError(
            f"The statistics are by {_owner_text(masks.grouped_by)}, so groups= must "
            f"{'be left out' if masks.grouped_by is None else 'name the groups in the data'}."
        )
    figures = {"checkpoint": str(checkpoint), **describe(model.eval(), statistics, masks, max_pair_labels)}
    if dataloader is not None:
        figures["evaluation"] = measure(model, masks, figures["modules"], dataloader, groups)
    figures = finite(figures)
    panels = training_panels(log_history)
    output = Path(output)
    plots = write_plots(figures, panels, output)
    _write(output / "report.json", json.dumps({**figures, "log_history": finite(log_history)}, indent=1) + "\n")
    _write(output / "report.md", markdown(figures, plots))
    _write(output / "report.html", page({**figures, **page_data(model, masks), "panels": panels}))
    return {**figures, "log_history": finite(log_history)}


def read_log_history(checkpoint: str | os.PathLike, **hub_kwargs: Any) -> list[dict[str, Any]]:
    """
    What the trainer logged, from `trainer_state.json` of a checkpoint, or else of the last one inside its folder.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the file is damaged.
    """
    path = find_file(checkpoint, TRAINER_STATE, optional=True, **hub_kwargs)
    if path is None:
        states = sorted(Path(checkpoint).glob(f"checkpoint-*/{TRAINER_STATE}"), key=os.path.getmtime)
        if not states:
            return []
        path = states[-1]
    try:
        history = json.loads(Path(path).read_text())["log_history"]
        if not all(isinstance(logs, dict) for logs in history):
            raise ValueError("log_history must be a list of dictionaries")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}). Remove it for a report without training curves."
        ) from error
    return history


def page(data: Mapping[str, Any]) -> str:
    """The page: style, script and data inside one file."""
    text = json.dumps(data, separators=(",", ":"))  # no character outside ASCII
    # Nothing in the data may end the script element that holds it.
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    parts = {
        "style": _resource("report.css"),
        "script": "".join(map(_resource, SCRIPTS)),
        "data": text,
    }
    parts["title"] = html.escape(f"Modules of {data['checkpoint']}")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _resource("report.html"))


def markdown(figures: Mapping[str, Any], plots: Iterable[str]) -> str:
    """The table of modules and the plots as Markdown."""
    grouped_by, evaluation = figures["grouped_by"], figures.get("evaluation")
    owner = "labels" if grouped_by is None else "groups"
    header = [owner, "neurons kept", "parameters kept", *(["accuracy"] if evaluation else [])]
    lines = [f"| {' | '.join(header)} |", f"|---{'|---:' * (len(header) - 1)}|"]
    for module in figures["modules"]:
        is_all = len(module[owner]) == len(figures[owner]) > 2
        names = f"all {len(figures[owner])} {owner}" if is_all else ", ".join(map(_escaped, module[owner]))
        cells = [names, f"{module['neuron_retention']:.1%}"]
        cells.append(f"{module['parameter_retention']:.1%} ({module['parameters']:,})")
        if evaluation:
            accuracy = module.get("accuracy")
            cells.append("–" if accuracy is None else f"{accuracy:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    measured = (
        f"Accuracies are of each module's own samples among {evaluation['num_samples']:,}; the model before cutting "
        f"reaches {evaluation['modular_accuracy']:.1%} on all. A module of one label has nothing to choose between."
        if evaluation
        else "No accuracies were measured: no dataset was given."
    )
    pictures = "\n".join(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in plots)
    return f"""# Modules of {_escaped(figures["checkpoint"])}

{figures["model"]} with {figures["parameters"]:,} parameters, without mask generators; {figures["neurons"]:,} maskable
neurons; masks by {_escaped(_owner_text(grouped_by))}, threshold {figures["threshold"]:g}. {measured}

{chr(10).join(lines)}

{pictures}"""


def _owner_text(grouped_by: str | None) -> str:
    return "label" if grouped_by is None else f"group ({grouped_by!r})"


def _escaped(name: Label) -> str:
    """Any text as text of one cell: no markup of Markdown or HTML."""
    text = html.escape(" ".join(str(name).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~!#$])", r"\\\1", text)


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
