# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What gates do to tensors: steps, products that remember little for the backward pass, and mixtures of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class StraightThroughStep(torch.autograd.Function):
    """`1[x > 0]` forward; backward as if it were tanh, on both sides of zero, so that closed gates can open again."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return (logits > 0).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (logits,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(logits).square())


class GatedProduct(torch.autograd.Function):
    """
    `outputs · gates`, gates broadcast, for a product that the next operation remembers: the gradient of a gate is
    `Σ grad · outputs = Σ grad · product / gate`, so that the outputs themselves need not be remembered too. For soft
    gates: a closed one gets no gradient, which the ReLU that closed it would stop anyway.
    """

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        product = outputs * gates
        ctx.save_for_backward(product, gates)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product, gates = ctx.saved_tensors
        broadcast = [dim for dim, size in enumerate(gates.shape) if size != product.shape[dim]]
        grad_gates = grad * product
        if broadcast:
            grad_gates = grad_gates.sum(broadcast, keepdim=True)
        return grad * gates, torch.where(gates > 0, grad_gates / gates, 0)


def mean_over(inputs: torch.Tensor, dims: int | tuple[int, ...]) -> torch.Tensor:
    """The mean, divided after the sum: the backward pass of `mean` would divide a copy as large as the inputs."""
    if inputs.dtype == torch.float16:  # the sum might not fit
        return inputs.mean(dims)
    total = inputs.sum(dims)
    return total / (inputs.numel() // total.numel())


def draw_mixture(batch_size: int, ratio: float, largest: int, device: torch.device) -> torch.Tensor:
    """
    Which samples share their gates: a share `ratio` of them take the mean over themselves and some random others, from
    two samples up to `largest` in all; the rest keep their own.

    Returns:
        `torch.Tensor` of shape `(batch_size, batch_size)`: weights; each row sums to one.
    """
    numbers = torch.randint(2, max(2, largest) + 1, (batch_size,), device=device)
    mixed = torch.rand(batch_size, device=device) < ratio
    numbers = torch.where(mixed, numbers, 1).clamp(max=batch_size)
    order = torch.rand(batch_size, batch_size, device=device).fill_diagonal_(-1)  # oneself first, then random others
    chosen = order.argsort(1).argsort(1) < numbers[:, None]
    return chosen / numbers[:, None]
