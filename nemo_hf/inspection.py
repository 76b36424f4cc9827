# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`describe_checkpoint`]: what is in a checkpoint, from its small files and the headers of its weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from . import slim
from .collection import INDEX_FILE, list_modules
from .config import MODULAR_KIND, MODULE_KIND, ModularConfig, checkpoint_kind
from .errors import CheckpointError
from .files import find_file
from .model_card import kept_neurons
from .module_masks import MASKS_FILE, ModuleMasks
from .remote import clear_errors
from .statistics import STATISTICS_FILE, NeuronStatistics


WEIGHTS_FILE, SHARDS_FILE = "model.safetensors", "model.safetensors.index.json"
_BUFFERS = ("running_mean", "running_var")  # of floating point, as parameters are
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → type as safetensors calls it, and shape


def describe_checkpoint(
    source: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
) -> dict[str, Any]:
    """
    What is in a checkpoint. Nothing of it is executed, and of the weights only the headers are read.

    Args:
        source (`str` or `os.PathLike`): a folder or a repository on the Hub.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): access token for the Hub.
        subfolder (`str`, *optional*): of the checkpoint in it.

    Returns:
        `dict`: JSON-ready. `kind` is `"plain"`, `"modular"`, `"module"` or `"collection"`; the other entries depend
        on it.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if there is no checkpoint, or it is damaged or of a newer format.
    """
    hub = {"revision": revision, "token": token, "subfolder": subfolder}
    if not subfolder and find_file(source, INDEX_FILE, optional=True, **hub):
        return _describe_collection(source, revision, token)
    config = _read_json(source, "config.json", hub)
    if config is None:
        raise CheckpointError(f"There is no config.json in {_name(source, subfolder)}: it is no checkpoint.")
    nemo = config.get("nemo")
    kind = checkpoint_kind(SimpleNamespace(nemo=nemo))
    report = {
        "kind": kind if kind in (MODULAR_KIND, MODULE_KIND) else "plain",
        "class": _class(config),
        "model_type": config.get("model_type"),
        "labels": _labels(config),
    }
    tensors, size = _weights(source, hub)
    numbers = {
        name: math.prod(shape)
        for name, (dtype, shape) in tensors.items()
        if dtype.startswith(("F", "BF")) and not name.endswith(_BUFFERS)
    }
    generators = sum(number for name, number in numbers.items() if ".mask_generator." in name)
    report |= {"parameters": sum(numbers.values()) - generators}
    try:
        if kind == MODULE_KIND:
            report |= _describe_module(nemo)
        elif kind == MODULAR_KIND:
            report |= {"generator_parameters": generators, **_describe_modular(source, nemo, tensors, hub)}
        elif find_file(source, MASKS_FILE, optional=True, **hub):
            masks = ModuleMasks.from_pretrained(source, **hub)
            report |= {"masks": masks.origin, **_sizes(masks)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The config of {_name(source, subfolder)} is damaged: {error}") from error
    return {**report, "bytes": size}


def _describe_collection(source: str | os.PathLike, revision: str | None, token: str | bool | None) -> dict[str, Any]:
    modules = list_modules(source, revision=revision, token=token)
    rows = [
        {"name": name, **{key: value for key, value in vars(entry).items() if value is not None}}
        for name, entry in modules.items()
    ]
    size = sum(entry.bytes for entry in modules.values())
    return {"kind": "collection", "num_modules": len(rows), "modules": rows, "bytes": size}


def _describe_module(nemo: dict[str, Any]) -> dict[str, Any]:
    nemo = slim.module_description(SimpleNamespace(nemo=nemo))
    layers = {layer: kept_neurons({layer: bits}) for layer, bits in nemo["neurons"].items()}
    optional = {name: nemo[name] for name in ("groups", "grouped_by", "metrics", "masks") if name in nemo}
    return {
        "format": nemo["format"],
        **optional,
        "parent": nemo["parent"]["name_or_path"] or None,
        "parent_class": nemo["parent"]["class"],
        "gates": nemo["gates"],
        "threshold": nemo["threshold"],
        "layout": nemo["layout"],
        "masked_layers": len(layers),
        "neurons": sum(layers.values()),
        "neuron_retention": nemo["neuron_retention"],
        "parameter_retention": nemo["parameter_retention"],
        "neurons_per_layer": layers,
    }


def _describe_modular(
    source: str | os.PathLike, nemo: dict[str, Any], tensors: Tensors, hub: dict[str, Any]
) -> dict[str, Any]:
    config = ModularConfig.from_dict(nemo)
    ending = ".mask_generator.expand.bias"
    layers = {name.removesuffix(ending): shape[0] for name, (_, shape) in tensors.items() if name.endswith(ending)}
    report = {
        "format": nemo.get("format"),
        "target_modules": config.target_modules,
        "skip_first_blocks": config.skip_first_blocks,
        "gates": config.gate,
        "generator_hidden_size": config.generator_hidden_size,
        "masked_layers": len(layers),
        "neurons": sum(layers.values()),
    }
    if find_file(source, STATISTICS_FILE, optional=True, **hub):
        statistics = NeuronStatistics.from_pretrained(source, **hub)
        report |= _sizes(statistics.module_masks())
    return {**report, "neurons_per_layer": layers}


def _sizes(masks: ModuleMasks) -> dict[str, float | None]:
    """How much the masks keep, and have in common."""
    name = "single_label_retention" if masks.grouped_by is None else "single_group_retention"
    coupling = masks.coupling()
    return {name: masks.retention(), "coupling": None if math.isnan(coupling) else coupling}


def _class(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else None


def _labels(config: dict[str, Any]) -> list[str]:
    """Names of the labels; a config without names has two, as in transformers."""
    names = config.get("id2label")
    return list(names.values()) if isinstance(names, dict) else ["LABEL_0", "LABEL_1"]


def _weights(source: str | os.PathLike, hub: dict[str, Any]) -> tuple[Tensors, int]:
    """All tensors, and the size of their files in bytes."""
    where = _name(source, hub["subfolder"])
    shards = _read_json(source, SHARDS_FILE, hub)
    try:
        files = [WEIGHTS_FILE] if shards is None else sorted(set(shards["weight_map"].values()))
        if any(PurePosixPath(file).name != file for file in files):
            raise CheckpointError(f"{SHARDS_FILE} of {where} is damaged: it names a file outside its folder.")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{SHARDS_FILE} of {where} is damaged ({error!r}).") from error
    tensors, size = {}, 0
    for file in files:
        try:
            header, length = _local_header(source, file, hub) if os.path.isdir(source) else _header(source, file, hub)
        except (SafetensorError, SafetensorsParsingError) as error:
            raise CheckpointError(f"{file} of {where} is damaged: {error}.") from error
        tensors |= header
        size += length
    return tensors, size


def _local_header(source: str | os.PathLike, file: str, hub: dict[str, Any]) -> tuple[Tensors, int]:
    path = Path(source, hub["subfolder"], file)
    if not path.is_file():
        raise CheckpointError(f"There is no {file} in {_name(source, hub['subfolder'])}: its weights are missing.")
    with safe_open(path, framework="pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (not a dict)
        tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    return tensors, path.stat().st_size


def _header(source: str | os.PathLike, file: str, hub: dict[str, Any]) -> tuple[Tensors, int]:
    """The header of weights on the Hub: a range of the file, the rest is not downloaded."""
    api, path = HfApi(token=hub["token"]), "/".join(filter(None, (hub["subfolder"], file)))
    with clear_errors(str(source)):
        found = api.get_paths_info(str(source), [path], revision=hub["revision"])
        if not found:
            raise CheckpointError(f"There is no {path} in {source}: its weights are missing.")
        metadata = api.parse_safetensors_file_metadata(str(source), path, revision=hub["revision"])
    tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in metadata.tensors.items()}
    return tensors, found[0].size


def _read_json(source: str | os.PathLike, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    path = find_file(source, name, optional=name != "config.json", **hub)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} of {_name(source, hub['subfolder'])} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} of {_name(source, hub['subfolder'])} is damaged: it is no table.")
    return content


def _name(source: str | os.PathLike, subfolder: str) -> str:
    return f"{source}/{subfolder}" if subfolder else str(source)
