# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`place_heads`]: which units of q, k and v a module keeps, and in which heads they are there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .architectures import Attention
from .slicing import PADDING, padded, padded_heads, per_query_head


HEAD_COST = 4  # the softmax of a head takes about as long as four of its units in q, k and v (384 wide, 64 tokens)


@dataclass(frozen=True)
class Heads:
    """
    The heads of a module. With grouped-query attention "head" is a head of keys and values; the query heads that share
    it go with it.

    Args:
        kept (`torch.Tensor` of shape `(num_heads,)`): which head of the parent each one is; [`PADDING`] for one that
            is empty, or has units of several.
        size (`int`): units of q and k per head.
        value_size (`int`): units of v per head.
        query, key, value (`torch.Tensor`): head after head the positions of its units in the projection of the parent,
            or [`PADDING`]. Those of `query` are of all query heads.
        output (`torch.Tensor`): the columns of the layer that reads the heads.
        rotary (`torch.Tensor` of shape `(size,)`, *optional*): which columns of cos and sin belong to the units, where
            these are not all.
    """

    kept: torch.Tensor
    size: int
    value_size: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    rotary: torch.Tensor | None


def place_heads(
    part: Attention,
    gates: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    head_size: int,
    stock: tuple[int | None, int | None] | None = None,
    share: bool = True,
) -> Heads:
    """
    Units of q ∧ k and of v per head, all heads of the layer padded to one size, heads without v dropped. Heads without
    q ∧ k attend to all tokens alike, so that their units of v may share heads.

    Args:
        part ([`~nemo_hf.architectures.Attention`]): what is special about the attention.
        gates (`tuple[torch.Tensor, ...]`): the constant gates of q, k and v, zero for removed units.
        head_size (`int`): units per head of the parent.
        stock (`tuple[int, int]`, *optional*): a number of heads and their size that is prescribed; `None`: as many, or
            as large, as in the parent.
        share (`bool`, *optional*, defaults to `True`): whether units of v may move to another head.
    """
    num_heads, per_head = len(gates[1]) // head_size, len(gates[0]) // len(gates[1])
    query = (gates[0] > 0).view(num_heads, per_head, head_size)
    key, value = ((gate > 0).view(num_heads, head_size) for gate in gates[1:])
    kept = value.any(1).nonzero().flatten()
    if part.shared_head_bias is not None or (stock and stock[0] is None):
        kept = torch.arange(num_heads)
    elif len(kept) == 0:
        kept = torch.tensor([0])  # transformers' attention needs a head: zero units, whose output is zero
    scores = _score_units(part, query, key, kept)
    moving = kept[~scores[kept].any(1)] if share and _only_scores_differ(part) else kept[:0]
    moving = moving if len(moving) > 1 else kept[:0]
    own = kept[~torch.isin(kept, moving)]
    size, value_size = (max([1, *units[own].sum(1).tolist()]) for units in (scores, value))
    if not part.own_value_size:
        size = value_size = max(size, value_size)
    if part.rotary:
        size = value_size = size + size % 2
    moved = (moving[:, None] * head_size + torch.arange(head_size))[value[moving]]
    if len(moved):
        number, size = _shared_heads(len(moved), len(own), size, head_size, len(moving))
        kept, value_size = padded(own, len(own) + number), size
    if stock:
        size = value_size = stock[1] or head_size
        kept = padded(kept, stock[0] or num_heads)
    units, rotary = _score_positions(part, scores, own, size)
    values = torch.cat([padded_heads(value, own, value_size), moved])
    units, values = padded(units, len(kept) * size), padded(values, len(kept) * value_size)
    return Heads(
        kept=kept,
        size=size,
        value_size=value_size,
        query=per_query_head(units, per_head, head_size, size),
        key=units,
        value=values,
        output=per_query_head(values, per_head, head_size, value_size),
        rotary=rotary,
    )


def _score_units(part: Attention, query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Units of the score product that are needed, `(num_heads, head_size)`."""
    if part.unit_norms:
        return torch.ones_like(key)
    if part.cosine:
        return key | query.any(1)  # a unit that only one side has is part of that side's norm
    if not part.rotary:
        return key & query.any(1)  # a unit counts only if both sides have it
    # A rotation mixes units i and i + head_size / 2, and all heads of the layer share its angles.
    half = key.shape[1] // 2
    pairs = key.view(-1, 2, half).any(1) & query.any(1).view(-1, 2, half).any(1)
    return pairs[kept].any(0).repeat(2).expand_as(key)


def _only_scores_differ(part: Attention) -> bool:
    """
    Whether heads without units of q and k are all the same but for their v. With norms of q and k no head is without.
    """
    special = part.rotary or part.cosine or part.own_value_size
    return not (special or part.head_biases or part.head_rows or part.shared_head_bias)


def _shared_heads(num_units: int, num_own: int, smallest: int, largest: int, most: int) -> tuple[int, int]:
    """
    How many heads of which size cost least, all together.

    Args:
        num_units (`int`): units of v that may be in any head.
        num_own (`int`): heads that have units of their own.
        smallest, largest (`int`): limits of the size.
        most (`int`): as many heads may hold the units.
    """
    choices = [(-(-num_units // size), size) for size in range(smallest, largest + 1)]
    return min(
        (choice for choice in choices if choice[0] <= most),
        key=lambda choice: (num_own + choice[0]) * (HEAD_COST + choice[1]),
    )


def _score_positions(
    part: Attention, scores: torch.Tensor, own: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The units of the score product of some heads, and their columns of cos and sin where these are not all."""
    head_size = scores.shape[1]
    if not part.rotary or size == head_size:
        keep = torch.ones_like(scores) if part.rotary or part.unit_norms else scores
        return padded_heads(keep, own, size), None
    pairs = scores[0, : head_size // 2].nonzero().flatten()
    unit = torch.full((2, size // 2), PADDING)
    unit[0, : len(pairs)], unit[1, : len(pairs)] = pairs, pairs + head_size // 2
    unit = unit.flatten()
    return torch.where(unit == PADDING, PADDING, own[:, None] * head_size + unit).flatten(), unit.clamp(min=0)
