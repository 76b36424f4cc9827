# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Masked layers: a linear layer, a generator of one gate per sample and neuron, and what all of them share."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from .errors import NemoRuntimeError, NemoValueError


PAPER_WIDTH_LIMIT = 3072  # up to here the paper's generators are as wide as the layer, from here half as wide
OPEN_BIAS = 3.0  # tanh(3) = 0.995
OPEN_NOISE = 0.1


class MaskState:
    """
    What the masked layers of one model share during a forward pass: which tokens are real, where gates are recorded,
    and gates that are held constant.

    A pre-hook of the model fills in the tokens; they stay until the next forward pass, because gradient checkpointing
    computes gates again during the backward pass. Plain Python attributes: nothing of this enters the state dict.

    Args:
        mask_position (`int` or `None`): position of `attention_mask` among the positional arguments of the model's
            forward.
    """

    def __init__(self, mask_position: int | None):
        self.mask_position = mask_position
        self.token_weights: torch.Tensor | None = None  # (batch_size, 1, sequence_length), each row sums to one
        self.recorded: dict[str, torch.Tensor] | None = None
        self.held: dict[str, torch.Tensor] | None = None

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: remember which tokens of this batch are real, and start a new record."""
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_position is not None and len(args) > self.mask_position:
            mask = args[self.mask_position]
        if mask is not None and mask.dim() != 2:
            raise NemoValueError(
                "A masked model needs an attention_mask of shape (batch_size, sequence_length) to know its padding, "
                f"got shape {tuple(mask.shape)}."
            )
        self.token_weights = None if mask is None else (mask / mask.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(1)
        if self.recorded is not None:
            self.recorded.clear()

    def token_mean(self, inputs: torch.Tensor) -> torch.Tensor:
        """The mean over real tokens: `(batch_size, tokens, features)` → `(batch_size, features)`."""
        if inputs.dim() == 2:
            return inputs
        if self.token_weights is None:
            return inputs.mean(1)
        if self.token_weights.shape[-1] != inputs.shape[1]:
            raise NemoRuntimeError(
                f"A masked layer got {inputs.shape[1]} tokens but the attention_mask has "
                f"{self.token_weights.shape[-1]}. Gates need whole sequences: switch off `chunk_size_feed_forward` "
                "and anything else that splits them."
            )
        return torch.bmm(self.token_weights.to(inputs.dtype), inputs).squeeze(1)

    def record(self, name: str, gates: torch.Tensor) -> None:
        """Keep the gates of a layer if somebody asked for them with `record_masks`."""
        if self.recorded is not None:
            self.recorded[name] = gates


class _StraightThroughStep(torch.autograd.Function):
    """`1[x > 0]` forward; backward as if it were tanh, on both sides of zero, so that closed gates can open again."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return (logits > 0).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (logits,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(logits).square())


class MaskGenerator(nn.Module):
    """
    Computes one gate per sample and neuron from the mean input of a layer: `relu(tanh(W2 · relu(W1 · x + b1) + b2))`
    (NeMo, arXiv 2508.11348, section 3).

    Args:
        in_features (`int`): size of the layer's input.
        num_neurons (`int`): number of gates.
        hidden_size (`int` or `None`): width between the two; `None` takes the paper's.
        init (`"open"` or `"paper"`): see [`~nemo_hf.ModularConfig`].
        gate (`"soft"` or `"hard"`): see [`~nemo_hf.ModularConfig`].

    Returns:
        `torch.Tensor` of shape `(batch_size, num_neurons)` with values in [0, 1], for an input of shape
        `(batch_size, in_features)`.
    """

    def __init__(
        self,
        in_features: int,
        num_neurons: int,
        hidden_size: int | None,
        init: Literal["open", "paper"],
        gate: Literal["soft", "hard"],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_size is None:
            hidden_size = num_neurons if num_neurons <= PAPER_WIDTH_LIMIT else num_neurons // 2
        self.reduce = nn.Linear(in_features, hidden_size, device=device, dtype=dtype)
        self.expand = nn.Linear(hidden_size, num_neurons, device=device, dtype=dtype)
        self.gate = gate
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: Literal["open", "paper"]) -> None:
        """Draw new weights; see [`~nemo_hf.ModularConfig`] for the two ways."""
        nn.init.kaiming_normal_(self.reduce.weight, nonlinearity="relu")
        if init == "paper":
            nn.init.kaiming_normal_(self.expand.weight, nonlinearity="relu")
            nn.init.ones_(self.reduce.bias)
            nn.init.ones_(self.expand.bias)
        else:
            nn.init.zeros_(self.reduce.bias)
            nn.init.normal_(self.expand.weight, std=OPEN_NOISE / math.sqrt(self.reduce.out_features))
            nn.init.constant_(self.expand.bias, OPEN_BIAS)

    def forward(self, mean_inputs: torch.Tensor) -> torch.Tensor:
        logits = self.expand(torch.relu(self.reduce(mean_inputs)))
        if self.gate == "hard":
            return _StraightThroughStep.apply(logits)
        return torch.relu(torch.tanh(logits))


class MaskedLinear(nn.Linear):
    """
    A linear layer whose outputs are multiplied by gates, bias included: `y = (x Wᵀ + b) ⊙ m`.

    It takes over the parameters of the layer that it replaces, under their names; `mask_generator` comes on top.

    Args:
        linear (`nn.Linear`): the layer to replace.
        name (`str`): its name in the model, the key under which its gates are recorded.
        state ([`MaskState`]): shared by the masked layers of the model.
        mask_generator ([`MaskGenerator`]): computes the gates.
    """

    def __init__(self, linear: nn.Linear, name: str, state: MaskState, mask_generator: MaskGenerator):
        nn.Module.__init__(self)
        _take_over(self, linear)
        self.mask_generator = mask_generator
        self.layer_name = name
        self.mask_state = state

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = self.mask_state
        outputs = nn.functional.linear(inputs, self.weight, self.bias)
        if state.held is not None:
            return outputs * state.held[self.layer_name]
        gates = self.mask_generator(state.token_mean(inputs))
        state.record(self.layer_name, gates)
        return outputs * (gates if inputs.dim() == 2 else gates.unsqueeze(1))

    def unmasked(self) -> nn.Linear:
        """The plain layer again, with the very same parameters."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        _take_over(linear, self)
        return linear


def _take_over(target: nn.Linear, source: nn.Linear) -> None:
    """Make `target` a linear layer around the parameters of `source`, without new ones being made and drawn."""
    target.in_features, target.out_features = source.in_features, source.out_features
    target.weight, target.bias = source.weight, source.bias
    target.training = source.training
