# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Cut the parts of a model: the tensors of a slim model and its shapes, from live layers and constant gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import Attention, Chain, FeedForward
from .heads import place_heads
from .resolution import (
    constant_at_zero,
    is_depthwise,
    is_grouped,
    resolve_parts,
    resolve_streams,
)
from .slicing import PADDING, folded_bias, padded, padded_heads, take_columns, take_groups, take_rows
from .slim import layer_sizes


@dataclass(frozen=True)
class StockSizes:
    """One size for all blocks; `None` where the parent's stays. Heads are those of keys and values."""

    num_heads: int | None = None
    head_size: int | None = None
    intermediate_size: int | None = None


def cut(
    model: PreTrainedModel,
    held: Mapping[str, torch.Tensor],
    heads: Sequence[str],
    label_ids: Sequence[int],
    stock: StockSizes | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Cut a model.

    Args:
        model (`PreTrainedModel`): the parent, which is not changed.
        held (`Mapping[str, torch.Tensor]`): layer name → constant gates of shape `(num_neurons,)`, zero for removed
            neurons. Layers that are missing keep all neurons.
        heads (`Sequence[str]`): the linear layers whose rows are the labels.
        label_ids (`Sequence[int]`): the rows to keep, in order.
        stock ([`StockSizes`], *optional*): pad all blocks to these sizes, and zero the rows of residual writes instead
            of scattering them.

    Returns:
        The state dict of the slim model, and the shapes with which [`~nemo_hf.slim.resize_layers`] makes room for it
        (none for stock sizes, which the configuration says).
    """
    cutter = Cutter(model, held, stock, share_heads=stock is None)
    cutter.cut_classifiers(heads, torch.tensor(label_ids))
    cutter.cut_parts()
    shapes = {} if stock else {kind: entries for kind, entries in cutter.shapes.items() if entries}
    return cutter.tensors, shapes


class Cutter:
    """Reads the live layers of one model, writes sliced tensors and shapes."""

    def __init__(
        self,
        model: PreTrainedModel,
        held: Mapping[str, torch.Tensor],
        stock: StockSizes | None = None,
        share_heads: bool = True,
    ):
        self.model = model
        self.held = held
        self.stock = stock
        self.share_heads = share_heads  # whether units of v may move to another head
        self.head_sizes: list[tuple[int, int]] = []  # per attention: heads of keys and values, and their size
        self.hidden_sizes: list[int] = []  # per feed-forward layers
        self.heads: set[str] = set()
        # The parameters themselves: whether one of them reaches a module shows in its gradient.
        tensors = model.state_dict(keep_vars=True)
        self.tensors = {name: tensor for name, tensor in tensors.items() if ".mask_generator." not in name}
        # Layer → the channels of a residual stream, true where any layer still writes: what it reads, and writes to.
        self.reads: dict[str, torch.Tensor] = {}
        self.writes: dict[str, torch.Tensor] = {}
        for stream in resolve_streams(model):
            written = torch.stack([self.gates(name) > 0 for name in stream.writers]).any(0)
            written[0] |= ~written.any()  # it cannot be empty
            self.reads.update(dict.fromkeys(stream.readers, written))
            self.writes.update(dict.fromkeys(stream.writers, written))
        self.shapes: dict[str, Any] = {
            "layers": {},
            "scatter": {},
            "attributes": {},
            "parameters": {},
            "rotary": {},
        }

    def cut_parts(self) -> None:
        """Cut all that the architecture table names."""
        for _, part in resolve_parts(self.model):
            if isinstance(part, Attention):
                self.cut_attention(part)
            elif isinstance(part, FeedForward):
                self.cut_feed_forward(part)
            else:
                self.cut_chain(part)

    def gates(self, name: str) -> torch.Tensor:
        """Constant gates of a layer; ones where it is not masked."""
        return self.held.get(name, torch.ones(layer_sizes(self.model.get_submodule(name))[1]))

    # ---- Attention ----

    def cut_attention(self, part: Attention) -> None:
        """The units that [`place_heads`] keeps, and what else belongs to heads."""
        owner = self.model.get_submodule(part.layer)
        head_size: int = getattr(owner, part.head_size[0])
        gates = self._projection_gates(part, layer_sizes(self.model.get_submodule(part.output))[0])
        stock = (self.stock.num_heads, self.stock.head_size) if self.stock else None
        heads = place_heads(part, gates, head_size, stock, self.share_heads)
        self.head_sizes.append((len(heads.kept), heads.size))
        scale = math.sqrt(heads.size / head_size) if part.inline_scale or self.stock else 1.0
        self._write_projections(part, (heads.query, heads.key, heads.value), (gates[0] * scale, *gates[1:]))
        self._residual_write(part.output, heads.output)
        if heads.rotary is not None:
            self.tensors[f"{part.layer}.rotary_index"] = heads.rotary
            self.shapes["rotary"][part.layer] = heads.size
        per_head = len(gates[0]) // len(gates[1])  # query heads that share a head of keys and values
        num_heads, old_heads = len(heads.kept) * per_head, len(gates[0]) // head_size
        if (num_heads, heads.size) != (old_heads, head_size):
            sizes = {part.num_heads: num_heads, part.head_size: heads.size, part.all_head_size: num_heads * heads.size}
            names = {name: size for attributes, size in sizes.items() for name in attributes}
            self.shapes["attributes"][part.layer] = names
        if not torch.equal(heads.kept, torch.arange(len(gates[1]) // head_size)):
            kept = heads.kept[:, None] * per_head + torch.arange(per_head)
            self._cut_heads(part, torch.where(heads.kept[:, None] == PADDING, PADDING, kept).flatten(), old_heads)

    def _cut_heads(self, part: Attention, heads: torch.Tensor, num_heads: int) -> None:
        """What else belongs to single heads: only that of the kept ones."""
        for name in part.head_biases:
            self.tensors[name] = take_columns(self.tensors[name], heads)
            self.shapes["parameters"][name] = list(self.tensors[name].shape)
        for name in part.head_rows:
            is_parameter = name in self.tensors
            per_head = len(self.tensors[name if is_parameter else f"{name}.weight"]) // num_heads
            rows = heads[:, None] * per_head + torch.arange(per_head)
            rows = torch.where(heads[:, None] == PADDING, PADDING, rows).flatten()
            if is_parameter:
                self.tensors[name] = take_rows(self.tensors[name], rows)
                self.shapes["parameters"][name] = list(self.tensors[name].shape)
            else:
                self._cut_layer(name, rows=rows)

    def _projection_gates(self, part: Attention, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if part.query == part.key:
            return tuple(self.gates(part.query).split(width))
        return self.gates(part.query), self.gates(part.key), self.gates(part.value)

    def _write_projections(
        self, part: Attention, indices: tuple[torch.Tensor, ...], gates: tuple[torch.Tensor, ...]
    ) -> None:
        if part.query != part.key:
            for name, index, gate in zip((part.query, part.key, part.value), indices, gates, strict=True):
                filled = index != PADDING
                if self.stock or 2 * filled.sum() > len(index):
                    self._cut_layer(name, rows=index, gates=gate)
                else:  # mostly padding: computing the units that are there and scattering them is faster, and smaller
                    self._cut_layer(name, rows=index[filled], gates=gate)
                    self._scatter(name, filled.nonzero().flatten(), len(index))
            return
        shifted = [
            torch.where(index == PADDING, PADDING, index + i * len(gates[0])) for i, index in enumerate(indices)
        ]
        self._cut_layer(part.query, rows=torch.cat(shifted), gates=torch.cat(gates))

    # ---- Feed-forward layers ----

    def cut_feed_forward(self, part: FeedForward) -> None:
        """Hidden units leave all layers; what a removed unit contributes after the activation moves into the bias."""
        units = layer_sizes(self.model.get_submodule(part.down))[0]
        constants = torch.full((units,), constant_at_zero(self.model, part.activation))
        if part.gate is None:
            kept = self.gates(part.up) > 0
        else:
            fused = part.gate == part.up
            gate, up = self.gates(part.up).split(units) if fused else (self.gates(part.gate), self.gates(part.up))
            # The activated side closes a unit only if its activation is zero there.
            kept = (up > 0) & ((gate > 0) | (constants != 0))
            constants = torch.zeros(units)
        if part.depthwise is not None:
            bias = self.tensors.get(f"{part.depthwise}.bias")
            if bias is not None:
                constants = self.model.get_submodule(part.activation)(bias).detach().cpu()
        if self.stock and self.stock.intermediate_size is None:
            kept = torch.ones_like(kept)  # zeroed by their gates, not removed
        name = f"{part.down}.bias"
        bias = folded_bias(self._weight(part.down), self.tensors.get(name), ~kept, constants)
        if bias is not None:
            self.tensors[name] = bias
        rows = _never_empty(self.model.get_submodule(part.down), kept.nonzero().flatten())
        self.hidden_sizes.append(max(1, len(rows)))
        if self.stock and self.stock.intermediate_size:
            rows = padded(rows, self.stock.intermediate_size)
        if part.depthwise is not None:
            rows = _never_empty(self.model.get_submodule(part.depthwise), rows)
            self._cut_layer(part.depthwise, rows, units, rows)
        for path in dict.fromkeys((part.gate, part.up)):
            if path is not None:
                fused = layer_sizes(self.model.get_submodule(path))[1] > units
                second = torch.where(rows == PADDING, PADDING, rows + units)
                self._cut_layer(path, rows=torch.cat([rows, second]) if fused else rows, gates=self.gates(path))
        self._residual_write(part.down, rows)

    # ---- Convolutions ----

    def _read_stream(self, name: str) -> tuple[torch.Tensor | None, int]:
        """The channels that are left in what a layer reads, and how many there were; `None`: all."""
        written = self.reads.get(name)
        return (None, 0) if written is None else (written.nonzero().flatten(), len(written))

    def cut_chain(self, part: Chain) -> None:
        """The kept channels of each step are the rows of its convolution and norm and the columns of the next one."""
        rows, groups = self._channels(part)
        inputs, width = self._read_stream(part.steps[0].layer)
        for i, step in enumerate(part.steps):
            gates = self.gates(step.layer)
            self._cut_layer(step.layer, inputs, width, rows[i], None if step.norm else gates, groups[i])
            if step.norm:
                self._cut_norm(step.norm, rows[i], gates)
            inputs, width = rows[i], len(gates)
            if step.squeeze_excite:
                reduce, expand = step.squeeze_excite
                self._cut_layer(reduce, inputs, width)
                self._cut_layer(expand, rows=inputs)
        if part.reader is not None:
            self._cut_layer(part.reader, inputs, width)
        else:
            last = part.steps[-1]
            written = self.writes.get(last.layer)
            places = inputs
            if written is not None:  # among the channels that are left; that of a zero channel may be PADDING still
                places, width = (written.cumsum(0) - 1)[inputs.clamp(min=0)], int(written.sum())
            self._scatter(last.norm or last.layer, places, width)

    def _channels(self, part: Chain) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor] | None]]:
        """Per step the index of its kept channels, and for a grouped convolution its outputs and inputs by group."""
        layers = [self.model.get_submodule(step.layer) for step in part.steps]
        kept = [self.gates(step.layer) > 0 for step in part.steps]
        rows = [keep.nonzero().flatten() for keep in kept]
        groups: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(layers)
        for i in reversed(range(len(layers))):
            rows[i] = _never_empty(layers[i], rows[i])
            if i and is_depthwise(layers[i]):
                rows[i - 1] = rows[i]
                kept[i - 1] = kept[i]
            elif i and is_grouped(layers[i]):
                outputs, inputs = (keep.view(layers[i].groups, -1) for keep in (kept[i], kept[i - 1]))
                needed = outputs.any(1).nonzero().flatten()
                needed = needed if len(needed) else torch.tensor([0])
                rows[i], rows[i - 1] = (
                    padded_heads(keep, needed, max(1, int(keep[needed].sum(1).max()))) for keep in (outputs, inputs)
                )
                groups[i] = rows[i].view(len(needed), -1), rows[i - 1].view(len(needed), -1)
        return rows, groups

    # ---- Layers ----

    def cut_classifiers(self, names: Sequence[str], rows: torch.Tensor) -> None:
        """The rows of classifiers, whose number follows `num_labels` and needs no note, and what they read."""
        self.heads.update(names)
        for name in names:
            inputs, width = self._read_stream(name)
            self._cut_layer(name, inputs, width, rows)

    def _weight(self, name: str) -> torch.Tensor:
        """The weight of a layer as `(outputs, inputs, ...)`."""
        weight = self.tensors[f"{name}.weight"]
        return weight.T if isinstance(self.model.get_submodule(name), Conv1D) else weight

    def _cut_layer(
        self,
        name: str,
        inputs: torch.Tensor | None = None,
        width: int = 0,
        rows: torch.Tensor | None = None,
        gates: torch.Tensor | None = None,
        groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """
        Take inputs and outputs of a layer.

        Args:
            name (`str`): the layer.
            inputs (`torch.Tensor`, *optional*): the kept inputs; all by default.
            width (`int`, *optional*): of how many. A linear layer behind flattened channels reads several features of
                each.
            rows (`torch.Tensor`, *optional*): the kept outputs; all by default.
            gates (`torch.Tensor`, *optional*): what multiplies each output.
            groups (`tuple[torch.Tensor, torch.Tensor]`, *optional*): outputs and inputs by group, for a grouped
                convolution.
        """
        layer, weight = self.model.get_submodule(name), self._weight(name)
        bias = self.tensors.get(f"{name}.bias")
        if rows is None:
            rows = torch.arange(weight.shape[0])
        if groups is not None:
            weight = take_groups(weight, *groups)
            weight = weight if gates is None else take_rows(weight, torch.arange(len(rows)), gates[rows.clamp(min=0)])
        else:
            if inputs is not None and not is_depthwise(layer):
                features = weight.shape[1] // width
                spread = inputs[:, None] * features + torch.arange(features)
                weight = take_columns(weight, torch.where(inputs[:, None] == PADDING, PADDING, spread).flatten())
            weight = take_rows(weight, rows, gates)
        self.tensors[f"{name}.weight"] = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
        if bias is not None:
            self.tensors[f"{name}.bias"] = take_rows(bias, rows, gates)
        sizes, old = [weight.shape[1], weight.shape[0]], list(layer_sizes(layer))
        if isinstance(layer, nn.Conv2d):
            number = len(groups[0]) if groups is not None else len(rows) if is_depthwise(layer) else layer.groups
            sizes, old = [sizes[0] * number, sizes[1], number], [*old, layer.groups]
        if name in self.heads:
            sizes, old = sizes[:1], old[:1]
        if sizes != old:
            self.shapes["layers"][name] = sizes

    def _cut_norm(self, name: str, rows: torch.Tensor, gates: torch.Tensor) -> None:
        """The kept channels of a batch norm, its output multiplied by the gates."""
        for part, scale in (("weight", gates), ("bias", gates), ("running_mean", None), ("running_var", None)):
            if f"{name}.{part}" in self.tensors:
                self.tensors[f"{name}.{part}"] = take_rows(self.tensors[f"{name}.{part}"], rows, scale)
        if len(rows) != len(gates):
            self.shapes["layers"][name] = [len(rows)]

    def _residual_write(self, name: str, inputs: torch.Tensor) -> None:
        """A linear layer that writes to the residual stream: only the kept outputs, scattered to its full width."""
        gates = self.gates(name)
        rows = _never_empty(self.model.get_submodule(name), (gates > 0).nonzero().flatten())
        if self.stock:
            rows = torch.arange(len(gates))
        self._cut_layer(name, inputs, layer_sizes(self.model.get_submodule(name))[0], rows, gates)
        self._scatter(name, rows, len(gates))

    def _scatter(self, name: str, rows: torch.Tensor, width: int) -> None:
        """Put a cut layer inside one that scatters its outputs to a wider output."""
        if len(rows) == width:
            return
        inner = "layer" if isinstance(self.model.get_submodule(name), nn.Conv2d | nn.BatchNorm2d) else "linear"
        for old in [tensor for tensor in self.tensors if tensor.startswith(f"{name}.")]:
            self.tensors[f"{name}.{inner}.{old[len(name) + 1 :]}"] = self.tensors.pop(old)
        self.tensors[f"{name}.index"] = rows.clamp(min=0)
        self.shapes["scatter"][name] = width


def _never_empty(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A linear layer may be empty; a convolution and a `Conv1D` cannot compute without one zero channel."""
    needs_one = isinstance(layer, nn.Conv2d | Conv1D) and len(rows) == 0
    return torch.tensor([PADDING]) if needs_one else rows
