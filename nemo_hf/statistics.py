# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""One streaming pass over the data that counts, for every label and neuron, how often the gate is open."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from . import metrics
from .errors import CheckpointError, NemoValueError
from .files import read_tensors, write_tensors
from .labels import as_membership, check_labels, membership
from .masking import masked_layers, modular_config, record_masks
from .module_masks import Label, ModuleMasks
from .slim import layer_sizes


STATISTICS_FILE = "neuron_statistics.safetensors"
RESERVOIR_SAMPLES = 200  # per label, fewer if all labels together would exceed the bytes below
RESERVOIR_BYTES = 64 * 2**20


class NeuronStatistics:
    """
    Per label and neuron: the number of samples with an open gate and the sum of gates. Memory is O(labels × neurons),
    whatever the number of samples; a seeded reservoir of bit-packed samples allows the cohesion to be estimated later.

    Args:
        labels (`list[str | int]`): the names of the labels, by id.
        layers (`Mapping[str, int]`): layer name → number of neurons.
        seed (`int`, *optional*, defaults to 0): of the reservoir.
        grouped_by (`str`, *optional*): where the "labels" are groups of samples: the column that holds them.
        activations (`bool`, *optional*, defaults to `False`): whether the gates are activations
            (`ModularConfig(gate="activation")`), whose means multiply nothing: masks are then made without gates.

    Attributes:
        num_samples (`torch.Tensor` of shape `(num_labels,)`): samples seen; one with several labels counts for each.
        open_counts (`torch.Tensor` of shape `(num_labels, num_neurons)`): samples with an open gate, all layers side
            by side.
        gate_sums (`torch.Tensor` of shape `(num_labels, num_neurons)`): sums of gates.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        layers: Mapping[str, int],
        seed: int = 0,
        grouped_by: str | None = None,
        activations: bool = False,
    ):
        self.labels = list(labels)
        if len(set(self.labels)) != len(self.labels):
            source = "`config.id2label`" if grouped_by is None else "the groups"
            raise NemoValueError(f"Two labels have the same name: {self.labels!r}. Give {source} distinct ones.")
        self.layers = dict(layers)
        self.grouped_by = grouped_by
        self.activations = activations
        neurons = sum(self.layers.values())
        self.num_samples = torch.zeros(len(self.labels), dtype=torch.int64)
        self.open_counts = torch.zeros(len(self.labels), neurons, dtype=torch.int32)
        self.gate_sums = torch.zeros(len(self.labels), neurons)
        # The reservoir keeps the samples with the smallest random keys: whole, unbiased, and independent of batch
        # sizes.
        row_bytes = (neurons + 7) // 8
        size = max(2, min(RESERVOIR_SAMPLES, RESERVOIR_BYTES // max(1, len(self.labels) * row_bytes)))
        self._keys = np.full((len(self.labels), size), np.inf)
        self._bits = np.zeros((len(self.labels), size, row_bytes), dtype=np.uint8)
        self._generator = np.random.default_rng(seed)

    @torch.no_grad()
    def update(self, gates: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """
        Count one batch.

        Args:
            gates (`Mapping[str, torch.Tensor]`): layer name → gates of shape `(batch_size, num_neurons)`.
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`): ids, or booleans where a
                sample may have several labels or none. A sample counts for every label that it has.

        Raises:
            [`~nemo_hf.errors.NemoValueError`]: if an id has no label.
        """
        labels = labels.cpu()
        self._check(labels)
        classes, members = membership(labels)
        samples, columns = members.nonzero(as_tuple=True)  # one entry for each label of each sample
        ids = classes[columns]
        joined = torch.cat([gates[layer].float() for layer in self.layers], dim=1)
        is_open = joined > 0
        device = joined.device
        self.num_samples += torch.bincount(ids, minlength=len(self.labels))
        self.open_counts, self.gate_sums = self.open_counts.to(device), self.gate_sums.to(device)
        size = max(1, len(labels))  # however many labels samples have, no copy is larger than the batch
        for rows, targets in zip(samples.to(device).split(size), ids.to(device).split(size), strict=True):
            self.open_counts.index_add_(0, targets, is_open[rows].to(torch.int32))
            self.gate_sums.index_add_(0, targets, joined[rows])
        self._sample(is_open, samples, ids.numpy())

    def _check(self, labels: torch.Tensor) -> None:
        count = len(self.labels)
        several_each = labels.dtype == torch.bool and labels.shape[1:] == (count,)
        one_each = labels.dim() == 1 and not labels.is_floating_point()
        if not several_each and not (one_each and ((labels >= 0) & (labels < count)).all()):
            raise NemoValueError(
                f"Statistics need one integer label from 0 to {count - 1} per sample (`model.config.num_labels`), or "
                f"booleans of shape (batch_size, {count}); got {labels.dtype} of shape {tuple(labels.shape)} with "
                f"values up to {labels.max().item() if labels.numel() else '-'}."
            )

    def _sample(self, is_open: torch.Tensor, samples: torch.Tensor, ids: np.ndarray) -> None:
        keys = self._generator.random(len(ids))
        candidates = np.flatnonzero(keys < self._keys.max(axis=1)[ids])  # ever fewer as the reservoir fills
        if not len(candidates):
            return
        packed = np.packbits(is_open[samples[candidates].to(is_open.device)].cpu().numpy(), axis=1)
        for row, index in zip(packed, candidates, strict=True):
            label = ids[index]
            slot = self._keys[label].argmax()
            if keys[index] < self._keys[label, slot]:
                self._keys[label, slot] = keys[index]
                self._bits[label, slot] = row

    def frequency(self) -> torch.Tensor:
        """Share of a label's samples with an open gate, of shape `(num_labels, num_neurons)`; 0 without samples."""
        return self.open_counts.cpu() / self.num_samples.clamp(min=1)[:, None]

    def module_masks(self, threshold: float = 0.9, uniform: bool = False) -> ModuleMasks:
        """
        The neurons that at least a share `threshold` of the samples of a label opens (NeMo, arXiv 2508.11348,
        section 3). A layer that would be empty keeps its single most frequent neuron.

        Args:
            threshold (`float`, *optional*, defaults to 0.9): share of samples in (0, 1].
            uniform (`bool`, *optional*, defaults to `False`): keep the same number of neurons in corresponding layers
                of all blocks, as many as the threshold gives on average, the most frequent first. The stock layout of
                a module for one label then wastes little on padding.

        Returns:
            [`ModuleMasks`]: masks and class-mean gates of every label that has samples.

        Raises:
            [`~nemo_hf.errors.NemoValueError`]: if the threshold is outside (0, 1] or no sample was counted.
        """
        if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise NemoValueError(f"threshold is a share of samples and must be in (0, 1], got {threshold!r}.")
        seen = torch.nonzero(self.num_samples).flatten().tolist()
        if not seen:
            raise NemoValueError("These statistics count no samples. Collect them over a dataset first.")
        needed = metrics.samples_needed(self.num_samples, threshold)[:, None]
        open_counts = self.open_counts.cpu()
        mean_gates = self.gate_sums.cpu() / self.num_samples.clamp(min=1)[:, None]
        by_layer = [tensor.split(list(self.layers.values()), dim=1) for tensor in (open_counts, mean_gates)]
        counts, means = (dict(zip(self.layers, tensors, strict=True)) for tensors in by_layer)
        numbers = {layer: (count >= needed).sum(1).clamp(min=1) for layer, count in counts.items()}
        if uniform:
            numbers = _mean_over_blocks(numbers, self.layers)
        masks: dict[Label, dict[str, torch.Tensor]] = {self.labels[i]: {} for i in seen}
        gates: dict[Label, dict[str, torch.Tensor]] = {self.labels[i]: {} for i in seen}
        for layer, number in numbers.items():
            # By frequency; of equally frequent neurons those with larger gates. Activations may be above one.
            largest = means[layer].amax(dim=1, keepdim=True).clamp(min=1)
            order = (counts[layer] + 0.5 * means[layer] / largest).argsort(dim=1, descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
            for i in seen:
                masks[self.labels[i]][layer] = rank[i] < number[i]
                gates[self.labels[i]][layer] = means[layer][i]
        return ModuleMasks(masks, None if self.activations else gates, threshold, self.grouped_by)

    def cohesion(self, threshold: float = 0.9) -> float:
        """Cohesion ([`metrics.cohesion`]) over the samples of the reservoir."""
        label_index, slot = np.nonzero(np.isfinite(self._keys))
        neurons = sum(self.layers.values())
        bits = np.unpackbits(self._bits[label_index, slot], axis=1, count=neurons)
        return metrics.cohesion(torch.from_numpy(bits).bool(), torch.from_numpy(label_index), threshold).item()

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `neuron_statistics.safetensors`, from which modules can be extracted later without data."""
        tensors = {
            "num_samples": self.num_samples,
            "open_counts": self.open_counts,
            "gate_sums": self.gate_sums,
            "reservoir_keys": torch.from_numpy(self._keys),
            "reservoir_bits": torch.from_numpy(self._bits),
        }
        description = {
            "kind": "neuron_statistics",
            "labels": self.labels,
            "layers": self.layers,
            "grouped_by": self.grouped_by,
            "activations": self.activations,
        }
        write_tensors(os.path.join(save_directory, STATISTICS_FILE), tensors, description)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **hub_kwargs: Any) -> NeuronStatistics:
        """
        Read `neuron_statistics.safetensors` from a folder or a repository.

        Raises:
            [`~nemo_hf.errors.CheckpointError`]: if the file is missing or damaged.
        """
        tensors, description = read_tensors(source, STATISTICS_FILE, **hub_kwargs)
        try:
            statistics = cls(
                description["labels"],
                description["layers"],
                grouped_by=description.get("grouped_by"),  # files of older versions are by label, and of gates
                activations=description.get("activations", False),
            )
            for name in ("num_samples", "open_counts", "gate_sums"):
                if tensors[name].shape != getattr(statistics, name).shape:
                    raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
                setattr(statistics, name, tensors[name].to(getattr(statistics, name).dtype))
            keys, bits = tensors["reservoir_keys"].numpy(), tensors["reservoir_bits"].numpy()
            if keys.shape != bits.shape[:2] or bits.shape[::2] != statistics._bits.shape[::2]:
                raise ValueError(f"the reservoir has shapes {keys.shape} and {bits.shape}")
            statistics._keys, statistics._bits = keys, bits
            # Further updates draw new keys, not those of the first samples again.
            statistics._generator = np.random.default_rng([1, int(statistics.num_samples.sum())])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{STATISTICS_FILE} in {source} is damaged ({error!r}).") from error
        return statistics

    def __repr__(self) -> str:
        neurons = sum(self.layers.values())
        kind = "labels" if self.grouped_by is None else f"groups of {self.grouped_by!r}"
        return f"NeuronStatistics({len(self.labels)} {kind}, {neurons} neurons, {int(self.num_samples.sum())} samples)"


def _mean_over_blocks(numbers: dict[str, torch.Tensor], widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Numbers of neurons per layer, of shape `(num_labels,)`, averaged over the corresponding layers of all blocks."""
    # Names without the number of the block; in hierarchical models only layers of one width correspond.
    kinds = {layer: (re.sub(r"\.\d+\.", ".*.", layer), width) for layer, width in widths.items()}
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for layer, number in numbers.items():
        found.setdefault(kinds[layer], []).append(number)
    means = {kind: torch.stack(number).float().mean(0).round().int() for kind, number in found.items()}
    return {layer: means[kinds[layer]] for layer in numbers}


def collect_statistics(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    labels_name: str = "labels",
    gather: Callable[[Any], Any] | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
    names: Mapping[int, Label] | None = None,
) -> NeuronStatistics:
    """
    Stream once over the data, in evaluation mode, and count the open gates. Pass the training set without
    augmentation.

    Args:
        model (`nn.Module`): a modular model.
        dataloader (`Iterable`): batches as dictionaries with the model's inputs and its labels: integers of shape
            `(batch_size,)`, or 0 and 1 of shape `(batch_size, num_labels)`.
        labels_name (`str`, *optional*, defaults to `"labels"`): the key in a batch of what is counted: the labels, or
            the groups that `names` names.
        gather (`Callable`, *optional*): joins what several processes computed, such as
            `accelerator.gather_for_metrics`; every process then has the statistics of all.
        seed (`int`, *optional*, defaults to 0): of the reservoir of samples.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.
        names (`Mapping[int, str | int]`, *optional*): for groups of samples instead of the model's labels: integer in
            the batch → name of the group.

    Returns:
        [`NeuronStatistics`]: the counts; `grouped_by` is `labels_name` if there are `names`.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model has no masks or a batch no labels, or none that are classes.

    Example:

    ```python
    >>> by_domain = collect_statistics(model, dataloader, labels_name="domain", names={0: "news", 1: "mail"})
    ```
    """
    layers = {name: layer_sizes(layer)[1] for name, layer in masked_layers(model).items()}
    if not layers:
        raise NemoValueError(f"This {type(model).__name__} has no masks. Train it with `ModularTrainer` first.")
    activations = modular_config(model).gate == "activation"
    if names is None:
        labels_of_model = [model.config.id2label[i] for i in range(model.config.num_labels)]
        statistics = NeuronStatistics(labels_of_model, layers, seed, activations=activations)
    else:
        statistics = NeuronStatistics(list(names.values()), layers, seed, labels_name, activations)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(dataloader, desc="Neuron statistics", disable=disable_tqdm):
            labels = batch.get(labels_name)
            if labels is None:
                raise NemoValueError(
                    f"A batch has no {labels_name!r}, only {', '.join(batch)}. Statistics are per label."
                )
            inputs = {name: value for name, value in batch.items() if name not in (labels_name, "labels")}
            with torch.no_grad(), record_masks(model) as gates:
                model(
                    **{name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
                )
            gates, labels = (gates, labels) if gather is None else gather((gates, labels))
            if names is None:
                check_labels(labels, model.config)
            statistics.update(gates, as_membership(labels) if names is None else _positions(labels, names))
    finally:
        model.train(was_training)
    return statistics


def _positions(groups: torch.Tensor, names: Mapping[int, Label]) -> torch.Tensor:
    """Where the groups of a batch stand among all groups."""
    known = torch.tensor(list(names))
    matches = groups.cpu()[:, None] == known
    if groups.dim() != 1 or not matches.any(1).all():
        raise NemoValueError(
            f"Every sample needs one of the groups {', '.join(map(str, names))}, got {groups.dtype} of shape "
            f"{tuple(groups.shape)} with values {groups.unique().tolist()[:10]}. Name all groups that occur."
        )
    return matches.int().argmax(1)
