# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The stock layout: one size for all blocks, as far as the configuration of the plain class can say it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from .cutting import Cutter, StockSizes
from .errors import UnsupportedModelError
from .maskable import maskable_layers
from .resolution import resolve_architecture


def why_not_stock(model: PreTrainedModel, held: Mapping[str, torch.Tensor]) -> str | None:
    """
    Why a module cannot have the stock layout; `None` if it can.

    Args:
        model (`PreTrainedModel`): the parent.
        held (`Mapping[str, torch.Tensor]`): the constant gates of its masked layers.
    """
    if resolve_architecture(model).stock is None:
        return f"the configuration of {type(model).__name__} cannot say the sizes of a module. Use layout='ragged'"
    layers = maskable_layers(model)
    whole = {layer.block for layer in layers} - {layer.block for layer in layers if layer.name in held}
    if whole:
        return (
            f"it gives all blocks one size, but block {min(whole)} has no masks and keeps all its neurons. Train with "
            "ModularConfig(skip_first_blocks=0), or use layout='ragged'"
        )
    return None


def stock_sizes(model: PreTrainedModel, held: Mapping[str, torch.Tensor]) -> StockSizes:
    """
    The smallest sizes into which every block of a module fits.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: if it cannot have the stock layout.
    """
    reason = why_not_stock(model, held)
    if reason is not None:
        raise UnsupportedModelError(f"There is no stock layout for this module: {reason}.")
    layout = resolve_architecture(model).stock
    cutter = Cutter(model, held, share_heads=False)
    cutter.cut_parts()
    num_heads = max((number for number, _ in cutter.head_sizes), default=0)
    if layout.divides:
        while model.config.hidden_size % (num_heads * _heads_per_group(model)):
            num_heads += 1
    return StockSizes(
        num_heads=num_heads if layout.num_heads else None,
        head_size=max(size for _, size in cutter.head_sizes) if layout.cuts_units else None,
        intermediate_size=max(cutter.hidden_sizes) if layout.intermediate_size else None,
    )


def stock_values(model: PreTrainedModel, sizes: StockSizes) -> dict[str, int]:
    """The values of the configuration that say these sizes."""
    layout, config = resolve_architecture(model).stock, model.config
    values = {}
    if layout.intermediate_size:
        values[layout.intermediate_size] = sizes.intermediate_size
    if layout.num_heads:
        num_heads = getattr(config, layout.num_heads)
        head_size = getattr(config, layout.head_size, None) or config.hidden_size // num_heads
        values[layout.head_size] = sizes.head_size or head_size
        values[layout.num_heads] = sizes.num_heads * _heads_per_group(model)
    if layout.num_key_value_heads:
        values[layout.num_key_value_heads] = sizes.num_heads
    return values


def _heads_per_group(model: PreTrainedModel) -> int:
    """Query heads that share one head of keys and values."""
    layout = resolve_architecture(model).stock
    if layout.num_key_value_heads is None:
        return 1
    return getattr(model.config, layout.num_heads) // getattr(model.config, layout.num_key_value_heads)
