# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Put masks on a model, take them off again, and look at the gates."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .config import MODULAR_KIND, ModularConfig, checkpoint_kind, is_pattern
from .errors import NemoRuntimeError, NemoValueError, UnsupportedModelError
from .layers import (
    ActivationRecorder,
    GatedBatchNorm2d,
    MaskedConv1D,
    MaskedConv2d,
    MaskedLayer,
    MaskedLinear,
    MaskGenerator,
    MaskState,
)
from .maskable import MaskableLayer, chosen_layers, exclusion_reason, maskable_layers
from .resolution import resolve_architecture, resolve_parts
from .slim import layer_sizes


logger = logging.get_logger(__name__)

ACTIVATION_THRESHOLD = 0.05  # for `gate="activation"` where the activation is no ReLU


def apply_masks(model: PreTrainedModel, config: ModularConfig | None = None) -> PreTrainedModel:
    """
    Make a model modular, in place: its target layers get mask generators and become [`~nemo_hf.layers.MaskedLayer`]s.

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
    layers = chosen_layers(model, config)
    _refuse_partial_passes(model, layers)
    if is_modular_checkpoint(model.config):
        logger.warning(
            "The checkpoint of this model has mask generators, but it was loaded as a plain model without them; new "
            "ones are drawn. Load it with `AutoModularModel.from_pretrained` to keep them."
        )
    encoder = model.get_submodule(resolve_architecture(model).encoder)
    forward_arguments = list(inspect.signature(encoder.forward).parameters)
    position = forward_arguments.index("attention_mask") if "attention_mask" in forward_arguments else None
    state = MaskState(position)
    detach = config.detach_generator_inputs
    if detach is None:
        detach = not any(isinstance(model.get_submodule(layer.name), nn.Conv2d) for layer in layers)
    for layer in layers:
        _mask_layer(model, layer, config, detach, state)
        state.layers.append(layer.name)
        if config.gate == "activation":
            _record_activation(model, layer, config, state)
    encoder.register_forward_pre_hook(state.before_forward, with_kwargs=True)
    model.config.nemo = _listed(model, config).to_dict()
    return model


def ensure_masks(model: PreTrainedModel, config: ModularConfig | None) -> PreTrainedModel:
    """
    [`apply_masks`] for a model that may have masks already.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model cannot carry masks.
        [`~nemo_hf.errors.NemoValueError`]: if its masks are not those of `config`, unless that is `None`.
    """
    if not is_masked(model):
        return apply_masks(model, config)
    resolve_parts(model)  # refuses adapters that were put on after the masks
    if config is not None and _listed(model, config) != modular_config(model):
        raise NemoValueError(
            f"The model is masked already, with another config: {modular_config(model)}. Leave out "
            "modular_config, or call `remove_masks(model)` first."
        )
    return model


def _listed(model: PreTrainedModel, config: ModularConfig) -> ModularConfig:
    """The config with the names of the layers instead of a regular expression, which no file may hold."""
    if not is_pattern(config.target_modules):
        return config
    return replace(config, target_modules=[layer.name for layer in chosen_layers(model, config)])


def _refuse_partial_passes(model: PreTrainedModel, layers: list[MaskableLayer]) -> None:
    """A gate needs its layer to be called once in every forward pass, with whole sequences."""
    if getattr(model.config, "chunk_size_feed_forward", 0):
        raise UnsupportedModelError(
            "The model splits sequences (`config.chunk_size_feed_forward`), but a gate needs whole ones. Set it to 0."
        )
    if getattr(model.config, "layerdrop", 0):
        raise UnsupportedModelError(
            f"The model skips whole blocks at random while it trains (`config.layerdrop={model.config.layerdrop}`), "
            "but a gate needs its layer to be called. Set it to 0, or load the model with `from_pretrained(..., "
            "layerdrop=0.0)`."
        )
    for layer in layers:
        if hasattr(model.get_submodule(layer.name), "_hf_hook"):
            raise UnsupportedModelError(
                f"{layer.name} is dispatched over devices. Load the model without `device_map`, put on the masks, "
                "then dispatch it; a saved modular model loads with `AutoModularModel.from_pretrained(..., "
                "device_map=...)`."
            )


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
    encoder = model.get_submodule(resolve_architecture(model).encoder)
    for key, hook in list(encoder._forward_pre_hooks.items()):
        if getattr(hook, "__self__", None) is state:
            del encoder._forward_pre_hooks[key]
            encoder._forward_pre_hooks_with_kwargs.pop(key, None)
    for name, layer in list(model.named_modules()):
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, ActivationRecorder):
                del layer._forward_hooks[key]
        if isinstance(layer, MaskedLayer | GatedBatchNorm2d):
            _replace(model, name, layer.unmasked())
    del model.config.nemo
    return model


@overload
def list_maskable_layers(model: PreTrainedModel, config: ModularConfig | None = None) -> list[str]: ...


@overload
def list_maskable_layers(
    model: PreTrainedModel, config: ModularConfig | None = None, *, reasons: Literal[True]
) -> dict[str, str | None]: ...


def list_maskable_layers(
    model: PreTrainedModel, config: ModularConfig | None = None, *, reasons: bool = False
) -> list[str] | dict[str, str | None]:
    """
    The layers that [`apply_masks`] masks, or has masked, in forward order.

    Args:
        model (`PreTrainedModel`): a plain or a modular model.
        config ([`ModularConfig`], *optional*): the selection. Defaults to that of the masks that the model has, or to
            `ModularConfig()`.
        reasons (`bool`, *optional*, defaults to `False`): list every layer that the architecture table names, with
            the reason why it is not masked.

    Returns:
        `list[str]`: names as in `model.named_modules()`; with `reasons` a `dict` from the name to the reason, `None`
        for a layer that is masked.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the config matches no layer.

    Example:

    ```python
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from nemo_hf import list_maskable_layers
    >>> model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    >>> list_maskable_layers(model)[0], list_maskable_layers(model, reasons=True)["vit.layers.0.mlp.fc1"]
    ('vit.layers.1.attention.q_proj', 'in one of the first 1 blocks, which skip_first_blocks leaves out')
    ```
    """
    if config is None:
        config = modular_config(model) if is_masked(model) else ModularConfig()
    chosen = [layer.name for layer in chosen_layers(model, config)]
    if not reasons:
        return chosen
    layers = maskable_layers(model)
    return {layer.name: None if layer.name in chosen else exclusion_reason(layer, config) for layer in layers}


def is_masked(model: nn.Module) -> bool:
    """Whether a model carries masks."""
    return any(isinstance(layer, MaskedLayer) for layer in model.modules())


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name, in forward order."""
    layers = {layer.layer_name: layer for layer in model.modules() if isinstance(layer, MaskedLayer)}
    return {name: layers[name] for name in mask_state(model).layers} if layers else {}


def mask_state(model: nn.Module) -> MaskState:
    """
    What the masked layers of a model share.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model has no masks.
    """
    for layer in model.modules():
        if isinstance(layer, MaskedLayer):
            return layer.mask_state
    raise NemoValueError(f"This {type(model).__name__} has no masks. Put them on with `apply_masks(model, config)`.")


def modular_config(model: PreTrainedModel) -> ModularConfig:
    """The [`ModularConfig`] with which a modular model was masked."""
    return ModularConfig.from_dict(model.config.nemo)


def same_masks(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether the generators of one model fit the other, whatever they started from."""
    facts = []
    for masked in (model, other):
        config = modular_config(masked)
        sizes = (config.gate, config.activation_threshold, config.generator_hidden_size)
        facts.append((set(masked_layers(masked)), *sizes))
    return facts[0] == facts[1]


def is_modular_checkpoint(config: object) -> bool:
    """Whether a transformers configuration belongs to a modular model (a parent with generators)."""
    return checkpoint_kind(config) == MODULAR_KIND


@contextlib.contextmanager
def record_masks(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """
    Record the gates of the forward pass that runs inside the context.

    Args:
        model (`nn.Module`): a modular model.

    Yields:
        `dict[str, torch.Tensor]`: for every masked layer the very gates that multiplied its outputs (or that
        [`mix_gates`] mixed), of shape `(batch_size, num_neurons)`, attached to the graph. Filled by the forward pass;
        a further pass replaces it.

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
def mix_gates(model: nn.Module, ratio: float | None, largest: int) -> Iterator[None]:
    """
    Let samples of a batch share their gates in the forward pass that runs inside the context: a share of them is
    multiplied by the mean gates of several random samples, as the samples of a module for several labels are. What
    [`record_masks`] yields are the gates of each sample itself.

    Args:
        model (`nn.Module`): a modular model.
        ratio (`float` or `None`): share of the samples, in [0, 1]. `None` takes that which is best on held-out data
            (docs/benchmarks.md): 0.75, or 0.5 with convolutions, where more only makes labels share more neurons.
        largest (`int`): at most so many samples share, from two up.
    """
    state = mask_state(model)
    if ratio is None:
        ratio = 0.5 if any(isinstance(layer, MaskedConv2d) for layer in model.modules()) else 0.75
    state.mixing = (ratio, largest) if ratio else None
    try:
        yield
    finally:
        state.mixing = None


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
        neurons = layer_sizes(layer)[1]
        if name not in gates or gates[name].shape != (neurons,):
            raise NemoValueError(f"hold_gates needs a tensor of shape ({neurons},) for {name}.")
    parameters = next(model.parameters())
    state.held = {name: value.to(parameters.device, parameters.dtype) for name, value in gates.items()}
    try:
        yield
    finally:
        state.held = None


def _mask_layer(model: nn.Module, layer: MaskableLayer, config: ModularConfig, detach: bool, state: MaskState) -> None:
    """Replace one layer, and the norm behind it where that is what the gates multiply."""
    plain = model.get_submodule(layer.name)
    is_convolution = isinstance(plain, nn.Conv2d)
    generator = None
    if config.gate != "activation":
        generator = MaskGenerator(
            *layer_sizes(plain),
            config.generator_hidden_size,
            config.generator_init,
            config.gate,
            "convolution" if is_convolution else "linear",
            detach,
            device=plain.weight.device,
            dtype=plain.weight.dtype,
        ).train(plain.training)
    if is_convolution:
        masked = MaskedConv2d(plain, layer.name, state, generator, norm=layer.norm)
    else:
        masked_class = MaskedConv1D if isinstance(plain, Conv1D) else MaskedLinear
        options = {"windowed": layer.windowed, "remembered": layer.remembered}
        masked = masked_class(plain, layer.name, state, generator, **options)
    _replace(model, layer.name, masked)
    if layer.norm is not None:
        _replace(model, layer.norm, GatedBatchNorm2d(model.get_submodule(layer.norm), layer.norm, state))


def _record_activation(model: nn.Module, layer: MaskableLayer, config: ModularConfig, state: MaskState) -> None:
    """Let the activation behind a layer record what its neurons do."""
    activation = model.get_submodule(layer.activation)
    threshold = config.activation_threshold
    if threshold is None:
        threshold = 0.0 if isinstance(activation, nn.ReLU | nn.ReLU6) else ACTIVATION_THRESHOLD
    channels_first = isinstance(model.get_submodule(layer.name), nn.Conv2d)
    activation.register_forward_hook(ActivationRecorder(layer.name, state, threshold, channels_first))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
