# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Means of the terms of the loss between two logs, summed on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import gather_object

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
        weight: int,
        classes: torch.Tensor | None = None,
    ) -> None:
        """
        Count one batch: the terms, `neuron_retention` and, given the classes, cohesion and coupling of the batch.

        Args:
            terms (`Mapping[str, torch.Tensor]`): name → scalar.
            masks (`Mapping[str, torch.Tensor]`): layer name → gates of shape `(batch_size, num_neurons)`.
            weight (`int`): of the batch: its number of samples, without those that fill it up.
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
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + torch.where(known, value, 0) * weight, count + known * weight)

    def drain(self, prefix: str = "") -> dict[str, float]:
        """The means over everything added since the last call, over all processes."""
        sums, self._sums = self._sums, {}
        pairs = [torch.stack([total.float(), count.float()]) for total, count in sums.values()]
        own = dict(zip(sums, torch.stack(pairs).tolist(), strict=True)) if sums else {}
        totals: dict[str, list[float]] = {}
        for of_process in gather_object([own]):  # one that saw no batch has no names
            for name, (total, count) in of_process.items():
                known = totals.setdefault(name, [0.0, 0.0])
                known[0] += total
                known[1] += count
        return {f"{prefix}{name}": total / count for name, (total, count) in totals.items() if count}
