# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Labels that gates can be organised by. Losses, metrics and counts know two forms: integer ids of shape
`(num_samples,)`, and, where a sample may have several labels or none, booleans of shape `(num_samples, num_labels)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from .errors import NemoValueError


REGRESSION = "Regression targets have no classes to organise gates by"
OTHER_COLUMN = 'Organise them by another column of the dataset: ModularTrainingArguments(group_column="domain").'


def check_labels(labels: torch.Tensor, config: PreTrainedConfig) -> None:
    """
    Accept one integer class per sample, or 0 and 1 per sample and label. Reads values: it waits for the device.

    Args:
        labels (`torch.Tensor`): the labels of a batch.
        config (`PreTrainedConfig`): of the model; `num_labels` and `problem_type` count.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for regression targets, token labels, soft labels and samples without one.
    """
    given = f"labels of {labels.dtype} and shape {tuple(labels.shape)}"
    one_fraction = labels.is_floating_point() and labels.shape[1:] in ((), (1,))
    if (
        config.problem_type == "regression"
        or (config.problem_type is None and config.num_labels == 1)  # transformers takes it for a regression
        or (one_fraction and config.problem_type != "multi_label_classification")
    ):
        raise NemoValueError(
            f"{REGRESSION}: got {given}, with num_labels="
            f"{config.num_labels} and problem_type={config.problem_type!r}. {OTHER_COLUMN}"
        )
    if labels.dim() == 1 and not labels.is_floating_point():
        if labels.numel() and labels.min() < 0:
            raise NemoValueError(
                f"Every sample needs a label to organise gates by, but the batch has label {labels.min().item()}, "
                f"which stands for none. Leave these samples out. {OTHER_COLUMN}"
            )
        return
    if labels.shape[1:] != (config.num_labels,) or not ((labels == 0) | (labels == 1)).all():
        raise NemoValueError(
            f"Gates are organised by one integer label per sample, of shape (batch_size,), or by several, as 0 and 1 "
            f"of shape (batch_size, {config.num_labels}); got {given}, with values from {labels.min().item()} to "
            f"{labels.max().item()}. Token labels and soft labels give a sample no class. {OTHER_COLUMN}"
        )


def check_names(names: Iterable[str | int], source: str) -> None:
    """
    Labels, or groups, of one name could not be told apart in masks.

    Args:
        names (`Iterable[str | int]`): all of them.
        source (`str`): where they come from, for the error.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if two are the same.
    """
    names = list(names)
    if len(set(names)) != len(names):
        raise NemoValueError(f"Two labels have the same name: {names!r}. Give {source} distinct ones.")


def ids_by_name(config: PreTrainedConfig) -> dict[str, int]:
    """Label name → id. transformers leaves `config.label2id` empty where only `id2label` was given."""
    return config.label2id or {name: i for i, name in config.id2label.items()}


def labels_of(batch: Any, name: str = "labels") -> torch.Tensor:
    """
    The labels of a batch.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if it is no dictionary of tensors, or has no such entry.
    """
    if not isinstance(batch, Mapping):
        raise NemoValueError(f"Batches must be dictionaries of tensors with {name!r}, got {type(batch).__name__}.")
    labels = batch.get(name)
    if labels is None:
        raise NemoValueError(f"A batch has no {name!r}, only {', '.join(batch)}. Neurons are chosen by label.")
    if not isinstance(labels, torch.Tensor):
        raise NemoValueError(
            f"{name!r} of a batch must be a tensor, got {type(labels).__name__}. Pass a `DataLoader`, not a dataset."
        )
    return labels


def as_membership(labels: torch.Tensor) -> torch.Tensor:
    """Multi-hot labels as booleans; ids as they are."""
    return labels > 0 if labels.dim() > 1 else labels


def membership(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which samples belong to which label.

    Args:
        labels (`torch.Tensor` of shape `(num_samples,)` or `(num_samples, num_labels)`): ids, or booleans.

    Returns:
        The ids that occur, of shape `(num_classes,)`, and booleans of shape `(num_samples, num_classes)`.
    """
    if labels.dim() == 1:
        classes = labels.unique()
        return classes, labels[:, None] == classes
    classes = labels.any(0).nonzero().flatten()
    return classes, labels[:, classes]


def shares_label(labels: torch.Tensor) -> torch.Tensor:
    """
    Which samples have a label in common. A sample without any label has none in common, not even with itself.

    Args:
        labels (`torch.Tensor` of shape `(num_samples,)` or `(num_samples, num_labels)`): ids, or booleans.

    Returns:
        `torch.Tensor` of shape `(num_samples, num_samples)`: booleans.
    """
    if labels.dim() == 1:
        return labels[:, None] == labels[None, :]
    return labels.float() @ labels.float().T > 0
