# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches in which every label has several samples, for data with more labels than a batch has places."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Sampler

from .errors import NemoValueError
from .training_args import ModularTrainingArguments


LABEL_COLUMNS = ("labels", "label", "label_ids")  # what the default collator of transformers calls `labels`


class LabelBalancedSampler(Sampler[int]):
    """
    An order of the samples in which every batch holds at least `samples_per_label` samples of each of its labels.

    The samples of a label are shuffled and cut into sets of `samples_per_label`; a last set that is too small is
    filled up with other samples of the label. A label has no two sets in a batch, unless it has more sets than there
    are batches. So every sample comes at least once in an epoch, few come twice, and every batch is full. The order
    depends on the seed and the epoch alone: it is the same in every process and when a training is resumed.

    Args:
        labels (`Iterable[int]`): the label of every sample.
        samples_per_label (`int`): size of a set, from 2 to half of `batch_size`, which it divides.
        batch_size (`int`): samples in a batch.
        seed (`int`): of the order.
        epoch (`Callable[[], int]`): the number of the epoch that starts.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if sets do not fill a batch, or there is only one label.
    """

    def __init__(
        self, labels: Iterable[int], samples_per_label: int, batch_size: int, seed: int, epoch: Callable[[], int]
    ):
        if batch_size % samples_per_label or batch_size < 2 * samples_per_label:
            raise NemoValueError(
                f"samples_per_label={samples_per_label} must divide the batch size of {batch_size} and leave room for "
                "two labels."
            )
        ids, positions = np.unique(np.fromiter(labels, dtype=np.int64), return_inverse=True)
        if len(ids) < 2:
            raise NemoValueError(f"samples_per_label needs samples of several labels, got those of {ids.tolist()}.")
        order = np.argsort(positions, kind="stable")
        self.members = np.split(order, np.bincount(positions).cumsum()[:-1])  # label → its samples
        self.samples_per_label = samples_per_label
        self.sets_per_batch = batch_size // samples_per_label
        self.num_batches = -(-sum(self._sets_needed()) // self.sets_per_batch)
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * self.sets_per_batch * self.samples_per_label

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch()])
        batches: list[list[np.ndarray]] = [[] for _ in range(self.num_batches)]
        loads = np.zeros(self.num_batches, dtype=np.int64)
        numbers = self._numbers_of_sets(generator)
        for label in generator.permutation(len(self.members)):
            chosen = _least_loaded(loads, numbers[label], generator)
            for batch, samples in zip(chosen, self._sets(label, numbers[label], generator), strict=True):
                batches[batch].append(samples)
        for batch in generator.permutation(self.num_batches):
            yield from np.concatenate(batches[batch]).tolist()

    def _sets_needed(self) -> list[int]:
        return [-(-len(samples) // self.samples_per_label) for samples in self.members]

    def _numbers_of_sets(self, generator: np.random.Generator) -> np.ndarray:
        """How many sets each label has in an epoch; random labels have more than they need, to fill the last batch."""
        numbers = np.array(self._sets_needed())
        missing = self.num_batches * self.sets_per_batch - numbers.sum()
        chosen = generator.choice(len(numbers), missing, replace=missing > len(numbers))
        return numbers + np.bincount(chosen, minlength=len(numbers))

    def _sets(self, label: int, number: int, generator: np.random.Generator) -> np.ndarray:
        """`(number, samples_per_label)`: every sample before any comes again, and none twice in a set if possible."""
        samples = generator.permutation(self.members[label])
        size = number * self.samples_per_label
        while len(samples) < size:
            unfinished = samples[len(samples) // self.samples_per_label * self.samples_per_label :]
            others = np.setdiff1d(self.members[label], unfinished)
            samples = np.concatenate([samples, generator.permutation(others), generator.permutation(unfinished)])
        return samples[:size].reshape(number, self.samples_per_label)


def _least_loaded(loads: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """
    The batches that get the sets of a label: each as often as the others, then those with the fewest sets. `loads`
    counts them and never differs by more than one between batches, so that all batches are full in the end.
    """
    everywhere, rest = divmod(number, len(loads))
    emptiest = np.lexsort((generator.random(len(loads)), loads))[:rest]
    loads += everywhere
    loads[emptiest] += 1
    return np.concatenate([np.tile(np.arange(len(loads)), everywhere), emptiest])


def balanced_sampler(
    dataset: Any, args: ModularTrainingArguments, batch_size: int, epoch: Callable[[], int]
) -> LabelBalancedSampler:
    """
    The sampler that `args.samples_per_label` asks for. Of a `datasets.Dataset` only the column of labels, or groups,
    is read; other datasets are read once.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if a sample has not one integer as its label or group.
    """
    wanted = LABEL_COLUMNS if args.group_column is None else (args.group_column,)
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else ()
    column = next((name for name in wanted if name in columns), None)
    if column is not None:
        values = dataset.select_columns(column).with_format(None)[column]
        labels = (_integer(value, column) for value in values)
    else:  # no table, or a column that a transform makes
        labels = (_label(dataset[i], wanted) for i in range(len(dataset)))
    seed = args.seed if args.data_seed is None else args.data_seed
    return LabelBalancedSampler(labels, args.samples_per_label, batch_size, seed, epoch)


def check_sampling(dataset: Any, args: ModularTrainingArguments) -> None:
    """
    Refuse `args.samples_per_label` for a stream of samples, before any training.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if samples of the dataset cannot be chosen.
    """
    if args.samples_per_label is not None and isinstance(dataset, torch.utils.data.IterableDataset):
        raise NemoValueError(
            f"samples_per_label={args.samples_per_label} chooses the samples of a batch, which a stream "
            f"({type(dataset).__name__}) does not allow. Pass a dataset with a length, or leave samples_per_label out."
        )


def _label(sample: Mapping[str, Any], wanted: tuple[str, ...]) -> int:
    for column in wanted:
        if column in sample:
            return _integer(sample[column], column)
    raise NemoValueError(f"samples_per_label needs a column {wanted[0]!r}, the samples have {', '.join(sample)}.")


def _integer(value: Any, column: str) -> int:
    try:
        return operator.index(value)  # integers of Python, NumPy and torch
    except TypeError:
        raise NemoValueError(
            f"samples_per_label needs one integer per sample in the column {column!r}, got {value!r}. Where samples "
            "have several labels, or a value, name another column with `group_column`."
        ) from None
