# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Masked layers: linear layers and convolutions with a generator of one gate per sample and neuron."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import NemoRuntimeError, NemoValueError
from .gating import GatedProduct, StraightThroughStep, draw_mixture, mean_over


# Up to here the paper's generators are as wide as the layer, above half as wide.
PAPER_WIDTH_LIMIT = {"linear": 3072, "convolution": 127}
OPEN_BIAS = 3.0  # tanh(3) = 0.995
OPEN_NOISE = 0.1


class MaskState:
    """
    What the masked layers of one model share during a forward pass: which tokens are real, where gates are recorded,
    gates that are held constant, and which samples share their gates.

    A pre-hook of the model (or of its encoder, where only that sees the mask over tokens) fills in the tokens; they
    stay until the next forward pass, because gradient checkpointing computes gates again during the backward pass.
    Plain Python attributes: nothing of this enters the state dict.

    Args:
        mask_position (`int` or `None`): position of `attention_mask` among the positional arguments of the forward
            that the hook precedes.
    """

    def __init__(self, mask_position: int | None):
        self.mask_position = mask_position
        self.layers: list[str] = []  # names of the masked layers, in forward order
        self.token_weights: torch.Tensor | None = None  # (batch_size, 1, sequence_length), each row sums to one
        self.batch_size = 0
        self.on_the_way: dict[str, torch.Tensor] = {}  # gates of convolutions that wait for the norm behind them
        self.recorded: dict[str, torch.Tensor] | None = None
        self.held: dict[str, torch.Tensor] | None = None
        self.mixing: tuple[float, int] | None = None  # share of the samples, largest number of samples that share
        self.mixture: torch.Tensor | None = None  # (batch_size, batch_size), each row sums to one

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
        first = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dim()), None)
        self.batch_size = 0 if first is None else len(first)
        self.mixture = None if self.mixing is None else draw_mixture(self.batch_size, *self.mixing, first.device)
        self.on_the_way.clear()
        if self.recorded is not None:
            self.recorded.clear()

    def token_mean(self, inputs: torch.Tensor, windowed: bool = False) -> torch.Tensor:
        """
        The mean over real tokens: `(batch_size, tokens, features)` → `(batch_size, features)`. Tokens may lie on a
        grid; with `windowed` the inputs are the windows of all samples, `(batch_size * windows, tokens, features)`.
        """
        if inputs.dim() == 2:
            return inputs
        if windowed:
            inputs = inputs.reshape(self.batch_size, -1, inputs.shape[-1])
        if inputs.dim() > 3:
            inputs = inputs.flatten(1, -2)
        if self.token_weights is None:
            return mean_over(inputs, 1)
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
            if name in self.recorded:
                raise NemoRuntimeError(
                    f"The forward pass calls {name} twice, so that its neurons have two gates for one sample. Exclude "
                    "it with `target_modules`."
                )
            self.recorded[name] = gates


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
        kind (`"linear"` or `"convolution"`): of the layer; the paper's generators of convolutions are half as wide
            from 128 gates up and have no first bias.
        detach_inputs (`bool`, *optional*, defaults to `False`): see [`~nemo_hf.ModularConfig`].

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
        kind: Literal["linear", "convolution"] = "linear",
        detach_inputs: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_size is None:
            hidden_size = num_neurons if num_neurons <= PAPER_WIDTH_LIMIT[kind] else num_neurons // 2
        reduce_bias = not (kind == "convolution" and init == "paper")
        self.reduce = nn.Linear(in_features, hidden_size, bias=reduce_bias, device=device, dtype=dtype)
        self.expand = nn.Linear(hidden_size, num_neurons, device=device, dtype=dtype)
        self.gate = gate
        self.detach_inputs = detach_inputs
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: Literal["open", "paper"]) -> None:
        """Draw new weights; see [`~nemo_hf.ModularConfig`] for the two ways."""
        nn.init.kaiming_normal_(self.reduce.weight, nonlinearity="relu")
        if init == "paper":
            nn.init.kaiming_normal_(self.expand.weight, nonlinearity="relu")
            if self.reduce.bias is not None:
                nn.init.ones_(self.reduce.bias)
            nn.init.ones_(self.expand.bias)
        else:
            nn.init.zeros_(self.reduce.bias)
            nn.init.normal_(self.expand.weight, std=OPEN_NOISE / math.sqrt(self.reduce.out_features))
            nn.init.constant_(self.expand.bias, OPEN_BIAS)

    def forward(self, mean_inputs: torch.Tensor) -> torch.Tensor:
        logits = self.expand(torch.relu(self.reduce(mean_inputs)))
        if self.gate == "hard":
            return StraightThroughStep.apply(logits)
        return torch.relu(torch.tanh(logits))


class MaskedLayer(nn.Module):
    """
    What the masked layers share: each takes over the parameters of the layer that it replaces, under their names, and
    multiplies its outputs, bias included, by gates: `y = layer(x) ⊙ m`. `mask_generator` comes on top.

    Args:
        layer (`nn.Module`): the layer to replace.
        name (`str`): its name in the model, the key under which its gates are recorded.
        state ([`MaskState`]): shared by the masked layers of the model.
        mask_generator ([`MaskGenerator`], *optional*): computes the gates. Without one the outputs stay as they are,
            unless gates are held constant; an [`ActivationRecorder`] then records what the neurons do.
    """

    def __init__(self, layer: nn.Module, name: str, state: MaskState, mask_generator: MaskGenerator | None):
        nn.Module.__init__(self)
        _take_over(self, layer)
        self.plain_class = type(layer)
        self.mask_generator = mask_generator
        self.layer_name = name
        self.mask_state = state

    def gates(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """
        The gates of a batch, `(batch_size, num_neurons)`, those that are held constant, `(num_neurons,)`, or none.
        """
        state = self.mask_state
        if state.held is not None:
            return state.held[self.layer_name]
        if self.mask_generator is None:
            return None
        gates = self.mask_generator(self.mean(inputs.detach() if self.mask_generator.detach_inputs else inputs))
        state.record(self.layer_name, gates)
        return gates if state.mixture is None else state.mixture.to(gates.dtype) @ gates

    def mean(self, inputs: torch.Tensor) -> torch.Tensor:
        """The mean input of every sample, of shape `(batch_size, in_features)`."""
        raise NotImplementedError

    def unmasked(self) -> nn.Module:
        """The plain layer again, with the very same parameters."""
        return _plain_again(self, self.plain_class)


class _MaskedTokenLayer(MaskedLayer):
    """
    A masked layer whose neurons are the last dimension of its output.

    Args:
        windowed (`bool`, *optional*, defaults to `False`): whether its inputs are windows of the samples.
        remembered (`bool`, *optional*, defaults to `False`): whether what follows remembers its input for the backward
            pass, so that the masked layer can use that instead of an activation of its own.
    """

    def __init__(self, *args: Any, windowed: bool = False, remembered: bool = False):
        super().__init__(*args)
        self.windowed = windowed
        self.remembered = remembered

    def mean(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.mask_state.token_mean(inputs, self.windowed)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        gates = self.gates(inputs)
        if gates is None:
            return outputs
        if gates.dim() > 1:
            if self.windowed:
                gates = gates.repeat_interleave(inputs.shape[0] // gates.shape[0], dim=0)
            gates = gates.view(gates.shape[0], *[1] * (outputs.dim() - 2), -1)
        if self.remembered and gates.requires_grad and self.mask_generator.gate == "soft":
            return GatedProduct.apply(outputs, gates)
        return outputs * gates


class MaskedLinear(_MaskedTokenLayer, nn.Linear):
    """A masked linear layer; see [`MaskedLayer`]."""


class MaskedConv1D(_MaskedTokenLayer, Conv1D):
    """The same for the `Conv1D` of GPT-2, a linear layer with a transposed weight."""


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """
    A masked convolution; see [`MaskedLayer`]. The gates are computed from the mean of its input over all positions.

    Args:
        norm (`str`, *optional*): the [`GatedBatchNorm2d`] behind it, whose output is multiplied instead.
    """

    def __init__(self, *args: Any, norm: str | None = None):
        super().__init__(*args)
        self.norm = norm

    def mean(self, inputs: torch.Tensor) -> torch.Tensor:
        return mean_over(inputs, (2, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        gates = self.gates(inputs)
        if gates is None:
            return outputs
        if self.norm is not None:
            self.mask_state.on_the_way[self.norm] = gates
            return outputs
        return outputs * gates[..., None, None]


class GatedBatchNorm2d(nn.BatchNorm2d):
    """
    The batch norm behind a [`MaskedConv2d`]: its output is multiplied by the gates of the convolution.

    Args:
        norm (`nn.BatchNorm2d`): the norm to replace; its parameters are taken over under their names.
        name (`str`): its name in the model.
        state ([`MaskState`]): shared by the masked layers of the model.
    """

    def __init__(self, norm: nn.BatchNorm2d, name: str, state: MaskState):
        nn.Module.__init__(self)
        _take_over(self, norm)
        self.plain_class = type(norm)
        self.layer_name = name
        self.mask_state = state

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        gates = self.mask_state.on_the_way.pop(self.layer_name, None)
        return outputs if gates is None else outputs * gates[..., None, None]

    def unmasked(self) -> nn.Module:
        """The plain norm again, with the very same parameters."""
        return _plain_again(self, self.plain_class)


class ActivationRecorder:
    """
    Forward hook of the activation behind a masked layer that has no generator: the mean magnitude of every neuron's
    activations is recorded as the gates of the layer (MODA, arXiv 2411.01074, section 3). Nothing is multiplied.

    Args:
        name (`str`): of the layer.
        state ([`MaskState`]): shared by the masked layers of the model.
        threshold (`float`): means up to here count as zero, so that the neuron is not active. Activations such as GELU
            have hardly any zeros of their own.
        channels_first (`bool`): whether activations are of shape `(batch_size, num_neurons, height, width)` instead of
            `(batch_size, ..., num_neurons)`.
    """

    def __init__(self, name: str, state: MaskState, threshold: float, channels_first: bool):
        self.name = name
        self.state = state
        self.threshold = threshold
        self.channels_first = channels_first

    def __call__(self, activation: nn.Module, args: tuple[Any, ...], outputs: torch.Tensor) -> None:
        if self.state.recorded is None and not torch.is_grad_enabled():
            return  # with gradients it may be a recomputation, which has to save what the forward pass saved
        magnitude = outputs.abs()
        means = magnitude.mean((2, 3)) if self.channels_first else self.state.token_mean(magnitude)
        self.state.record(self.name, means * (means > self.threshold))


def _take_over(target: nn.Module, source: nn.Module) -> None:
    """Give `target` the attributes, parameters, buffers and hooks of `source`, without new ones being drawn."""
    for name, value in source.__dict__.items():
        target.__dict__[name] = value.copy() if isinstance(value, dict | set) else value


def _plain_again(layer: nn.Module, plain_class: type[nn.Module]) -> nn.Module:
    plain = plain_class.__new__(plain_class)
    _take_over(plain, layer)
    plain._modules.pop("mask_generator", None)
    for name in ("plain_class", "layer_name", "mask_state", "windowed", "remembered", "norm"):
        plain.__dict__.pop(name, None)
    return plain
