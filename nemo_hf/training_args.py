# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`ModularTrainingArguments`]: `TrainingArguments` with the weights of the modular objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from .errors import NemoValueError


@dataclass
class ModularTrainingArguments(TrainingArguments):
    """
    The arguments of [`ModularTrainer`]: everything of `transformers.TrainingArguments`, and the modular objective
    `task + alpha · contrastive + compactness · max(0, mean gate − target_retention)`.

    Args:
        objective (`"contrastive"` or `"nemo"`, *optional*, defaults to `"contrastive"`):
            The term that gives every class its own neurons: the corrected supervised contrastive loss, or the one
            that the reference code of NeMo computes.
        alpha (`float`, *optional*, defaults to 0.1): weight of that term.
        temperature (`float`, *optional*, defaults to 0.2): τ of that term.
        compactness (`float`, *optional*, defaults to 1.0): weight of the size term.
        target_retention (`float`, *optional*, defaults to 0.07): mean gate from which the size term stops to pull, in
            (0, 1].
        modular_warmup_ratio (`float`, *optional*, defaults to 0.25): share of the training steps, in [0, 1], over
            which `alpha` and `compactness` grow linearly from zero, so that the task is learnt before neurons are
            given up.
        mask_learning_rate (`float`, *optional*): learning rate of the mask generators. Defaults to `learning_rate`.
        group_column (`str`, *optional*): column of the dataset whose groups of samples (integers or `ClassLabel`) get
            neurons of their own, such as the domain or the language. Defaults to the labels of the task.
        samples_per_label (`int`, *optional*): every training batch holds at least this many samples of each of its
            labels (or groups), for data with so many labels that most would appear once in a batch. From 2 to half
            of the batch size, which it divides. Every sample comes at least once in an epoch; some come again, so that
            labels fill their places. Defaults to batches at random.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if a value is outside its range.

    Example:

    ```python
    >>> from nemo_hf import ModularTrainingArguments
    >>> args = ModularTrainingArguments("modular-vit", target_retention=0.1, report_to="none")
    ```
    """

    objective: Literal["contrastive", "nemo"] = field(
        default="contrastive",
        metadata={
            "help": "Term that organises neurons by class: the corrected contrastive loss, or NeMo's as its reference "
            "computes it."
        },
    )
    alpha: float = field(default=0.1, metadata={"help": "Weight of the contrastive term."})
    temperature: float = field(default=0.2, metadata={"help": "Temperature of the contrastive term."})
    compactness: float = field(default=1.0, metadata={"help": "Weight of the size term; 0 switches it off."})
    target_retention: float = field(
        default=0.07, metadata={"help": "Mean gate, in (0, 1], from which the size term stops to pull."}
    )
    modular_warmup_ratio: float = field(
        default=0.25,
        metadata={"help": "Share of the steps, in [0, 1], over which alpha and compactness grow from zero."},
    )
    mask_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mask generators. Defaults to the learning rate."}
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column whose groups of samples get neurons of their own. Defaults to the task's labels."},
    )
    samples_per_label: int | None = field(
        default=None,
        metadata={"help": "Samples, at least, of each label in a training batch. Defaults to batches at random."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in ("contrastive", "nemo"):
            raise NemoValueError(f"objective must be 'contrastive' or 'nemo', got {self.objective!r}.")
        for name, low in (("alpha", 0), ("compactness", 0), ("mask_learning_rate", 0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise NemoValueError(f"{name} must be a number from {low} up, got {value!r}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise NemoValueError(f"temperature must be above 0, got {self.temperature!r}.")
        warmup = self.modular_warmup_ratio
        if not 0 <= warmup <= 1:
            raise NemoValueError(
                f"modular_warmup_ratio is a share of the steps and must be in [0, 1], got {warmup!r}."
            )
        if not 0 < self.target_retention <= 1:
            raise NemoValueError(
                f"target_retention is a share of neurons and must be in (0, 1], got {self.target_retention!r}."
            )
        if self.group_column in ("label", "label_ids", "labels", *(self.label_names or ())):
            raise NemoValueError(
                f"group_column names another column than the labels of the task, got {self.group_column!r}. Leave it "
                "out: without it gates are organised by label."
            )

        if self.samples_per_label is not None and self.samples_per_label < 2:
            raise NemoValueError(
                f"samples_per_label must be 2 or more, so that samples have partners, got {self.samples_per_label!r}."
            )
        if self.samples_per_label is not None and self.train_sampling_strategy != "random":
            raise NemoValueError(
                f"samples_per_label={self.samples_per_label} and train_sampling_strategy="
                f"{self.train_sampling_strategy!r} both choose the order of the samples. Leave one of them out."
            )

    def modular_arguments(self) -> dict[str, Any]:
        """The arguments that `TrainingArguments` does not have, by name."""
        known = {field.name for field in fields(TrainingArguments)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in known}
