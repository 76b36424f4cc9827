# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Means of the terms of the loss between two logs, summed on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator

from . import metrics


class TermAverages:
    """
    The terms of the loss and what the gates look like, averaged over the samples of several batches. Adding a batch
    never waits for the device.
    """

    def __init__(self) -> None:
        # term → sum over samples, number of samples
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    @torch.no_grad()
    def add(
        self,
        terms: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor],
        classes: torch.Tensor | None = None,
    ) -> None:
        """
        Count one batch, weighted by its size: the terms, `neuron_retention` and, given the classes, cohesion and
        coupling of the batch.

        Args:
            terms (`Mapping[str, torch.Tensor]`): name → scalar.
            masks (`Mapping[str, torch.Tensor]`): layer name → gates of shape `(batch_size, num_neurons)`.
            classes (`torch.Tensor`, *optional*): ids of shape `(batch_size,)`, or booleans of shape `(batch_size,
                num_labels)`.
        """
        batch_size = next(iter(masks.values())).shape[0]
        neurons = sum(gates.shape[-1] for gates in masks.values())
        observed = {name: term.detach() for name, term in terms.items()}
        observed["neuron_retention"] = sum((gates > 0).sum() for gates in masks.values()) / (batch_size * neurons)
        if classes is not None:
            sample_masks = torch.cat([gates > 0 for gates in masks.values()], dim=1)
            observed["cohesion"] = metrics.cohesion(sample_masks, classes)
            observed["coupling"] = metrics.coupling(metrics.class_masks(sample_masks, classes, threshold=0.9)[1])
        for name, value in observed.items():
            # Batches without a pair of samples or of classes have no cohesion or coupling.
            known = torch.isfinite(value) if name in ("cohesion", "coupling") else torch.ones_like(value, dtype=bool)
            weight = known * batch_size
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + torch.where(known, value, 0) * weight, count + weight)

    def drain(self, accelerator: Accelerator, prefix: str = "") -> dict[str, float]:
        """The means over everything added since the last call, over all processes."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        stacked = torch.stack([torch.stack([total.float(), count.float()]) for total, count in sums.values()])
        stacked = accelerator.reduce(stacked, reduction="sum")
        return {
            f"{prefix}{name}": total / count
            for name, (total, count) in zip(sums, stacked.tolist(), strict=True)
            if count
        }
