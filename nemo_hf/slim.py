# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Slim models: a transformers class whose layers have the sizes that `config.nemo["shapes"]` lists.

This file imports torch and transformers only, so that a checkpoint can carry it along.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


FORMAT_VERSION = 1
MODEL_TYPE_PREFIX = "nemo_"
AUTO_CLASSES = (AutoModelForImageClassification, AutoModelForSequenceClassification)


class ScatterLinear(nn.Module):
    """
    A linear layer that computes some units of a wider output and leaves the others zero.

    It stands where a layer writes to the residual stream: the stream keeps its width, the units that no label needs
    are gone. The computation sits in the ordinary `linear` inside, which adapters such as LoRA can target.

    Args:
        linear (`nn.Linear`): computes the kept units.
        width (`int`): number of units of the output.

    Returns:
        `torch.Tensor` of shape `(..., width)` for an input of shape `(..., in_features)`.
    """

    def __init__(self, linear: nn.Linear, width: int):
        super().__init__()
        self.linear = linear
        self.width = width
        index = torch.arange(linear.out_features, device=linear.weight.device)
        self.register_buffer("index", index)  # positions of the kept units in the output, in the checkpoint

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kept = self.linear(hidden_states)
        return kept.new_zeros(*kept.shape[:-1], self.width).index_copy(-1, self.index, kept)

    def extra_repr(self) -> str:
        return f"width={self.width}"


class SlimModelMixin:
    """Gives the layers of the transformers class behind it the sizes that `config.nemo["shapes"]` lists."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        resize_layers(self, module_description(config)["shapes"])


def module_description(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The checked `config.nemo` of a module.

    Raises:
        `ValueError`: if the configuration does not describe a module, or one of a newer format.
    """
    nemo = getattr(config, "nemo", None)
    if not isinstance(nemo, dict) or nemo.get("kind") != "module" or not isinstance(nemo.get("shapes"), dict):
        raise ValueError(
            "This configuration does not describe a module: `config.nemo` must be a dictionary with kind 'module' and "
            f"'shapes', got {nemo!r:.200}. Modules are made by `nemo_hf.extract_module`."
        )
    version = nemo.get("format")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"This module has format {version!r}; this version of nemo_hf reads formats up to {FORMAT_VERSION}. "
            "Upgrade nemo_hf to load it."
        )
    return nemo


def resize_layers(model: nn.Module, shapes: dict[str, Any]) -> None:
    """
    Replace linear layers by new ones of the listed sizes, in place; the weights are loaded afterwards.

    Args:
        model (`nn.Module`): a model with the sizes of the parent.
        shapes (`dict`): `{"linear": {layer: [in_features, out_features]}, "scatter": [layer, ...],
            "attributes": {sub-layer: {attribute: number}}}`. A layer under `"scatter"` keeps its output width.

    Raises:
        `ValueError`: if a name or a size does not fit the model.
    """
    layers = dict(model.named_modules())
    scatter = set(shapes.get("scatter", ()))
    for name, sizes in shapes.get("linear", {}).items():
        old = layers.get(name)
        if not isinstance(old, nn.Linear) or not _are_sizes(sizes, limits=(old.in_features, old.out_features)):
            raise ValueError(f"Damaged module: {name!r} cannot become a linear layer of sizes {sizes!r}.")
        parent = layers[name.rpartition(".")[0]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # an empty layer is meant
            new = nn.Linear(*sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        setattr(parent, name.rpartition(".")[2], ScatterLinear(new, old.out_features) if name in scatter else new)
    for name, attributes in shapes.get("attributes", {}).items():
        for attribute, value in attributes.items():
            owner = layers.get(name)
            if not isinstance(value, int | float) or not isinstance(getattr(owner, attribute, None), int | float):
                raise ValueError(f"Damaged module: {name!r} has no number {attribute!r} to set to {value!r}.")
            setattr(owner, attribute, value)


def _are_sizes(sizes: Any, limits: tuple[int, int]) -> bool:
    """Whether `sizes` is a pair of integers from zero up to what the parent has; anything else is a damaged file."""
    return (
        isinstance(sizes, list | tuple)
        and len(sizes) == 2
        and all(isinstance(size, int) and 0 <= size <= limit for size, limit in zip(sizes, limits, strict=True))
    )


@functools.cache
def slim_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class `Slim<Base>` with model type `nemo_<base>`."""
    return type(f"Slim{base.__name__}", (base,), _namespace(base, model_type=MODEL_TYPE_PREFIX + base.model_type))


@functools.cache
def slim_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class `Slim<Base>`: `base` with the layer sizes of its configuration."""
    namespace = _namespace(base, config_class=slim_config_class(base.config_class))
    return type(f"Slim{base.__name__}", (SlimModelMixin, base), namespace)


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
    slim_classes: list[type] = [config_class]
    for auto_class in AUTO_CLASSES:
        if base_config in auto_class._model_mapping:
            found = auto_class._model_mapping[base_config]
            classes = tuple(slim_model_class(base) for base in (found if isinstance(found, tuple) else (found,)))
            # Several classes (DeiT with and without teacher): transformers picks by `config.architectures`.
            auto_class.register(config_class, classes if len(classes) > 1 else classes[0], exist_ok=True)
            slim_classes.extend(classes)
    for slim_class in slim_classes:
        setattr(
            sys.modules[__name__], slim_class.__name__, slim_class
        )  # importable by name, as users and pickle expect
