# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors with a JSON description in one safetensors file: written whole or not at all, checked when read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from .errors import CheckpointError, NemoError


FORMAT_VERSION = 1


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary name beside `path`, renamed to `path` once the block has ended without an error.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the file cannot be written; what was there before stays.
    """
    path = Path(path)
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        try:
            yield Path(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def clear_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """
    Around code that leaves a file or folder as it was if it fails: say so where the disk is full or read-only.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: for what the operating system refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # Errors of the Hub are OSErrors too, but without a number of the operating system.
        if isinstance(error, NemoError) or isinstance(error, OSError) and error.errno is None:
            raise
        raise write_error(path, error, "What was there before is unchanged.") from error


def write_error(path: str | os.PathLike, error: Exception, state: str) -> CheckpointError:
    """The error for a file or folder that could not be written; `state` says what there is now."""
    folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
    return CheckpointError(
        f"{path} could not be written: {error}. {state} {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in "
        f"{folder}; free some, or choose a folder that you may write to."
    )


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a JSON-ready description of them to one safetensors file."""
    header = {"format": "pt", "nemo": json.dumps({"format": FORMAT_VERSION, **description})}
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata=header)


def find_file(
    source: str | os.PathLike, name: str, optional: bool = False, subfolder: str = "", **hub_kwargs: Any
) -> str | None:
    """
    A file of a checkpoint, downloaded if it must be.

    Args:
        source (`str` or `os.PathLike`): a folder, or a repository on the Hub.
        name (`str`): the file in it.
        optional (`bool`, *optional*, defaults to `False`): a file that is not in the cache counts as missing where
            the Hub cannot be asked but the checkpoint itself is in the cache.
        subfolder (`str`, *optional*): of the checkpoint in it.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as everywhere in transformers.

    Returns:
        `str`, *optional*: its path; `None` if there is none.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if there is no such repository, or it cannot be reached.
    """
    if os.path.isdir(source):
        path = os.path.join(source, subfolder, name)
        return path if os.path.isfile(path) else None
    options = {"subfolder": subfolder, "_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    try:
        path = cached_file(str(source), name, **options)
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} of {source} cannot be read: {error}") from error
    if path is not None:
        return path

    def cached(file: str) -> Any:
        place = {key: hub_kwargs[key] for key in ("cache_dir", "revision") if key in hub_kwargs}
        return try_to_load_from_cache(str(source), "/".join(filter(None, (subfolder, file))), **place)

    # transformers returns `None` for a file that the repository does not have, which is then noted in the cache, and
    # where it cannot ask.
    if cached(name) is _CACHED_NO_EXIST or (optional and isinstance(cached("config.json"), str)):
        return None
    raise CheckpointError(f"{name} of {source} cannot be read: it is not in the cache, and the Hub cannot be reached.")


def read_tensors(
    source: str | os.PathLike, file_name: str, **hub_kwargs: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read what [`write_tensors`] wrote.

    Args:
        source (`str` or `os.PathLike`): a folder, or a repository on the Hub.
        file_name (`str`): the file in it.
        hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, as everywhere in transformers.

    Returns:
        The tensors by name, and the description.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the file is missing, damaged, or of a newer format.
    """
    path = find_file(source, file_name, **hub_kwargs)
    if path is None:
        raise CheckpointError(
            f"There is no {file_name} in {source}. It is written by `save_pretrained(folder)` of what "
            "`trainer.collect_statistics(dataset)` returns, or of the `ModuleMasks` made from that."
        )
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["nemo"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or was not written by nemo_hf ({error}).") from error
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise CheckpointError(f"{path} is damaged or was not written by nemo_hf (no description).")
    if description["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {description['format']}, newer than this nemo_hf reads. Upgrade nemo_hf."
        )
    return tensors, description


def finite(value: Any) -> Any:
    """The same structure with `None` where a number is not finite, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
