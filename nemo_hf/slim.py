# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Slim models: a transformers class whose layers have the sizes that `config.nemo["shapes"]` lists.

This file needs torch and transformers only: modules of transformers' own classes carry it along, and
`from_pretrained(..., trust_remote_code=True)` loads them with it where nemo_hf is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D


try:
    from nemo_hf.errors import CheckpointError
except ImportError:  # where this file travels alone

    class CheckpointError(OSError):  # type: ignore[no-redef]
        """A file or folder that is missing, damaged, or not what was asked for."""


FORMAT_VERSION = 1
_building = threading.local()  # `layers`: how many the model has so far that this thread makes
MAX_LAYERS = 20_000  # layers of a model, containers included; the largest of transformers have some thousands
MODEL_TYPE_PREFIX = "nemo_"
AUTO_CLASSES = (AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForAudioClassification)


class _Scatter(nn.Module):
    """A layer that computes some channels of a wider output and leaves the others zero."""

    def __init__(self, channels: int, width: int, device: torch.device):
        super().__init__()
        self.width = width
        # Positions of the kept channels in the output, in the checkpoint.
        self.register_buffer("index", torch.arange(channels, device=device))

    def scatter(self, kept: torch.Tensor) -> torch.Tensor:
        """`(samples, channels, ...)` → `(samples, width, ...)`."""
        return kept.new_zeros(kept.shape[0], self.width, *kept.shape[2:]).index_copy_(1, self.index, kept)

    def extra_repr(self) -> str:
        return f"width={self.width}"


class ScatterLinear(_Scatter):
    """
    A linear layer that computes some units of a wider output and leaves the others zero.

    It stands where a layer writes to the residual stream, which is wider, and where most units of a projection would
    be padding of its heads. The computation sits in the ordinary `linear` inside, which adapters such as LoRA can
    target.

    Args:
        linear (`nn.Linear` or `Conv1D`): computes the kept units.
        width (`int`): number of units of the output.

    Returns:
        `torch.Tensor` of shape `(..., width)` for an input of shape `(..., in_features)`.
    """

    def __init__(self, linear: nn.Module, width: int):
        super().__init__(layer_sizes(linear)[1], width, linear.weight.device)
        self.linear = linear

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kept = self.linear(hidden_states)
        # In two dimensions the copy is three times as fast on a CPU.
        return self.scatter(kept.flatten(0, -2)).unflatten(0, kept.shape[:-1])


class ScatterChannels(_Scatter):
    """
    The same for channels: the last convolution of a residual branch, or the norm behind it.

    Args:
        layer (`nn.Conv2d` or `nn.BatchNorm2d`): computes the kept channels.
        width (`int`): number of channels of the output.

    Returns:
        `torch.Tensor` of shape `(batch_size, width, rows, columns)`.
    """

    def __init__(self, layer: nn.Module, width: int):
        super().__init__(layer_sizes(layer)[1], width, layer.weight.device)
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.scatter(self.layer(hidden_states))


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs (features or channels) of a linear layer, a `Conv1D`, a convolution or a batch norm."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.BatchNorm2d):
        return layer.num_features, layer.num_features
    return layer.in_features, layer.out_features


def select_rotary(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an attention layer: the columns of cos and sin that belong to the kept pairs of units."""
    cos, sin = kwargs["position_embeddings"]
    index = layer.rotary_index
    selected = (cos.index_select(-1, index), sin.index_select(-1, index))
    return args, {**kwargs, "position_embeddings": selected}


@contextlib.contextmanager
def clear_loading_errors(source: str | os.PathLike) -> Iterator[None]:
    """
    Around `from_pretrained` of transformers.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: for whatever it raises: what a damaged file leads to has no one kind.
            Where a package or the memory of a device is missing, the checkpoint is not to blame.
    """
    try:
        yield
    except (CheckpointError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be loaded ({type(error).__name__}: {error}). Its config.json or its weights are damaged "
            "or do not fit each other, or an argument does not fit them."
        ) from error


@contextlib.contextmanager
def limited_size() -> Iterator[None]:
    """
    Around the making of a model from a configuration that comes from anywhere: one that claims a billion blocks would
    be built forever.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: as soon as the model has more than [`MAX_LAYERS`] layers.
    """
    _count_layers()
    outer, _building.layers = getattr(_building, "layers", None), 0
    try:
        yield
    finally:
        _building.layers = outer


@functools.cache
def _count_layers() -> None:
    """A hook of all models, once and for good: another thread may be making one."""

    def count(*_: Any) -> None:
        layers = getattr(_building, "layers", None)
        if layers is None:
            return
        if layers == MAX_LAYERS:
            raise CheckpointError(f"Damaged config: it describes a model of more than {MAX_LAYERS} layers.")
        _building.layers = layers + 1

    nn.modules.module.register_module_module_registration_hook(count)


class SlimConfigMixin:
    """A configuration that says what is wrong with it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        with clear_loading_errors("The config of this module"):
            code = config_dict.get("auto_map", {})  # the Auto classes look into it unchecked
            if not isinstance(code, dict) or not all(isinstance(place, str | list) for place in code.values()):
                raise CheckpointError(f"Damaged config: auto_map must hold the places of classes, got {code!r:.80}.")
            return super().from_dict(config_dict, **kwargs)


class SlimModelMixin:
    """Gives the layers of the transformers class behind it the sizes that `config.nemo["shapes"]` lists."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        shapes = module_description(config)["shapes"]
        with limited_size():
            super().__init__(config, *args, **kwargs)
        resize_layers(self, shapes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        with clear_loading_errors(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def module_description(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The checked `config.nemo` of a module.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the configuration does not describe a module, or one of a newer format.
    """
    nemo = getattr(config, "nemo", None)
    if not isinstance(nemo, dict) or nemo.get("kind") != "module" or not isinstance(nemo.get("shapes"), dict):
        raise CheckpointError(
            "This configuration does not describe a module: `config.nemo` must be a dictionary with kind 'module' and "
            f"'shapes', got {nemo!r:.200}. Modules are made by `nemo_hf.extract_module`."
        )
    version = nemo.get("format")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"This module has format {version!r}; this version of nemo_hf reads formats up to {FORMAT_VERSION}. "
            "Upgrade nemo_hf to load it."
        )
    return nemo


def resize_layers(model: nn.Module, shapes: dict[str, Any]) -> None:
    """
    Replace layers by new ones of the listed sizes, in place; the weights are loaded afterwards.

    Args:
        model (`nn.Module`): a model with the sizes of the parent.
        shapes (`dict`): each entry may be missing.
            `"layers"`: name → `[inputs, outputs]`, for a convolution `[inputs, outputs, groups]`, for a norm
            `[channels]`, for a classifier `[inputs]`: its outputs follow `num_labels`. `"scatter"`: name → width of
            the output in which the outputs of the layer get their places. `"attributes"`: sub-layer → attribute →
            number. `"parameters"`: name → shape. `"rotary"`: attention sub-layer → size of its heads.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if a name or a size does not fit the model.
    """
    layers = dict(model.named_modules())
    tables = _tables(shapes)
    for name, sizes in tables["layers"].items():
        old = layers.get(name)
        if isinstance(old, nn.Linear) and isinstance(sizes, list) and len(sizes) == 1:
            sizes = [*sizes, old.out_features] if old.out_features == model.config.num_labels else sizes
        if not _are_sizes(sizes, old):
            raise CheckpointError(f"Damaged module: {name!r} cannot become a layer of sizes {sizes!r}.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # an empty layer is meant
            new = _resized(old, sizes)
        width = tables["scatter"].get(name)
        if width is not None:
            if not _fits([width], [layer_sizes(old)[1]]) or width < layer_sizes(new)[1]:
                raise CheckpointError(f"Damaged module: {name!r} cannot scatter its outputs to a width of {width!r}.")
            wrapper = ScatterChannels if isinstance(old, nn.Conv2d | nn.BatchNorm2d) else ScatterLinear
            new = wrapper(new, width)
        setattr(layers[name.rpartition(".")[0]], name.rpartition(".")[2], new)
    for name, attributes in tables["attributes"].items():
        for attribute, value in attributes.items():
            owner = layers.get(name)
            old = getattr(owner, attribute, None)
            if not isinstance(old, int) or not _fits([value], [old]):
                raise CheckpointError(f"Damaged module: {name!r} has no number {attribute!r} to set to {value!r}.")
            setattr(owner, attribute, value)
    for name, shape in tables["parameters"].items():
        owner, attribute = layers.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(owner, attribute, None)
        if not isinstance(old, nn.Parameter) or not _fits(shape, list(old.shape)):
            raise CheckpointError(f"Damaged module: {name!r} cannot become a parameter of shape {shape!r}.")
        setattr(owner, attribute, nn.Parameter(old.new_zeros(shape)))
    for name, size in tables["rotary"].items():
        if not size or size not in tables["attributes"].get(name, {}).values():  # checked above
            raise CheckpointError(f"Damaged module: {name!r} cannot have rotary positions of size {size!r}.")
        layers[name].register_buffer("rotary_index", torch.arange(size, device=next(model.parameters()).device))
        layers[name].register_forward_pre_hook(select_rotary, with_kwargs=True)


def _tables(shapes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of `shapes`, empty ones for those that are missing."""
    tables = {name: shapes.get(name, {}) for name in ("layers", "scatter", "attributes", "parameters", "rotary")}
    for entries in (tables, tables["attributes"]):
        for name, table in entries.items():
            if not isinstance(table, dict):
                raise CheckpointError(f"Damaged module: {name!r} of its shapes must be a table, got {table!r:.80}.")
    return tables


def _resized(old: nn.Module, sizes: list[int]) -> nn.Module:
    """A layer of the kind of `old` with other sizes."""
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, Conv1D):
        return Conv1D(sizes[1], sizes[0]).to(**place)
    if isinstance(old, nn.Conv2d):
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(old, name) for name in names}
        return nn.Conv2d(*sizes[:2], groups=sizes[2], bias=old.bias is not None, **options, **place)
    if isinstance(old, nn.BatchNorm2d):
        options = {"eps": old.eps, "momentum": old.momentum, "track_running_stats": old.track_running_stats}
        return nn.BatchNorm2d(sizes[0], **options, **place)
    return nn.Linear(*sizes, bias=old.bias is not None, **place)


def _are_sizes(sizes: Any, layer: nn.Module | None) -> bool:
    """Whether `sizes` are integers from zero up to what the layer of the parent has; anything else is damage."""
    if isinstance(layer, nn.Conv2d):
        limits = [layer.in_channels, layer.out_channels, layer.groups]
        return _fits(sizes, limits) and sizes[2] > 0 and not sizes[0] % sizes[2] and not sizes[1] % sizes[2]
    if isinstance(layer, nn.BatchNorm2d):
        return _fits(sizes, [layer.num_features])
    return isinstance(layer, nn.Linear | Conv1D) and _fits(sizes, list(layer_sizes(layer)))


def _fits(sizes: Any, limits: list[int]) -> bool:
    return (
        isinstance(sizes, list | tuple)
        and len(sizes) == len(limits)
        and all(type(size) is int and 0 <= size <= limit for size, limit in zip(sizes, limits, strict=True))
    )


@functools.cache
def slim_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class `Slim<Base>` with model type `nemo_<base>`."""
    model_type = MODEL_TYPE_PREFIX + base.model_type
    auto_class = "AutoConfig" if _is_stock(base) else None
    namespace = _namespace(base, model_type=model_type, _auto_class=auto_class)
    return type(f"Slim{base.__name__}", (SlimConfigMixin, base), namespace)


@functools.cache
def slim_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class `Slim<Base>`: `base` with the layer sizes of its configuration."""
    auto_class = next((auto.__name__ for auto in AUTO_CLASSES if base in _classes_of(auto, base.config_class)), None)
    namespace = _namespace(
        base,
        config_class=slim_config_class(base.config_class),
        _auto_class=auto_class if _is_stock(base) else None,
    )
    return type(f"Slim{base.__name__}", (SlimModelMixin, base), namespace)


def _is_stock(base: type) -> bool:
    """
    Whether a class is one of transformers' own. A slim class made from it has an `_auto_class`: its `save_pretrained`
    writes this file and an `auto_map` beside the weights. From there a class of the user could not be found.
    """
    return base.__module__.startswith("transformers.")


def _classes_of(auto_class: type, base_config: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an Auto class has for a configuration; several for DeiT, with and without teacher."""
    if base_config not in auto_class._model_mapping:
        return ()
    found = auto_class._model_mapping[base_config]
    return found if isinstance(found, tuple) else (found,)


def _namespace(base: type, **attributes: Any) -> dict[str, Any]:
    return {"__module__": __name__, "__doc__": f"A slim [`~transformers.{base.__name__}`].", **attributes}


def register_slim_classes(model_type: str) -> None:
    """
    Make the modules of one transformers family load with `AutoConfig` and the Auto classes.

    Args:
        model_type (`str`): the family as in `config.model_type` of the parent, such as `"vit"`.
    """
    base_config = CONFIG_MAPPING[model_type]
    config_class = slim_config_class(base_config)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    slim_classes: list[type] = [config_class, *_register_bodies(base_config)]
    for auto_class in AUTO_CLASSES:
        classes = tuple(slim_model_class(base) for base in _classes_of(auto_class, base_config))
        if classes:
            # Several classes: transformers picks by `config.architectures`.
            auto_class.register(config_class, classes if len(classes) > 1 else classes[0], exist_ok=True)
            slim_classes.extend(classes)
    for slim_class in slim_classes:
        setattr(
            sys.modules[__name__], slim_class.__name__, slim_class
        )  # importable by name, as users and pickle expect


def _register_bodies(base_config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Some classifiers make their body with `AutoModel`. It gets its sizes from the classifier around it."""
    config_class, bases = slim_config_class(base_config), _classes_of(AutoModel, base_config)
    if len(bases) != 1:
        return []
    body = type(f"Slim{bases[0].__name__}Body", bases, _namespace(bases[0], config_class=config_class))
    AutoModel.register(config_class, body, exist_ok=True)
    return [body]


def __getattr__(name: str) -> type:
    """`Slim<Base>` for a class of transformers: what an `auto_map` names where nemo_hf is not installed."""
    base = getattr(transformers, name.removeprefix("Slim"), None) if name.startswith("Slim") else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return slim_config_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        _register_bodies(base.config_class)
        return slim_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
