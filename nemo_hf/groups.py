# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups of samples: a column of the dataset, such as the domain, that gates are organised by instead of labels."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import torch

from .errors import NemoValueError


def check_groups(batch: Mapping[str, Any], column: str) -> torch.Tensor:
    """
    The groups of a batch.

    Args:
        batch (`Mapping[str, Any]`): columns by name.
        column (`str`): the group column.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: an integer per sample.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the batch has no such column, or it holds something else.
    """
    if batch.get(column) is None:
        raise _missing(column, batch)
    groups = batch[column]
    if groups.dim() != 1 or groups.is_floating_point():
        raise NemoValueError(
            f"The group column {column!r} must hold one integer per sample, of shape (batch_size,); got "
            f"{groups.dtype} of shape {tuple(groups.shape)}."
        )
    return groups


def check_group_column(dataset: Any, column: str) -> None:
    """
    Refuse a dataset that has no groups, before any training. The column of a `datasets.Dataset` is read; of other
    datasets only what they declare, or their first sample.

    Args:
        dataset: a dataset of dictionaries.
        column (`str`): the group column.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if there is no such column, or it does not hold integers.
    """
    if _is_table_with(dataset, column):
        group_names(dataset, column)
    elif isinstance(dataset, datasets.IterableDataset):
        if dataset.features is not None and column not in dataset.features:
            raise _missing(column, dataset.features)
        feature = (dataset.features or {}).get(column)
        if isinstance(feature, datasets.Value) and not feature.dtype.startswith(("int", "uint", "bool")):
            raise _no_group(column, feature.dtype)
    elif not isinstance(dataset, torch.utils.data.IterableDataset) and len(dataset):
        _group_id(dataset[0], column)


def group_names(dataset: Any, column: str) -> dict[int, str | int]:
    """
    The groups of a dataset: those that its `ClassLabel` feature names, or else the integers that occur, ascending. Of
    a `datasets.Dataset` only the column is read; other datasets without names are read once.

    Args:
        dataset: a dataset of dictionaries.
        column (`str`): the group column.

    Returns:
        `dict[int, str | int]`: value in the column → name.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if a sample has no group, or one that is no integer.
    """
    declared = isinstance(dataset, datasets.Dataset | datasets.IterableDataset) and dataset.features
    feature = declared.get(column) if declared else None
    names = dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else None
    if _is_table_with(dataset, column):
        found = {_as_integer(value, column) for value in dataset.select_columns(column).with_format(None)[column]}
    elif names is None:
        found = {_group_id(sample, column) for sample in _samples(dataset)}
    else:
        return names
    if names is None:
        return {value: value for value in sorted(found)}
    if not found <= set(names):
        raise _no_group(column, f"{min(found - set(names))}, which its ClassLabel feature does not name")
    return names


def _samples(dataset: Any) -> Iterable[Mapping[str, Any]]:
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return dataset
    return (dataset[i] for i in range(len(dataset)))


def _is_table_with(dataset: Any, column: str) -> bool:
    """A column that a transform of the dataset makes when a sample is read is not in its table."""
    return isinstance(dataset, datasets.Dataset) and column in dataset.column_names


def _group_id(sample: Mapping[str, Any], column: str) -> int:
    if column not in sample:
        raise _missing(column, sample)
    return _as_integer(sample[column], column)


def _as_integer(value: Any, column: str) -> int:
    try:
        return operator.index(value)  # integers of Python, NumPy and torch, but no text and no fraction
    except TypeError:
        raise _no_group(column, repr(value)) from None


def _missing(column: str, columns: Iterable[str]) -> NemoValueError:
    return NemoValueError(
        f"Gates are organised by the group of a sample, but there is no column {column!r}, only {', '.join(columns)}. "
        "Keep it in the dataset, and in what a transform or a data collator makes of it. The default collator drops "
        f'strings: encode them with `dataset = dataset.class_encode_column("{column}")`.'
    )


def _no_group(column: str, given: str) -> NemoValueError:
    return NemoValueError(
        f"The group column {column!r} must hold an integer or a ClassLabel for every sample, got {given}. Encode "
        f'strings with `dataset = dataset.class_encode_column("{column}")`; leave out samples without a group.'
    )
