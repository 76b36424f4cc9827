# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`Reservoir`]: bit-packed masks of some samples of every label, or of all samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


BLOCK_SAMPLES = 512  # that are unpacked at a time


class Reservoir:
    """
    The samples with the smallest random keys of every label: unbiased, and independent of batch sizes.

    Args:
        num_labels (`int`): how many labels there are.
        num_neurons (`int`): neurons of a sample.
        per_label (`int`, *optional*): samples to keep of every label; `None` keeps all.
        seed (`int` or `list[int]`): of the keys.

    Attributes:
        labels (`np.ndarray` of shape `(num_samples,)`): the label of every kept sample, in no order.
        keys (`np.ndarray` of shape `(num_samples,)`): its key.
        bits (`np.ndarray` of shape `(num_samples, ceil(num_neurons / 8))`): its open neurons, as `numpy.packbits`
            packs them.
    """

    def __init__(self, num_labels: int, num_neurons: int, per_label: int | None, seed: int | list[int]):
        self.per_label = per_label
        self.num_neurons = num_neurons
        self._generator = np.random.default_rng(seed)
        self._highest = np.full(num_labels, np.inf)  # key that a further sample must be below
        self._count = 0
        # Slots are filled from the front; memory that nothing was written to costs nothing.
        slots = 1024 if per_label is None else num_labels * per_label
        self._labels = np.zeros(slots, dtype=np.int32)
        self._keys = np.zeros(slots)
        self._bits = np.zeros((slots, (num_neurons + 7) // 8), dtype=np.uint8)

    @property
    def labels(self) -> np.ndarray:
        return self._labels[: self._count]

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: self._count]

    @property
    def bits(self) -> np.ndarray:
        return self._bits[: self._count]

    def add(self, labels: np.ndarray, bits_of: Callable[[np.ndarray], np.ndarray]) -> None:
        """
        Offer samples.

        Args:
            labels (`np.ndarray` of shape `(num_samples,)`): their labels.
            bits_of (`Callable`): positions among them → their open neurons, packed; only called if some are kept.
        """
        keys = self._generator.random(len(labels))
        candidates = np.flatnonzero(keys < self._highest[labels])  # ever fewer as the reservoir fills
        self._insert(labels[candidates], keys[candidates], lambda kept: bits_of(candidates[kept]))

    def restore(self, labels: np.ndarray, keys: np.ndarray, bits: np.ndarray) -> None:
        """
        Put in what another reservoir held.

        Raises:
            `ValueError`: if the arrays do not belong together, or to labels and neurons of this one.
        """
        if labels.shape != keys.shape or bits.shape != (len(keys), self._bits.shape[1]) or bits.dtype != np.uint8:
            raise ValueError(f"the reservoir has shapes {labels.shape}, {keys.shape} and {bits.shape}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self._highest):
            raise ValueError(f"the reservoir has labels from {labels.min()} to {labels.max()}")
        self._insert(labels, keys, lambda kept: bits[kept])

    def _insert(self, labels: np.ndarray, keys: np.ndarray, bits_of: Callable[[np.ndarray], np.ndarray]) -> None:
        if not len(labels):
            return
        old = self._count
        all_labels, all_keys = np.concatenate([self.labels, labels]), np.concatenate([self.keys, keys])
        order = np.lexsort((all_keys, all_labels))
        ordered = all_labels[order]
        rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # of a sample among those of its label
        stays = np.ones(len(ordered), dtype=bool)
        if self.per_label is not None:
            stays[order] = rank < self.per_label
            last = rank == self.per_label - 1
            self._highest[ordered[last]] = all_keys[order[last]]
        entering = np.flatnonzero(stays[old:])
        # A sample only goes where another one of its label comes.
        slots = np.concatenate([np.flatnonzero(~stays[:old]), np.arange(old, len(ordered))])[: len(entering)]
        self._count = max(old, int(slots[-1]) + 1) if len(slots) else old
        self._grow()
        self._labels[slots], self._keys[slots] = labels[entering], keys[entering]
        self._bits[slots] = bits_of(entering)

    def _grow(self) -> None:
        if self._count > len(self._keys):
            for name in ("_labels", "_keys", "_bits"):
                short = getattr(self, name)
                longer = np.zeros((2 * self._count, *short.shape[1:]), dtype=short.dtype)
                longer[: len(short)] = short
                setattr(self, name, longer)

    def of_label(self, label: int, mask: np.ndarray) -> torch.Tensor:
        """
        The kept samples of a label, restricted to some neurons.

        Args:
            label (`int`): the label.
            mask (`np.ndarray` of shape `(num_neurons,)`): booleans, the neurons.

        Returns:
            `torch.Tensor` of shape `(num_samples, ceil(mask.sum() / 8))`: packed bits.
        """
        rows = np.flatnonzero(self.labels == label)
        packed = np.empty((len(rows), (int(mask.sum()) + 7) // 8), dtype=np.uint8)
        for start in range(0, len(rows), BLOCK_SAMPLES):
            block = self._bits[rows[start : start + BLOCK_SAMPLES]]
            bits = np.unpackbits(block, axis=1, count=self.num_neurons)
            packed[start : start + BLOCK_SAMPLES] = np.packbits(bits[:, mask], axis=1)
        return torch.from_numpy(packed)
