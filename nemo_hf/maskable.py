# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Which layers of a model can be masked and which of them a config selects, and why not the others."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from .architectures import ATTENTION_ROLES, Attention, Chain, FeedForward
from .config import LAYER_GROUPS, ModularConfig
from .errors import NemoValueError
from .resolution import constant_at_zero, is_depthwise, layer_groups, resolve_parts


@dataclass(frozen=True)
class MaskableLayer:
    """
    A layer that the table names.

    Args:
        name (`str`): in `model.named_modules()`.
        block (`int`): the number of its block, in forward order.
        group (`str`): `"attention"`, `"ffn"` or `"convolution"`.
        norm (`str`, *optional*): the batch norm whose output its gates multiply, instead of its own.
        windowed (`bool`): whether it sees windows as samples.
        remembered (`bool`): whether what follows, an attention or an activation, remembers its output for the backward
            pass.
        activation (`str`, *optional*): the element-wise activation of its neurons, of this layer alone and zero at
            zero. Units of a gated feed-forward layer are activated in the layer that the table calls `gate`.
        reason (`str`, *optional*): why this model cannot be cut there, so that the layer is not masked.
    """

    name: str
    block: int
    group: Literal["attention", "ffn", "convolution"]
    norm: str | None = None
    windowed: bool = False
    remembered: bool = False
    activation: str | None = None
    reason: str | None = None


def maskable_layers(model: PreTrainedModel) -> list[MaskableLayer]:
    """The layers that the table names, in forward order: the maskable ones, and with a `reason` those that are not."""
    layers = {}
    for block, part in resolve_parts(model):
        find = {Attention: _attention_layers, FeedForward: _feed_forward_layers, Chain: _chain_layers}[type(part)]
        for layer in find(model, block, part):
            layers.setdefault(layer.name, layer)
    return _with_own_activations(model, list(layers.values()))


def chosen_layers(model: PreTrainedModel, config: ModularConfig) -> list[MaskableLayer]:
    """
    The layers that a config selects, in forward order.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if it selects none, or an entry of a list matches none.
    """
    named = maskable_layers(model)
    layers = [layer for layer in named if _unmaskable(layer, config) is None]
    if not layers:
        raise NemoValueError(
            f"No layer of this {type(model).__name__} can be masked: {_unmaskable(named[0], config)}."
        )
    matching = [layer for layer in layers if _matches(layer, config.target_modules)]
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    unknown = [target for target in targets if not any(_matches(layer, [target]) for layer in named)]
    if matching and unknown:
        raise NemoValueError(
            f"target_modules has {', '.join(map(repr, unknown[:4]))}, which is neither the name of a maskable layer "
            "nor the end of one. `list_maskable_layers(model, reasons=True)` lists the names."
        )
    if not matching:
        excluded = [layer for layer in named if _unmaskable(layer, config) and _matches(layer, config.target_modules)]
        last_block = [layer.name for layer in layers if layer.block == layers[-1].block]
        raise NemoValueError(
            f"target_modules={config.target_modules!r} matches no maskable layer. "
            + (
                f"{excluded[0].name} cannot be cut: {_unmaskable(excluded[0], config)}."
                if excluded
                else f"Maskable are {', '.join(last_block)} and those of the other blocks. A suffix of names goes "
                "into a list."
            )
        )
    chosen = [layer for layer in matching if layer.block >= config.skip_first_blocks]
    if not chosen:
        raise NemoValueError(
            f"skip_first_blocks={config.skip_first_blocks} excludes every layer that "
            f"target_modules={config.target_modules!r} matches: the model has {layers[-1].block + 1} blocks."
        )
    return chosen


def exclusion_reason(layer: MaskableLayer, config: ModularConfig) -> str:
    """Why a config does not select a layer."""
    reason = _unmaskable(layer, config)
    if reason is not None:
        return reason
    if not _matches(layer, config.target_modules):
        return f"not among target_modules={config.target_modules!r}"
    return f"in one of the first {config.skip_first_blocks} blocks, which skip_first_blocks leaves out"


def _unmaskable(layer: MaskableLayer, config: ModularConfig) -> str | None:
    """Why a layer cannot carry the gates of a config, wherever the config wants them."""
    if layer.reason is None and config.gate == "activation" and layer.activation is None:
        return "no activation that is zero at zero is its own, as gate='activation' needs"
    return layer.reason


def _matches(layer: MaskableLayer, targets: str | list[str]) -> bool:
    if isinstance(targets, list):
        return any(layer.name == target or layer.name.endswith(f".{target}") for target in targets)
    if targets in LAYER_GROUPS:
        return targets in ("all", layer.group)
    return re.fullmatch(targets, layer.name) is not None


def _with_own_activations(model: nn.Module, layers: list[MaskableLayer]) -> list[MaskableLayer]:
    """Leave an activation only to a layer that has it alone, with zeros where its neurons are closed."""

    def owned(path: str | None) -> nn.Module | None:
        found = None if path is None else model.get_submodule(path)
        return None if isinstance(found, nn.Identity) or constant_at_zero(model, path) != 0 else found

    activations = [owned(layer.activation) for layer in layers]
    times = collections.Counter(map(id, activations))
    return [
        dataclasses.replace(layer, activation=layer.activation if found and times[id(found)] == 1 else None)
        for layer, found in zip(layers, activations, strict=True)
    ]


def _attention_layers(model: nn.Module, block: int, part: Attention) -> Iterator[MaskableLayer]:
    normalised = (
        f"{type(model.get_submodule(part.unit_norms[0])).__name__} normalises the units of each head, so that single "
        "ones cannot be removed"
        if part.unit_norms
        else None
    )
    for role in ATTENTION_ROLES:
        path: str = getattr(part, role)
        reason = part.reasons.get(role, None if path in (part.value, part.output) else normalised)
        yield MaskableLayer(
            path, block, "attention", windowed=part.windowed, remembered=role != "output", reason=reason
        )


def _feed_forward_layers(model: nn.Module, block: int, part: FeedForward) -> Iterator[MaskableLayer]:
    reason = None
    if part.gate is None and model.get_submodule(part.down).bias is None:
        if part.depthwise is not None or constant_at_zero(model, part.activation) != 0:
            reason = f"what a removed unit leaves behind the activation needs a bias of {part.down}"
    activated = (part.gate or part.up) if part.gate != part.up else None
    for path in (part.gate, part.up):
        if path is not None:
            activation = part.activation if path == activated else None
            yield MaskableLayer(path, block, "ffn", remembered=True, activation=activation, reason=reason)
    yield MaskableLayer(part.down, block, "ffn")


def _chain_layers(model: nn.Module, block: int, part: Chain) -> Iterator[MaskableLayer]:
    layers = [model.get_submodule(step.layer) for step in part.steps]
    for i, (step, layer) in enumerate(zip(part.steps, layers, strict=True)):
        following = layers[i + 1] if i + 1 < len(layers) else None
        reason = None
        if following is not None and is_depthwise(following):
            reason = f"shares the gates of {part.steps[i + 1].layer}, which follows it channel by channel"
        elif i == 0 and layer_groups(layer) > 1:
            reason = "reads the residual stream in groups of channels, which keeps its width"
        elif following is None and part.reader is None and layer_groups(layer) > 1:
            reason = "writes to the residual stream in groups of channels"
        elif (following is not None or part.reader) and constant_at_zero(model, step.activation) != 0:
            name = type(model.get_submodule(step.activation)).__name__
            reason = f"a closed channel is not zero behind {name}, whose output for zero is not zero"
        yield MaskableLayer(
            step.layer,
            block + (0 if part.path else i),
            "ffn" if isinstance(layer, nn.Linear) else "convolution",
            norm=step.norm,
            activation=step.activation,
            reason=reason,
        )
