# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of modular models and modules as pure functions: cohesion, coupling, retention, and what a model costs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from .labels import membership


# Masks become floats for matrix products in blocks of so many rows and columns: 64 MiB.
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 8192
LINEAR_LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


def intersection_sizes(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    How many neurons each mask of `first` has in common with each of `second`: matrix products, block by block.

    Args:
        first (`torch.Tensor` of shape `(num_first, num_neurons)`): booleans; or bits in bytes, as `numpy.packbits`
            packs every row, of shape `(num_first, ceil(num_neurons / 8))`.
        second (`torch.Tensor` of shape `(num_second, num_neurons)`): the same.

    Returns:
        `torch.Tensor` of shape `(num_first, num_second)` in int64.
    """
    common = torch.zeros(len(first), len(second), dtype=torch.int64, device=first.device)
    width = BLOCK_COLUMNS if first.dtype == torch.bool else BLOCK_COLUMNS // 8
    for ours, theirs in zip(first.split(width, dim=1), second.split(width, dim=1), strict=True):
        common += (_floats(ours) @ _floats(theirs).T).long()  # exact: a block counts to 8192
    return common


def _floats(masks: torch.Tensor) -> torch.Tensor:
    """Booleans, or packed bits, as zeros and ones to calculate with."""
    return (masks if masks.dtype == torch.bool else torch.from_numpy(np.unpackbits(masks.numpy(), axis=1))).float()


def pairwise_jaccard(masks: torch.Tensor) -> torch.Tensor:
    """
    Jaccard index of all pairs of masks.

    Args:
        masks (`torch.Tensor` of shape `(num_masks, num_neurons)`): booleans, or packed bits as for
            [`intersection_sizes`].

    Returns:
        `torch.Tensor` of shape `(num_masks, num_masks)` in float32. Two empty masks share nothing: 0.
    """
    common = intersection_sizes(masks, masks)
    return _jaccard(common, common.diagonal(), common.diagonal())


def _jaccard(common: torch.Tensor, first_sizes: torch.Tensor, second_sizes: torch.Tensor) -> torch.Tensor:
    return common / (first_sizes[:, None] + second_sizes - common).clamp(min=1)


def mean_jaccard(masks: torch.Tensor) -> torch.Tensor:
    """
    Mean Jaccard index over all pairs of masks. Memory is bounded, whatever the number of masks.

    Args:
        masks (`torch.Tensor` of shape `(num_masks, num_neurons)`): booleans, or packed bits as for
            [`intersection_sizes`].

    Returns:
        `torch.Tensor`: a scalar in [0, 1]; NaN for fewer than two masks.
    """
    count = len(masks)
    blocks = masks.split(BLOCK_ROWS)
    sizes: list[torch.Tensor] = []
    total = torch.zeros((), device=masks.device)
    for i, block in enumerate(blocks):
        common = intersection_sizes(block, block)
        sizes.append(common.diagonal())
        total = total + _jaccard(common, sizes[i], sizes[i]).triu(1).sum()
        for other, other_sizes in zip(blocks[:i], sizes[:i], strict=True):
            total = total + _jaccard(intersection_sizes(block, other), sizes[i], other_sizes).sum()
    return 2 * total / (count * (count - 1) or float("nan"))


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
    counts = sample_masks.new_zeros(len(classes), sample_masks.shape[1], dtype=torch.float32)
    for rows, columns in zip(sample_masks.split(BLOCK_ROWS // 4), members.split(BLOCK_ROWS // 4), strict=True):
        counts += columns.float().T @ rows.float()
    return classes, counts >= samples_needed(members.sum(0), threshold)[:, None]


def samples_needed(num_samples: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many samples a share of them is, rounded up; 9 of 10 reach 0.9 whatever the rounding of the product."""
    needed = torch.ceil(num_samples.cpu().double() * threshold - 1e-9)  # not every device has doubles
    return needed.long().to(num_samples.device)


def cohesion(sample_masks: torch.Tensor, labels: torch.Tensor, threshold: float = 0.9) -> torch.Tensor:
    """
    How alike the samples of one class are: mean over classes of the mean Jaccard index over all pairs of its samples,
    each sample's mask restricted to the mask of its class. Exact; for whole data sets, see
    `collect_statistics(..., reservoir_samples=None)`.

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
    scores = [mean_jaccard(sample_masks[member][:, mask]) for member, mask in zip(members.T, masks, strict=True)]
    return torch.stack([*scores, sample_masks.new_full((), float("nan"), dtype=torch.float32)]).nanmean()


def coupling(masks: torch.Tensor) -> torch.Tensor:
    """
    How much classes share: mean Jaccard index over all pairs of class masks.

    Args:
        masks (`torch.Tensor` of shape `(num_classes, num_neurons)`): booleans.

    Returns:
        `torch.Tensor`: a scalar in [0, 1]; NaN for fewer than two classes.
    """
    return mean_jaccard(masks)


def retention(masks: torch.Tensor) -> torch.Tensor:
    """
    Share of neurons kept, averaged over masks.

    Args:
        masks (`torch.Tensor` of shape `(..., num_neurons)`): booleans.

    Returns:
        `torch.Tensor`: a scalar in [0, 1].
    """
    return masks.float().mean()


def parameter_names(model: nn.Module, linear_only: bool = False, generators: bool = True) -> set[str]:
    """
    The parameters that count in the size of a model, shared ones once.

    Args:
        model (`nn.Module`): any model.
        linear_only (`bool`, *optional*, defaults to `False`): weights and biases of linear layers and convolutions
            only; not embeddings, norms and the like.
        generators (`bool`, *optional*, defaults to `True`): the mask generators of a modular model as well.

    Returns:
        `set[str]`: names as in `model.named_parameters()`.
    """
    names = {name for name, _ in model.named_parameters() if generators or ".mask_generator." not in name}
    if not linear_only:
        return names
    layers = [layer for layer in model.modules() if isinstance(layer, LINEAR_LAYERS)]
    linear = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name for name in names if id(model.get_parameter(name)) in linear}


def count_parameters(model: nn.Module, linear_only: bool = False, generators: bool = True) -> int:
    """
    Number of parameters.

    Args:
        model (`nn.Module`): any model.
        linear_only (`bool`, *optional*, defaults to `False`): see [`parameter_names`].
        generators (`bool`, *optional*, defaults to `True`): see [`parameter_names`].

    Returns:
        `int`: the number, shared parameters once.
    """
    return sum(model.get_parameter(name).numel() for name in parameter_names(model, linear_only, generators))


def parameter_retention(module: nn.Module, parent: nn.Module, linear_only: bool = False) -> float:
    """
    Weight retention rate (NeMo, arXiv 2508.11348, section 4): parameters of a module ÷ parameters of its parent
    without mask generators.

    Args:
        module (`nn.Module`): the module.
        parent (`nn.Module`): its parent, with masks or without.
        linear_only (`bool`, *optional*, defaults to `False`): count linear layers and convolutions only, of both. The
            paper counts linear layers; a convolution is one here, the patch embedding of a ViT too.

    Returns:
        `float`: a share; above 1 only if padding outweighs what was cut.
    """
    return count_parameters(module, linear_only) / count_parameters(parent, linear_only, generators=False)


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
