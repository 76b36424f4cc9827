# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Many modules in one repository: the index that says which folder holds which module, and the folders' names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import find_file


INDEX_FILE = "nemo_modules.json"
INDEX_KIND = "module_collection"
FORMAT_VERSION = 1
_LONGEST_NAME = 64
_SAFE_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
# Names of devices on Windows: a folder cannot have them there.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{i}" for device in ("com", "lpt") for i in range(10))}


@dataclass(frozen=True)
class ModuleEntry:
    """
    What the index of a collection says of one module.

    Args:
        folder (`str`): the `subfolder` that `from_pretrained` takes.
        labels (`list[str | int]`): the module's labels, as the parent calls them.
        neuron_retention (`float`): share of the maskable neurons that it keeps.
        parameter_retention (`float`): share of the parent's parameters that it has.
        parameters (`int`): number of its parameters.
        bytes (`int`): size of its weights on disk.
        layout (`str`, *optional*, defaults to `"ragged"`): `"ragged"` or `"stock"`.
        parent (`str`, *optional*): the parent's repository on the Hub.
        groups (`list[str | int]`, *optional*): the groups of samples that it serves, if it was cut for groups.
        accuracy (`float`, *optional*): as measured by who pushed it.
    """

    folder: str
    labels: list[str | int]
    neuron_retention: float
    parameter_retention: float
    parameters: int
    bytes: int
    layout: str = "ragged"
    parent: str | None = None
    groups: list[str | int] | None = None
    accuracy: float | None = None


def list_modules(source: str | os.PathLike, **hub_kwargs: Any) -> dict[str, ModuleEntry]:
    """
    The modules of a collection; only the index is downloaded.

    Args:
        source (`str` or `os.PathLike`): a repository on the Hub, or a folder.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as everywhere in transformers.

    Returns:
        `dict`: name → [`ModuleEntry`], in the order in which they were pushed.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if there is no index, or it is damaged, names a path outside its folder,
            or is of a newer format.

    Example:

    ```python
    >>> from nemo_hf import list_modules
    >>> {name: entry.folder for name, entry in list_modules("someone/animals").items()}
    {'cat': 'cat', 'golden retriever': 'golden-retriever-5f0ea1e6'}
    ```
    """
    path = find_file(source, INDEX_FILE, **hub_kwargs)
    if path is None:
        raise CheckpointError(
            f"There is no {INDEX_FILE} in {source}: it is no collection of modules. `push_modules` writes one."
        )
    return read_entries(read_index(Path(path).read_bytes(), f"{INDEX_FILE} of {source}"))


def read_index(content: bytes, where: str) -> dict[str, dict[str, Any]]:
    """
    The checked entries of an index, with whatever else a newer nemo_hf wrote into them.

    Args:
        content (`bytes`): of the file.
        where (`str`): its name, for errors.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: see [`list_modules`].
    """
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is not JSON ({error}).") from error
    if not isinstance(index, dict) or index.get("kind") != INDEX_KIND or not isinstance(index.get("modules"), dict):
        raise CheckpointError(f"{where} is damaged: it must have kind {INDEX_KIND!r} and a table `modules`.")
    version = index.get("format")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format {version!r}; this version of nemo_hf reads formats up to {FORMAT_VERSION}. Upgrade "
            "nemo_hf."
        )
    folders = set()
    for name, entry in index["modules"].items():
        problem = _problem(entry)
        if problem is None and entry["folder"].casefold() in folders:
            problem = f"the folder {entry['folder']!r} is taken by another module"
        if problem is not None:
            raise CheckpointError(f"{where} is damaged: module {name!r:.80}: {problem}.")
        folders.add(entry["folder"].casefold())
    return index["modules"]


def read_entries(modules: dict[str, dict[str, Any]]) -> dict[str, ModuleEntry]:
    """The entries of a checked index, without what only a newer nemo_hf knows."""
    known = {field.name for field in fields(ModuleEntry)}
    return {
        name: ModuleEntry(**{key: value for key, value in entry.items() if key in known})
        for name, entry in modules.items()
    }


def write_index(path: Path, modules: dict[str, dict[str, Any]]) -> None:
    """Write the index of a collection."""
    index = {"kind": INDEX_KIND, "format": FORMAT_VERSION, "modules": modules}
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def entry_dict(entry: ModuleEntry) -> dict[str, Any]:
    """The entry as the index holds it: what is not known is left out."""
    return {key: value for key, value in asdict(entry).items() if value is not None}


def choose_folders(names: Iterable[str], taken: dict[str, str]) -> dict[str, str]:
    """
    Safe and unique folder names, the same ones whatever the order of the modules.

    Args:
        names (`Iterable[str]`): of modules: any text.
        taken (`dict[str, str]`): name → folder of the modules that are there already; they keep their folders.

    Returns:
        `dict[str, str]`: name → folder. A name of ASCII letters, digits, `_` and `-` is its own folder. Any other is
        spelled in these and has a part of its hash appended, as has one that differs by case only from another one.
    """
    chosen = {}
    used = {folder.casefold() for folder in taken.values()}
    for name in sorted(names, key=lambda name: (name != name.lower(), name)):
        if name in taken:
            chosen[name] = taken[name]
            continue
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        spelled = _spelled(name)
        candidates = [name] if name and spelled == name else []
        candidates += [f"{spelled or 'module'}-{digest[:length]}" for length in (8, 64)]
        chosen[name] = next(folder for folder in candidates if folder.casefold() not in used)
        used.add(chosen[name].casefold())
    return chosen


def _spelled(name: str) -> str:
    """The name in ASCII letters, digits, `_` and `-`, without what cannot be spelled so."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    spelled = re.sub(r"[^A-Za-z0-9_-]+", "-", plain)[:_LONGEST_NAME].strip("-")
    return "" if spelled.casefold() in _RESERVED else spelled


def _problem(entry: Any) -> str | None:
    """What is wrong with an entry of the index."""
    if not isinstance(entry, dict):
        return f"it must be a table, got {entry!r:.80}"
    folder = entry.get("folder")
    if not isinstance(folder, str) or not _SAFE_FOLDER.fullmatch(folder):
        return f"folder must be the name of a folder beside the index, got {folder!r:.80}"
    for key in ("neuron_retention", "parameter_retention", "accuracy"):
        value = entry.get(key, 0 if key == "accuracy" else None)
        if not (_is_number(value, (int, float)) and 0 <= value <= 1):
            return f"{key} must be a number from 0 to 1, got {value!r:.80}"
    for key in ("parameters", "bytes"):
        if not _is_number(entry.get(key), int) or entry[key] < 0:
            return f"{key} must be an integer from 0 up, got {entry.get(key)!r:.80}"
    for key in ("labels", "groups"):
        value = entry.get(key, None if key == "labels" else [])
        if not isinstance(value, list) or not all(isinstance(label, str) or _is_number(label, int) for label in value):
            return f"{key} must be a list of names or numbers, got {value!r:.80}"
    for key in ("parent", "layout"):
        if not isinstance(entry.get(key, ""), str):
            return f"{key} must be a name, got {entry[key]!r:.80}"
    return None


def _is_number(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
