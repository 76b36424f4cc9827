# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Pure functions that cut the tensors of layers: rows, columns, groups, padded heads, folded constants."""

from __future__ import annotations

import torch


PADDING = -1  # in an index of rows or columns: a position that stays zero


def take_rows(tensor: torch.Tensor, index: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
    """
    Output units of a weight or a bias, each multiplied by its constant gate.

    Args:
        tensor (`torch.Tensor` of shape `(out_features, ...)`): a weight or a bias.
        index (`torch.Tensor` of shape `(kept,)`): the units to keep, in order; [`PADDING`] gives a zero unit.
        gates (`torch.Tensor` of shape `(out_features,)`, *optional*): what multiplies each unit.

    Returns:
        `torch.Tensor` of shape `(kept, ...)`.
    """
    scale = torch.ones(tensor.shape[0]) if gates is None else gates
    scale = torch.where(index == PADDING, 0.0, scale.float()[index.clamp(min=0)]).to(tensor.device, tensor.dtype)
    rows = tensor[index.clamp(min=0).to(tensor.device)]
    return rows * scale.view(-1, *[1] * (tensor.dim() - 1))


def take_columns(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    Inputs of a weight of shape `(outputs, inputs, ...)`; [`PADDING`] gives a zero input.

    Returns:
        `torch.Tensor` of shape `(outputs, kept, ...)`.
    """
    return take_rows(weight.transpose(0, 1), index).transpose(0, 1).contiguous()


def take_groups(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """
    Outputs and inputs of a grouped convolution.

    Args:
        weight (`torch.Tensor` of shape `(outputs, inputs_per_group, height, width)`): the weight.
        rows (`torch.Tensor` of shape `(groups, kept_outputs)`): channels of the output, all of one group in one row,
            or [`PADDING`].
        columns (`torch.Tensor` of shape `(groups, kept_inputs)`): the same for the input.

    Returns:
        `torch.Tensor` of shape `(groups * kept_outputs, kept_inputs, height, width)`.
    """
    inputs_per_group = weight.shape[1]
    taken = []
    for group_rows, group_columns in zip(rows, columns, strict=True):
        local = torch.where(group_columns == PADDING, PADDING, group_columns % inputs_per_group)
        taken.append(take_columns(take_rows(weight, group_rows), local))
    return torch.cat(taken)


def padded_heads(keep: torch.Tensor, heads: torch.Tensor, size: int) -> torch.Tensor:
    """
    The index of the kept units of some heads, every head padded to one size.

    Args:
        keep (`torch.Tensor` of shape `(num_heads, head_size)`): booleans.
        heads (`torch.Tensor` of shape `(kept_heads,)`): the heads, in order.
        size (`int`): units per head in the result; at least the largest number of kept units.

    Returns:
        `torch.Tensor` of shape `(kept_heads * size,)`: positions in the flattened heads, or [`PADDING`].
    """
    index = torch.full((len(heads), size), PADDING)
    for row, head in enumerate(heads.tolist()):
        units = keep[head].nonzero().flatten()
        index[row, : len(units)] = head * keep.shape[1] + units
    return index.flatten()


def padded(index: torch.Tensor, size: int) -> torch.Tensor:
    """An index with [`PADDING`] behind it, of shape `(size,)`."""
    return torch.cat([index, index.new_full((size - len(index),), PADDING)])


def per_query_head(index: torch.Tensor, per_group: int, head_size: int, size: int) -> torch.Tensor:
    """
    The index of units of keys or values, repeated for the query heads that share them.

    Args:
        index (`torch.Tensor` of shape `(groups * size,)`): units of keys or values, or [`PADDING`].
        per_group (`int`): query heads that share a head of keys and values.
        head_size (`int`): units of a head before cutting.
        size (`int`): units of a head in `index`.

    Returns:
        `torch.Tensor` of shape `(groups * per_group * size,)`.
    """
    heads = index.view(-1, 1, size).expand(-1, per_group, -1)
    first = (heads // head_size * per_group + torch.arange(per_group)[:, None]) * head_size
    return torch.where(heads == PADDING, PADDING, first + heads % head_size).flatten()


def folded_bias(
    weight: torch.Tensor, bias: torch.Tensor | None, dropped: torch.Tensor, constants: torch.Tensor
) -> torch.Tensor | None:
    """
    The bias of a layer whose dropped inputs had constant values: what they contributed moves into the bias.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): the uncut weight.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): its bias.
        dropped (`torch.Tensor` of shape `(in_features,)`): booleans.
        constants (`torch.Tensor` of shape `(in_features,)`): the values of the inputs where they are dropped.

    Returns:
        `torch.Tensor` of shape `(out_features,)`, or `None` where there was no bias and no constant.
    """
    if weight.is_meta:
        return bias  # only shapes are asked for
    values = torch.where(dropped.to(weight.device), constants.to(weight.device, weight.dtype), 0)
    if not values.any():
        return bias
    return weight.detach() @ values + (0 if bias is None else bias)  # the column that is folded leaves the module
