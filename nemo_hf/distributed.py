# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Losses over the samples of all processes: the loss and the gradient of one process with the same global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard


def global_batch(
    accelerator: Accelerator, masks: Mapping[str, torch.Tensor], classes: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    The gates and classes of all processes. The gates of this process keep their graph, the others are constants:
    every process computes the same loss, and its gradient with respect to its own gates; see [`of_all_processes`].

    Args:
        accelerator (`Accelerator`): knows the other processes.
        masks (`Mapping[str, torch.Tensor]`): layer name → gates of shape `(batch_size, num_neurons)`.
        classes (`torch.Tensor`): ids of shape `(batch_size,)`, or booleans of shape `(batch_size, num_labels)`.

    Returns:
        The same for the samples of all processes, in the order of the processes.
    """
    own = torch.cat(list(masks.values()), dim=1)  # one exchange for all layers
    sizes = batch_sizes(accelerator, len(own), own.device)
    start = sum(sizes[: accelerator.process_index])
    everything = _gather(accelerator, own.detach(), sizes)
    joined = torch.cat([everything[:start], own, everything[start + len(own) :]])
    layers = joined.split([gates.shape[1] for gates in masks.values()], dim=1)
    all_classes = _gather(accelerator, classes.to(torch.int64), sizes).to(classes.dtype)
    return dict(zip(masks, layers, strict=True)), all_classes


def batch_sizes(accelerator: Accelerator, batch_size: int, device: torch.device) -> list[int]:
    """The number of samples of every process; only uneven batches need to be asked for, which waits for the device."""
    if accelerator.even_batches or accelerator.num_processes == 1:
        return [batch_size] * accelerator.num_processes
    return accelerator.gather(torch.tensor([batch_size], device=device)).tolist()


def of_all_processes(accelerator: Accelerator, term: torch.Tensor) -> torch.Tensor:
    """
    A term that every process computed over the global batch, with its gradient times the number of processes: the
    average of gradients over processes, as in data parallel training, is then the gradient of the term.
    """
    return term.detach() + accelerator.num_processes * (term - term.detach())


def of_own_samples(accelerator: Accelerator, term: torch.Tensor, batch_size: int) -> torch.Tensor:
    """A mean over the samples of this process, weighted so that the average over processes is that over samples."""
    sizes = batch_sizes(accelerator, batch_size, term.device)
    return term * (batch_size * len(sizes) / sum(sizes))


def fill_up_last_batches(dataloader: Any) -> Any:
    """
    The last batches of an evaluation are filled up to one size, whatever `even_batches` says for training: the
    `Trainer` gathers predictions of equal size and cuts off the surplus.
    """
    sampler = getattr(dataloader, "batch_sampler", None)
    if isinstance(sampler, BatchSamplerShard):
        sampler.even_batches = True
    return dataloader


def real_samples(accelerator: Accelerator, batch_size: int) -> int:
    """How many samples of the current batch of an evaluation do not just fill it up; see [`fill_up_last_batches`]."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return batch_size
    return min(max(state.remainder - accelerator.process_index * batch_size, 0), batch_size)


def _gather(accelerator: Accelerator, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    gathered = accelerator.gather(accelerator.pad_across_processes(tensor, dim=0) if len(set(sizes)) > 1 else tensor)
    parts = gathered.split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
