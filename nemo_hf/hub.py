# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Save modules with everything that a user of the checkpoint needs, and push them to the Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCardData
from transformers import PreTrainedModel

from .auto import load_config, model_class, saved_processor
from .collection import INDEX_FILE, ModuleEntry, choose_folders, entry_dict, read_entries, read_index, write_index
from .config import MODULE_KIND, checkpoint_kind
from .errors import CheckpointError, NemoValueError
from .files import clear_write_errors
from .metrics import count_parameters
from .model_card import (
    accuracy_of,
    collection_card,
    module_card,
    parent_on_hub,
    pipeline_task,
    plain_metrics,
    shown_source,
)
from .readme import as_list, has_section, parse_card, read_text, update_card
from .remote import Remote
from .replacing import check_folder, check_replaceable, staged
from .slim import clear_loading_errors


Module = PreTrainedModel | str | os.PathLike  # the model, or the folder with it


def save_module(
    module: PreTrainedModel,
    save_directory: str | os.PathLike,
    processing_class: Any = None,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Save a module with its processor and card, ready for `pipeline(task, model=save_directory)`.

    Everything is written to a temporary folder inside first, then moved into place file by file: a failure while
    writing leaves what was there before. A module that is there is replaced, no other checkpoint. A card that is there
    is updated: what a person wrote stays.

    Args:
        module (`PreTrainedModel`): made by [`~nemo_hf.extract_module`].
        save_directory (`str` or `os.PathLike`): the folder; made if it is missing.
        processing_class (*optional*): tokenizer or image processor of the parent.
        metrics (`Mapping`, *optional*): measured results, name → value, for the card and for `config.nemo["metrics"]`
            of the saved files. `flops`, `latency`, `accuracy`, … are set against `parent_flops`, … where given.
        base_model (`str`, *optional*): the parent on the Hub, for the card, if it was not loaded from there.
        dataset (`str`, *optional*): the data set on the Hub that the results are of, for the card.
        kwargs: passed to `module.save_pretrained`.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model is not a module, or the folder holds another checkpoint.
        [`~nemo_hf.errors.CheckpointError`]: if the metadata of the card that is there cannot be read, or the folder
            cannot be written.

    Example:

    ```python
    >>> save_module(module, "cat-dog", processing_class=image_processor, metrics={"accuracy": 0.97})
    ```
    """
    card = {"source": shown_source(save_directory), "base_model": base_model, "dataset": dataset}
    if kwargs.get("push_to_hub"):
        raise NemoValueError("save_module writes to a folder only. Push with `push_modules(repo_id, module)`.")
    where = os.path.join(save_directory, "README.md")
    with clear_write_errors(save_directory):
        check_folder(save_directory)
        _save(module, Path(save_directory), processing_class, _checked_metrics(metrics), card, where, **kwargs)


def push_modules(
    repo_id: str,
    modules: Module | Mapping[str, Module] | Sequence[Module],
    *,
    processing_class: Any = None,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Push modules with processor and cards to one repository, in one commit: an interrupted push leaves the repository
    as it was.

    Each module gets a folder of its own, so that `from_pretrained(repo_id, subfolder="cat")` downloads it alone; an
    index (see [`~nemo_hf.list_modules`]) and the card of the collection lie in the root. Modules of the same name are
    replaced, others stay. Cards that are there are updated: what a person wrote stays.

    Args:
        repo_id (`str`): the repository; made if it is missing.
        modules (`Mapping` or `Sequence` of `PreTrainedModel` or `str`): name → module, or the folder that
            [`save_module`] wrote; its processor, results and card are taken along. In a sequence, modules are named
            by their labels (or groups), folders by their own names. A single module goes to the root of the
            repository, where it may replace a module only.
        processing_class (*optional*): tokenizer or image processor of the parent.
        metrics (`Mapping`, *optional*): name → results of this module as in [`save_module`]. For a single module:
            its results.
        base_model (`str`, *optional*): the parent on the Hub, for the cards, if it was not loaded from there.
        dataset (`str`, *optional*): the data set on the Hub that the results are of, for the cards.
        private (`bool`, *optional*): whether a new repository is private. Defaults to the setting of its owner.
        token (`str` or `bool`, *optional*): access token. Defaults to the one that `hf auth login` stored.
        revision (`str`, *optional*): branch to push to; made if it is missing.
        commit_message (`str`, *optional*): first line of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of changing the branch.

    Returns:
        `CommitInfo`: of the commit, with `pr_url` if a pull request was opened.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for anything that is not a module, two modules of one name, or if something
            else than a module would be replaced.
        [`~nemo_hf.errors.CheckpointError`]: if the index or a card in the repository is damaged, someone else pushed
            at the same time, the connection broke, or the disk is full.

    Example:

    ```python
    >>> animals = {name: extract_module(model, masks, [name]) for name in ("cat", "dog")}
    >>> push_modules("someone/animals", animals, processing_class=processor, metrics={"cat": {"accuracy": 0.97}})
    >>> AutoModelForImageClassification.from_pretrained("someone/animals", subfolder="cat")
    ```
    """
    is_single = isinstance(modules, PreTrainedModel | str | os.PathLike)
    named = {"": modules} if is_single else _named(modules)
    results = (
        {"": metrics} if is_single and metrics else {str(name): values for name, values in (metrics or {}).items()}
    )
    if unknown := sorted(set(results) - set(named)):
        raise NemoValueError(f"metrics has {unknown[0]!r}, but the modules are {', '.join(map(repr, named))}.")
    common = {"processing_class": processing_class, "base_model": base_model, "dataset": dataset}
    items = {name: _item(name, module, metrics=results.get(name), **common) for name, module in named.items()}
    remote = Remote.open(repo_id, private, token, revision, create_pr)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "repository"
        with clear_write_errors(root):
            root.mkdir()
            if is_single:
                remedy = "Choose another repository, or a folder in it: push_modules(repo_id, {name: module})."
                check_replaceable(remote.repo_id, remote.read, remedy)
                folders = [_place(remote, root, "", items[""])]
            else:
                folders = _place_collection(remote, root, items, dataset)
        stale = {path for folder in folders for path in _stale(remote, root, folder)}
        message = commit_message or f"Upload {len(named)} module{'s' if len(named) > 1 else ''} with nemo_hf"
        return remote.push(root, stale, message, create_pr)


def _named(modules: Mapping[str, Module] | Sequence[Module]) -> dict[str, Module]:
    """The modules or folders by name."""
    if isinstance(modules, Mapping):
        named = {str(name): module for name, module in modules.items()}
    else:
        named = {_own_name(module): module for module in modules}
    if not named or len(named) != len(modules):
        raise NemoValueError(
            "modules must be a non-empty mapping from names to modules, or a list of modules with different names; "
            f"got {len(modules)} module(s) with the names {', '.join(map(repr, named)) or '-'}."
        )
    return named


def _own_name(module: Module) -> str:
    """The name of a module that was given without one."""
    if isinstance(module, str | os.PathLike):
        return Path(module).resolve().name
    _check_module(module)
    return ", ".join(map(str, module.config.nemo.get("groups", module.config.id2label.values())))


@dataclass
class _Item:
    """A module to push, with what lies beside it."""

    module: PreTrainedModel
    processing_class: Any
    metrics: Mapping[str, Any]
    base_model: str | None
    dataset: str | None
    card: bytes | None = None


def _item(name: str, module: Module, **given: Any) -> _Item:
    """The module, or what [`save_module`] wrote to a folder; arguments of the push come first."""
    given["metrics"] = _checked_metrics(given["metrics"])
    if not isinstance(module, str | os.PathLike):
        _check_module(module, name)
        return _Item(module, **given)
    folder, card = Path(module), Path(module) / "README.md"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no module: there is no config.json. `save_module` writes one.")
    config = load_config(folder)
    if checkpoint_kind(config) != MODULE_KIND:
        raise CheckpointError(f"{folder} holds no module, but another model. Cut modules with `extract_module`.")
    with clear_loading_errors(folder):
        loaded = model_class(config, str(folder)).from_pretrained(folder)
    given["processing_class"] = given["processing_class"] or saved_processor(folder, loaded)
    text = read_text(card)
    if text is None:
        return _Item(loaded, **given)
    data = parse_card(text, str(card)).data
    if has_section(text):  # results without our card may be of the module before it was fine-tuned
        stored = config.nemo.get("metrics", {})
        if not isinstance(stored, dict):
            raise CheckpointError(f"The config of {folder} is damaged: its metrics are {stored!r:.80}, no table.")
        given["metrics"] = given["metrics"] or _checked_metrics(stored)
    given["base_model"] = given["base_model"] or next(iter(as_list(data.base_model)), None)
    given["dataset"] = given["dataset"] or next(iter(as_list(data.datasets)), None)
    return _Item(loaded, **given, card=text.encode())


def _checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Results in the types of Python; their accuracy is a share."""
    plain = plain_metrics(metrics or {})
    accuracy = accuracy_of(plain)
    if accuracy is not None and not (isinstance(accuracy, int | float) and 0 <= accuracy <= 1):
        raise NemoValueError(f"The accuracy of a module must be a share from 0 to 1, got {accuracy!r}.")
    return plain


def _place_collection(remote: Remote, root: Path, items: Mapping[str, _Item], dataset: str | None) -> list[str]:
    """Write all modules, the index and the card of the collection; returns the folders of the modules."""
    content = remote.read(INDEX_FILE)
    index = {} if content is None else read_index(content, f"{INDEX_FILE} of {remote.repo_id}")
    folders = choose_folders(items, {name: entry["folder"] for name, entry in index.items()})
    for folder in [folders[name] for name in items if name not in index]:
        read = partial(remote.read, folder=folder)
        check_replaceable(f"{remote.repo_id}/{folder}", read, "Give the module another name.")
    for name, item in items.items():
        folder = root / _place(remote, root, folders[name], item)
        index[name] = _entry(item, folder)
        if (folder / "slim.py").exists():  # transformers looks for code in the root
            shutil.copyfile(folder / "slim.py", root / "slim.py")
    write_index(root / INDEX_FILE, index)
    where = _fetch_card(remote, root, "", None)
    dataset = dataset or next((item.dataset for item in items.values() if item.dataset), None)
    has_code = "slim.py" in remote.files or (root / "slim.py").exists()
    text, data = collection_card(remote.repo_id, read_entries(index), pipeline_task(item.module), has_code, dataset)
    _write_card(root, text, data, where)
    return list(folders.values())


def _place(remote: Remote, root: Path, folder: str, item: _Item) -> str:
    """Write one module where it will be committed."""
    (root / folder).mkdir(exist_ok=True)
    where = _fetch_card(remote, root, folder, item.card)
    card = {"source": remote.repo_id, "subfolder": folder, "base_model": item.base_model, "dataset": item.dataset}
    _save(item.module, root / folder, item.processing_class, item.metrics, card, where)
    return folder


def _save(
    module: PreTrainedModel,
    target: Path,
    processing_class: Any,
    metrics: Mapping[str, Any],
    card: Mapping[str, Any],
    where: str,
    **kwargs: Any,
) -> None:
    """
    Write all files of a module; `card` is what [`module_card`] takes beside the module, `where` what errors call its
    README.
    """
    _check_module(module)
    with staged(target) as folder:
        module.save_pretrained(folder, **kwargs)
        _store_metrics(folder / "config.json", metrics)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        if (target / "README.md").exists():
            shutil.copyfile(target / "README.md", folder / "README.md")
        beside = {"has_processor": processing_class is not None, "has_code": (folder / "slim.py").exists()}
        text, data = module_card(module, metrics, **beside, **card)
        _write_card(folder, text, data, where)
        written = {file.name for file in folder.iterdir()}
    # Shards and a single file must not stand side by side, nor code beside weights that do not need it.
    for old in (*target.glob("model*.safetensors*"), *target.glob("slim.py")):
        if old.name not in written:
            old.unlink()


def _write_card(folder: Path, text: str, data: ModelCardData, where: str) -> None:
    """Write or update the README of a folder."""
    path = folder / "README.md"
    path.write_bytes(update_card(read_text(path, where), text, data, where).encode("utf-8"))


def _store_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Put the results into the provenance of a saved module; none stay of a module that was measured before."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["nemo"].pop("metrics", None)
    if metrics:
        config["nemo"]["metrics"] = dict(metrics)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _check_module(module: Any, name: str = "") -> None:
    if checkpoint_kind(getattr(module, "config", None)) != MODULE_KIND:
        what = type(module).__name__ if not name else f"{type(module).__name__} ({name!r})"
        raise NemoValueError(f"{what} is not a module; make one with `extract_module`.")


def _entry(item: _Item, folder: Path) -> dict[str, Any]:
    """What the index says of a module that was written to `folder`."""
    nemo = item.module.config.nemo
    entry = ModuleEntry(
        folder=folder.name,
        labels=list(item.module.config.id2label.values()),
        neuron_retention=nemo["neuron_retention"],
        parameter_retention=nemo["parameter_retention"],
        parameters=count_parameters(item.module),
        bytes=sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
        layout=nemo["layout"],
        parent=item.base_model or parent_on_hub(item.module),
        groups=nemo.get("groups"),
        accuracy=accuracy_of(item.metrics),
    )
    return entry_dict(entry)


def _fetch_card(remote: Remote, root: Path, folder: str, own: bytes | None) -> str:
    """Put the card that the repository has, else the module's own, where the new one will be; what errors call it."""
    path = f"{folder}/README.md" if folder else "README.md"
    content = remote.read("README.md", folder)
    content = own if content is None else content
    if content is not None:
        (root / path).write_bytes(content)
    return f"{path} of {remote.repo_id}"


def _stale(remote: Remote, root: Path, folder: str) -> list[str]:
    """Weights and code of a replaced module that the new one does not have."""
    prefix = f"{folder}/" if folder else ""
    old = [path.removeprefix(prefix) for path in remote.files if path.startswith(prefix)]
    names = [name for name in old if fnmatch(name, "model*.safetensors*") or name == "slim.py"]
    return [prefix + name for name in names if "/" not in name and not (root / folder / name).exists()]
