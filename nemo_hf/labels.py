# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Labels that gates can be organised by. Losses, metrics and counts know two forms: integer ids of shape
`(num_samples,)`, and, where a sample may have several labels or none, booleans of shape `(num_samples, num_labels)`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from .errors import NemoValueError


OTHER_COLUMN = 'Organise them by another column of the dataset: ModularTrainingArguments(group_column="domain").'


def check_labels(labels: torch.Tensor, config: PreTrainedConfig) -> None:
    """
    Accept one integer class per sample, or 0 and 1 per sample and label. Reads values: it waits for the device.

    Args:
        labels (`torch.Tensor`): the labels of a batch.
        config (`PreTrainedConfig`): of the model; `num_labels` and `problem_type` count.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for regression targets, token labels and soft labels.
    """
    given = f"labels of {labels.dtype} and shape {tuple(labels.shape)}"
    one_fraction = labels.is_floating_point() and labels.shape[1:] in ((), (1,))
    if (
        config.problem_type == "regression"
        or (config.problem_type is None and config.num_labels == 1)  # transformers takes it for a regression
        or (one_fraction and config.problem_type != "multi_label_classification")
    ):
        raise NemoValueError(
            f"Regression targets have no classes to organise gates by: got {given}, with num_labels="
            f"{config.num_labels} and problem_type={config.problem_type!r}. {OTHER_COLUMN}"
        )
    if labels.dim() == 1 and not labels.is_floating_point():
        return
    if labels.shape[1:] != (config.num_labels,) or not ((labels == 0) | (labels == 1)).all():
        raise NemoValueError(
            f"Gates are organised by one integer label per sample, of shape (batch_size,), or by several, as 0 and 1 "
            f"of shape (batch_size, {config.num_labels}); got {given}, with values from {labels.min().item()} to "
            f"{labels.max().item()}. Token labels and soft labels give a sample no class. {OTHER_COLUMN}"
        )


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
