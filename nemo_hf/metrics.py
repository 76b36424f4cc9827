# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of modular models and modules as pure functions: cohesion, coupling, retention, and what a model costs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .labels import membership


def pairwise_jaccard(masks: torch.Tensor) -> torch.Tensor:
    """
    Jaccard index of all pairs of boolean masks, by one matrix product.

    Args:
        masks (`torch.Tensor` of shape `(num_masks, num_neurons)`): booleans.

    Returns:
        `torch.Tensor` of shape `(num_masks, num_masks)` in float32. Two empty masks share nothing: 0.
    """
    masks = masks.float()
    sizes = masks.sum(-1)
    intersection = masks @ masks.T
    union = sizes[:, None] + sizes[None, :] - intersection
    return intersection / union.clamp(min=1)


def class_masks(
    sample_masks: torch.Tensor, labels: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The neurons that at least a share `threshold` of the samples of a class opens (NeMo, arXiv 2508.11348, section 3).

    Args:
        sample_masks (`torch.Tensor` of shape `(num_samples, num_neurons)`): booleans.
        labels (`torch.Tensor` of shape `(num_samples,)` or `(num_samples, num_labels)`): class of every sample, or
            booleans where a sample may have several or none.
        threshold (`float`): share of samples in (0, 1].

    Returns:
        The classes that occur, of shape `(num_classes,)`, and their masks, of shape `(num_classes, num_neurons)`.
    """
    classes, members = membership(labels)
    counts = members.float().T @ sample_masks.float()
    return classes, counts >= samples_needed(members.sum(0), threshold)[:, None]


def samples_needed(num_samples: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many samples a share of them is, rounded up; 9 of 10 reach 0.9 whatever the rounding of the product."""
    needed = torch.ceil(num_samples.cpu().double() * threshold - 1e-9)  # not every device has doubles
    return needed.long().to(num_samples.device)


def cohesion(sample_masks: torch.Tensor, labels: torch.Tensor, threshold: float = 0.9) -> torch.Tensor:
    """
    How alike the samples of one class are: mean over classes of the mean Jaccard index over all pairs of its samples,
    each sample's mask restricted to the mask of its class.

    Args:
        sample_masks (`torch.Tensor` of shape `(num_samples, num_neurons)`): booleans.
        labels (`torch.Tensor` of shape `(num_samples,)` or `(num_samples, num_labels)`): class of every sample, or
            booleans where a sample may have several or none.
        threshold (`float`, *optional*, defaults to 0.9): for the masks of the classes, see [`class_masks`].

    Returns:
        `torch.Tensor`: a scalar in [0, 1]; NaN if no class has two samples.
    """
    _, masks = class_masks(sample_masks, labels, threshold)
    _, members = membership(labels)
    scores = []
    for member, mask in zip(members.T, masks, strict=True):
        of_class = sample_masks[member] & mask
        count = len(of_class)
        if count > 1:
            jaccard = pairwise_jaccard(of_class)
            scores.append((jaccard.sum() - jaccard.diagonal().sum()) / (count * (count - 1)))
    return torch.stack(scores).mean() if scores else sample_masks.new_full((), float("nan"), dtype=torch.float32)


def coupling(masks: torch.Tensor) -> torch.Tensor:
    """
    How much classes share: mean Jaccard index over all pairs of class masks.

    Args:
        masks (`torch.Tensor` of shape `(num_classes, num_neurons)`): booleans.

    Returns:
        `torch.Tensor`: a scalar in [0, 1]; NaN for fewer than two classes.
    """
    jaccard = pairwise_jaccard(masks)
    count = len(masks)
    return (jaccard.sum() - jaccard.diagonal().sum()) / (count * (count - 1) or float("nan"))


def retention(masks: torch.Tensor) -> torch.Tensor:
    """
    Share of neurons kept, averaged over masks.

    Args:
        masks (`torch.Tensor` of shape `(..., num_neurons)`): booleans.

    Returns:
        `torch.Tensor`: a scalar in [0, 1].
    """
    return masks.float().mean()


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """
    Floating-point operations of one forward pass, as PyTorch's own counter sees them (a multiplication and an
    addition are two).

    Args:
        model (`nn.Module`): any model.
        inputs (`Mapping[str, torch.Tensor]`): keyword arguments of its forward.

    Returns:
        `int`: the operations for the whole batch.
    """
    # The counter knows matrix products, not the fused attention kernels of the CPU: count the eager attention.
    # Without gradients: the counter fails on parameters that a forward pass hands to a layer, as DeBERTa does.
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def latency_ratio(
    model: nn.Module, reference: nn.Module, inputs: Mapping[str, torch.Tensor], pairs: int = 15
) -> float:
    """
    Latency of one model as a ratio to another, measured in turn so that a drifting machine hits both.

    Args:
        model (`nn.Module`): the model to measure.
        reference (`nn.Module`): what it is compared with.
        inputs (`Mapping[str, torch.Tensor]`): keyword arguments of both.
        pairs (`int`, *optional*, defaults to 15): number of measured pairs, after two that are not counted.

    Returns:
        `float`: the median over pairs of time(model) ÷ time(reference).
    """
    ratios = []
    with torch.no_grad():
        for _ in range(pairs + 2):
            ratios.append(_seconds(model, inputs) / _seconds(reference, inputs))
    return statistics.median(ratios[2:])


def _seconds(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    device = next(iter(inputs.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(**inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
