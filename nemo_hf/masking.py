# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Put masks on a model, take them off again, and look at the gates."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import MaskableLayer, maskable_layers, resolve_architecture
from .config import MODULAR_KIND, ModularConfig
from .errors import NemoRuntimeError, NemoValueError, UnsupportedModelError
from .layers import MaskedLinear, MaskGenerator, MaskState


logger = logging.get_logger(__name__)

_ATTENTION_ROLES = ("query", "key", "value", "attention_output")
_ROLE_GROUPS = {"all": (*_ATTENTION_ROLES, "up", "down"), "attention": _ATTENTION_ROLES, "ffn": ("up", "down")}


def apply_masks(model: PreTrainedModel, config: ModularConfig | None = None) -> PreTrainedModel:
    """
    Make a model modular, in place: its target layers get mask generators and become [`~nemo_hf.layers.MaskedLinear`].

    The model keeps its class, its `forward` signature and the names of its parameters; `config.nemo` describes the
    masks.

    Args:
        model (`PreTrainedModel`): a classifier of a supported family.
        config ([`ModularConfig`], *optional*): which layers, and what generators. Defaults to `ModularConfig()`.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model cannot carry masks.
        [`~nemo_hf.errors.NemoValueError`]: if the config matches no layer, or the model has masks already.

    Example:

    ```python
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from nemo_hf import ModularConfig, apply_masks
    >>> model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    >>> model = apply_masks(model, ModularConfig(target_modules="ffn"))
    ```
    """
    config = config or ModularConfig()
    if is_masked(model):
        raise NemoValueError("The model has masks already; call `remove_masks(model)` first to put on others.")
    names = list_maskable_layers(model, config)
    if getattr(model.config, "chunk_size_feed_forward", 0):
        raise UnsupportedModelError(
            "The model splits sequences (`config.chunk_size_feed_forward`), but a gate needs whole ones. Set it to 0."
        )
    for name in names:
        if hasattr(model.get_submodule(name), "_hf_hook"):
            raise UnsupportedModelError(
                f"{name} is dispatched over devices. Load the model without `device_map`, put on the masks, then "
                "dispatch it; a saved modular model loads with `AutoModularModel.from_pretrained(..., "
                "device_map=...)`."
            )
    if is_modular_checkpoint(model.config):
        logger.warning(
            "The checkpoint of this model has mask generators, but it was loaded as a plain model without them; new "
            "ones are drawn. Load it with `AutoModularModel.from_pretrained` to keep them."
        )
    forward_arguments = list(inspect.signature(model.forward).parameters)
    state = MaskState(forward_arguments.index("attention_mask") if "attention_mask" in forward_arguments else None)
    for name in names:
        linear = model.get_submodule(name)
        generator = MaskGenerator(
            linear.in_features,
            linear.out_features,
            config.generator_hidden_size,
            config.generator_init,
            config.gate,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        _replace(model, name, MaskedLinear(linear, name, state, generator.train(linear.training)))
    model.register_forward_pre_hook(state.before_forward, with_kwargs=True)
    model.config.nemo = config.to_dict()
    return model


def remove_masks(model: PreTrainedModel) -> PreTrainedModel:
    """
    The exact inverse of [`apply_masks`], in place: plain layers with the same parameters, generators gone.

    Args:
        model (`PreTrainedModel`): a modular model.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model has no masks.
    """
    state = mask_state(model)
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "__self__", None) is state:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for name, layer in masked_layers(model).items():
        _replace(model, name, layer.unmasked())
    del model.config.nemo
    return model


def list_maskable_layers(model: PreTrainedModel, config: ModularConfig | None = None) -> list[str]:
    """
    The layers that [`apply_masks`] masks, or has masked, in forward order.

    Args:
        model (`PreTrainedModel`): a plain or a modular model.
        config ([`ModularConfig`], *optional*): the selection. Defaults to that of the masks that the model has, or to
            `ModularConfig()`.

    Returns:
        `list[str]`: names as in `model.named_modules()`.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the config matches no layer.
    """
    architecture = resolve_architecture(model)
    if config is None:
        config = modular_config(model) if is_masked(model) else ModularConfig()
    layers = list(maskable_layers(architecture, model))
    matching = [layer for layer in layers if _matches(layer, config.target_modules)]
    if not matching:
        raise NemoValueError(
            f"target_modules={config.target_modules!r} matches no maskable layer. Maskable are, in each block: "
            f"{', '.join(architecture.roles().values())}; the first is {layers[0].name if layers else 'none'}. "
            "A suffix of names goes into a list."
        )
    chosen = [layer.name for layer in matching if layer.block >= config.skip_first_blocks]
    if not chosen:
        raise NemoValueError(
            f"skip_first_blocks={config.skip_first_blocks} excludes every layer that "
            f"target_modules={config.target_modules!r} matches: the model has {layers[-1].block + 1} blocks."
        )
    return chosen


def is_masked(model: nn.Module) -> bool:
    """Whether a model carries masks."""
    return any(isinstance(layer, MaskedLinear) for layer in model.modules())


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model by name, in forward order."""
    return {layer.layer_name: layer for layer in model.modules() if isinstance(layer, MaskedLinear)}


def mask_state(model: nn.Module) -> MaskState:
    """
    What the masked layers of a model share.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model has no masks.
    """
    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            return layer.mask_state
    raise NemoValueError(f"This {type(model).__name__} has no masks. Put them on with `apply_masks(model, config)`.")


def modular_config(model: PreTrainedModel) -> ModularConfig:
    """The [`ModularConfig`] with which a modular model was masked."""
    return ModularConfig.from_dict(model.config.nemo)


def is_modular_checkpoint(config: object) -> bool:
    """Whether a transformers configuration belongs to a modular model (a parent with generators)."""
    nemo = getattr(config, "nemo", None)
    return isinstance(nemo, dict) and nemo.get("kind") == MODULAR_KIND


@contextlib.contextmanager
def record_masks(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """
    Record the gates of the forward pass that runs inside the context.

    Args:
        model (`nn.Module`): a modular model.

    Yields:
        `dict[str, torch.Tensor]`: for every masked layer the very gates that multiplied its outputs, of shape
        `(batch_size, num_neurons)`, attached to the graph. Filled by the forward pass; a further pass replaces it.

    Raises:
        [`~nemo_hf.errors.NemoRuntimeError`]: on leaving, if the model ran but some masked layers were never called.

    Example:

    ```python
    >>> with record_masks(model) as masks:
    ...     outputs = model(**batch)
    ```
    """
    state = mask_state(model)
    if state.recorded is not None:
        raise NemoRuntimeError("The gates of this model are being recorded already; `record_masks` does not nest.")
    masks: dict[str, torch.Tensor] = {}
    state.recorded = masks
    try:
        yield masks
    finally:
        state.recorded = None
    silent = [name for name in masked_layers(model) if name not in masks] if masks else []
    if silent:
        raise NemoRuntimeError(
            f"The forward pass never called {len(silent)} masked layers, so their masks do nothing: "
            f"{', '.join(silent[:4])}{', …' if len(silent) > 4 else ''}. Exclude them with `target_modules`."
        )


@contextlib.contextmanager
def hold_gates(model: nn.Module, gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """
    Run a modular model with constant gates instead of those of its generators: what a module computes.

    Args:
        model (`nn.Module`): a modular model.
        gates (`Mapping[str, torch.Tensor]`): for every masked layer a tensor of shape `(num_neurons,)`.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if a layer is missing or has another number of neurons.
    """
    state = mask_state(model)
    for name, layer in masked_layers(model).items():
        if name not in gates or gates[name].shape != (layer.out_features,):
            raise NemoValueError(f"hold_gates needs a tensor of shape ({layer.out_features},) for {name}.")
    parameters = next(model.parameters())
    state.held = {name: value.to(parameters.device, parameters.dtype) for name, value in gates.items()}
    try:
        yield
    finally:
        state.held = None


def _matches(layer: MaskableLayer, targets: str | list[str]) -> bool:
    if isinstance(targets, list):
        return any(layer.name == target or layer.name.endswith(f".{target}") for target in targets)
    if targets in _ROLE_GROUPS:
        return layer.role in _ROLE_GROUPS[targets]
    return re.fullmatch(targets, layer.name) is not None


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
