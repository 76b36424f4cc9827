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
from transformers.utils import logging

from . import metrics
from .errors import CheckpointError, NemoValueError
from .files import read_tensors, write_tensors
from .labels import as_membership, check_labels, check_names, labels_of, membership
from .masking import masked_layers, modular_config, record_masks
from .module_masks import Label, ModuleMasks
from .reservoir import Reservoir
from .slim import layer_sizes


logger = logging.get_logger(__name__)

STATISTICS_FILE = "neuron_statistics.safetensors"
UPDATE_ENTRIES = 32  # pairs of a sample and a label that are copied at a time
RESERVOIR_BYTES = 24 * 2**20  # of all labels together; beyond it there are fewer samples of each


class NeuronStatistics:
    """
    Per label and neuron: the number of samples with an open gate and the sum of gates. Memory is O(labels × neurons),
    whatever the number of samples; a seeded reservoir of bit-packed samples gives the cohesion.

    Args:
        labels (`list[str | int]`): the names of the labels, by id.
        layers (`Mapping[str, int]`): layer name → number of neurons.
        seed (`int`, *optional*, defaults to 0): of the reservoir.
        grouped_by (`str`, *optional*): where the "labels" are groups of samples: the column that holds them.
        reservoir_samples (`int`, *optional*, defaults to 200): samples in the reservoir per label, from 2 up; fewer
            where those of all labels would take more than 24 MiB. `None` keeps all samples: cohesion is then exact,
            and memory grows by one bit per sample, label and neuron.
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
        reservoir_samples: int | None = 200,
        activations: bool = False,
    ):
        self.labels = list(labels)
        check_names(self.labels, "`config.id2label`" if grouped_by is None else "the groups")
        self.layers = dict(layers)
        self.grouped_by = grouped_by
        self.activations = activations
        neurons = sum(self.layers.values())
        self.num_samples = torch.zeros(len(self.labels), dtype=torch.int64)
        self.open_counts = torch.zeros(len(self.labels), neurons, dtype=torch.int32)
        self.gate_sums = torch.zeros(len(self.labels), neurons)
        self.reservoir_samples = reservoir_samples
        self._reservoir = self._new_reservoir(seed)

    def _new_reservoir(self, seed: int | list[int]) -> Reservoir:
        per_label, labels, neurons = self.reservoir_samples, len(self.labels), sum(self.layers.values())
        if per_label is not None:
            if not isinstance(per_label, int) or per_label < 2:
                raise NemoValueError(
                    f"reservoir_samples must be an integer from 2 up (cohesion needs pairs), or None for all samples; "
                    f"got {per_label!r}."
                )
            per_label = max(2, min(per_label, 8 * RESERVOIR_BYTES // max(1, labels * neurons)))
        return Reservoir(labels, neurons, per_label, seed)

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
        size = min(UPDATE_ENTRIES, max(1, len(labels)))  # however many labels samples have, the copies stay small
        for rows, targets in zip(samples.to(device).split(size), ids.to(device).split(size), strict=True):
            self.open_counts.index_add_(0, targets, is_open[rows].to(torch.int32))
            self.gate_sums.index_add_(0, targets, joined[rows])
        self._reservoir.add(ids.numpy(), lambda kept: np.packbits(is_open.cpu().numpy(), axis=1)[samples[kept]])

    def _check(self, labels: torch.Tensor) -> None:
        count = len(self.labels)
        several_each = labels.dtype == torch.bool and labels.shape[1:] == (count,)
        one_each = labels.dim() == 1 and not labels.is_floating_point()
        if not several_each and not (one_each and ((labels >= 0) & (labels < count)).all()):
            raise NemoValueError(
                f"Statistics need one integer label from 0 to {count - 1} per sample (`model.config.num_labels`), or "
                f"booleans of shape (batch_size, {count}); got {labels.dtype} of shape {tuple(labels.shape)} with "
                f"values from {labels.min().item() if labels.numel() else '-'} to "
                f"{labels.max().item() if labels.numel() else '-'}. Leave samples without a label out."
            )

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
            kept = rank < number[:, None]
            for i in seen:
                masks[self.labels[i]][layer] = kept[i]
                gates[self.labels[i]][layer] = means[layer][i]
        return ModuleMasks(masks, None if self.activations else gates, threshold, self.grouped_by, "statistics")

    def cohesion(self, threshold: float = 0.9) -> float:
        """
        Cohesion ([`metrics.cohesion`]) over the samples of the reservoir; the masks of the labels are those of all
        samples. Exact if the reservoir holds all (`reservoir_samples=None`), else an unbiased estimate for them.
        """
        needed = metrics.samples_needed(self.num_samples, threshold)
        scores = [
            metrics.mean_jaccard(self._reservoir.of_label(i, (self.open_counts[i] >= needed[i]).cpu().numpy()))
            for i in np.unique(self._reservoir.labels).tolist()
        ]
        return torch.stack([*scores, torch.tensor(float("nan"))]).nanmean().item()

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `neuron_statistics.safetensors`, from which modules can be extracted later without data."""
        tensors = {
            "num_samples": self.num_samples,
            "open_counts": self.open_counts,
            "gate_sums": self.gate_sums,
            "reservoir_labels": torch.from_numpy(self._reservoir.labels),
            "reservoir_keys": torch.from_numpy(self._reservoir.keys),
            "reservoir_bits": torch.from_numpy(self._reservoir.bits),
        }
        description = {
            "kind": "neuron_statistics",
            "labels": self.labels,
            "layers": self.layers,
            "grouped_by": self.grouped_by,
            "reservoir_samples": self.reservoir_samples,
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
            labels, layers = description["labels"], description["layers"]
            if tensors["open_counts"].shape != (len(labels), sum(layers.values())) or min(layers.values()) < 1:
                raise ValueError("counts and layers do not fit")  # before memory is taken for what the text claims
            statistics = cls(
                labels,
                layers,
                grouped_by=description.get("grouped_by"),  # files of older versions are by label, and of gates
                reservoir_samples=description.get("reservoir_samples", 200),
                activations=description.get("activations", False),
            )
            for name in ("num_samples", "open_counts", "gate_sums"):
                if tensors[name].shape != getattr(statistics, name).shape:
                    raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
                setattr(statistics, name, tensors[name].to(getattr(statistics, name).dtype))
            # Further updates draw new keys, not those of the first samples again.
            statistics._reservoir = statistics._new_reservoir([1, int(statistics.num_samples.sum())])
            statistics._reservoir.restore(*_saved_reservoir(tensors))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{STATISTICS_FILE} in {source} is damaged ({error!r}).") from error
        return statistics

    def __repr__(self) -> str:
        neurons = sum(self.layers.values())
        kind = "labels" if self.grouped_by is None else f"groups of {self.grouped_by!r}"
        return f"NeuronStatistics({len(self.labels)} {kind}, {neurons} neurons, {int(self.num_samples.sum())} samples)"


def _saved_reservoir(tensors: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, keys and bits of the samples."""
    keys, bits = tensors["reservoir_keys"].numpy(), tensors["reservoir_bits"].numpy()
    if keys.ndim == 2:  # files of older versions have a row of slots for every label
        filled = np.isfinite(keys)
        return np.nonzero(filled)[0], keys[filled], bits[filled]
    return tensors["reservoir_labels"].numpy(), keys, bits


def _mean_over_blocks(numbers: dict[str, torch.Tensor], widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Numbers of neurons per layer, of shape `(num_labels,)`, averaged over the corresponding layers of all blocks."""
    # Names without the number of the block; in hierarchical models only layers of one width correspond.
    kinds = {layer: (re.sub(r"\.\d+\.", ".*.", layer), width) for layer, width in widths.items()}
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for layer, number in numbers.items():
        found.setdefault(kinds[layer], []).append(number)
    means = {kind: torch.stack(number).float().mean(0).round().int() for kind, number in found.items()}
    return {layer: means[kinds[layer]] for layer in numbers}


def warn_of_left_statistics(folder: str | os.PathLike) -> None:
    """After weights were written: what lies beside them was counted with others."""
    if os.path.isfile(os.path.join(folder, STATISTICS_FILE)):
        logger.warning(
            f"The {STATISTICS_FILE} in {folder} was collected before the weights beside it were saved. Collect them "
            "anew: `trainer.collect_statistics().save_pretrained(folder)`."
        )


def collect_statistics(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    labels_name: str = "labels",
    gather: Callable[[Any], Any] | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
    names: Mapping[int, Label] | None = None,
    reservoir_samples: int | None = 200,
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
        reservoir_samples (`int`, *optional*, defaults to 200): samples per label that the cohesion is computed over;
            `None` keeps all, bit-packed: see [`NeuronStatistics`].

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
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)] if names is None else names.values()
    grouped_by = None if names is None else labels_name
    activations = modular_config(model).gate == "activation"
    statistics = NeuronStatistics(labels, layers, seed, grouped_by, reservoir_samples, activations)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(dataloader, desc="Neuron statistics", disable=disable_tqdm):
            labels = labels_of(batch, labels_name)
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
