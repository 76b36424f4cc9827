# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`ModularTrainingArguments`]: `TrainingArguments` with the weights of the modular objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.utils import logging

from .config import ModularConfig
from .errors import NemoValueError
from .objectives import OBJECTIVE_DEFAULTS


logger = logging.get_logger(__name__)

# Ends of the names of metrics; with several evaluation sets they begin with the name of one.
SMALLER_IS_BETTER = (
    "loss_task",
    "loss_contrastive",
    "loss_cohesion",
    "loss_compactness",
    "neuron_retention",
    "coupling",
)
SHARES = (("modular_warmup_ratio", "steps"), ("target_retention", "neurons"), ("gate_mixing_ratio", "samples"))


@dataclass
class ModularTrainingArguments(TrainingArguments):
    """
    The arguments of [`ModularTrainer`]: everything of `transformers.TrainingArguments`, and the modular objective: the
    loss of the task plus the terms of `objective` plus a size term.

    Weights that are not given are those of the objective; afterwards they can be read here, but for
    `gate_mixing_ratio` of the contrastive one, which depends on the model.

    | | `"contrastive"` | `"nemo"` | `"mwt"` | `"moda"` |
    |---|---|---|---|---|
    | what it is | the corrected contrastive loss | as the reference of NeMo computes it | MwT | MODA, on activations |
    | `alpha` | 0.1 | 0.1 | 0.5 | 1.0 |
    | `beta` | – | – | 1.5 | 1.0 |
    | `compactness` | 2.0 | 0 | 0 | 0.3 |
    | `target_retention` | 0.07 | 0.07 | 0.07 | 0 |
    | `modular_warmup_ratio` | 0.25 | 0 | 0 | 0 |
    | `gate_mixing_ratio` | 0.75, with convolutions 0.5 | 0 | 0 | 0 |

    Args:
        objective (`"contrastive"`, `"nemo"`, `"mwt"` or `"moda"`, *optional*, defaults to `"contrastive"`):
            The terms that give every class its own neurons, see `nemo_hf.objectives`. `"moda"` needs
            `ModularConfig(gate="activation")`.
        alpha (`float`, *optional*): weight of the contrastive term, or of cohesion.
        beta (`float`, *optional*): weight of coupling (`"mwt"` and `"moda"` only).
        temperature (`float`, *optional*, defaults to 0.2): τ of the contrastive term.
        compactness (`float`, *optional*): weight of the size term, see
            [`~nemo_hf.objectives.CompactnessLoss`].
        target_retention (`float`, *optional*): share of open neurons from which the size term stops to pull, in
            [0, 1].
        modular_warmup_ratio (`float`, *optional*): share of the training steps, in [0, 1], over which the weights grow
            linearly from zero, so that the task is learnt before neurons are given up. Other schedules:
            [`ModularSchedule`].
        gate_mixing_ratio (`float`, *optional*): share of the samples, in [0, 1], that are multiplied in training by
            the mean gates of several samples of the batch instead of their own: what happens to them in a module for
            several labels, whose gates are constant. Each process draws from its own batch.
        mask_learning_rate (`float`, *optional*): learning rate of the mask generators. Defaults to `learning_rate`,
            and to five times that for the generators of convolutions.
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

    objective: Literal["contrastive", "nemo", "mwt", "moda"] = field(
        default="contrastive",
        metadata={
            "help": "Terms that organise neurons by class: the corrected contrastive loss, NeMo's as its reference "
            "computes it, MwT's, or MODA's."
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the contrastive term, or of cohesion. Defaults to the objective's."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Weight of coupling, of mwt and moda. Defaults to the objective's."}
    )
    temperature: float = field(default=0.2, metadata={"help": "Temperature of the contrastive term."})
    compactness: float | None = field(
        default=None, metadata={"help": "Weight of the size term; 0 switches it off. Defaults to the objective's."}
    )
    target_retention: float | None = field(
        default=None,
        metadata={
            "help": "Share of open neurons, in [0, 1], from which the size term stops to pull. Defaults to the "
            "objective's."
        },
    )
    modular_warmup_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the steps, in [0, 1], over which alpha, beta and compactness grow from zero. Defaults "
            "to the objective's."
        },
    )
    gate_mixing_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the samples, in [0, 1], that are multiplied by the mean gates of several samples of the "
            "batch, as in a module for several labels. Defaults to the objective's."
        },
    )
    mask_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the mask generators. Defaults to the learning rate, for convolutions times 5."
        },
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
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(SMALLER_IS_BETTER):
            self.greater_is_better = False  # transformers goes by the end of the name
        super().__post_init__()
        if self.objective not in OBJECTIVE_DEFAULTS:
            raise NemoValueError(f"objective must be one of {', '.join(OBJECTIVE_DEFAULTS)}, got {self.objective!r}.")
        if self.beta and not OBJECTIVE_DEFAULTS[self.objective]["beta"]:
            raise NemoValueError(f"beta={self.beta!r} has no effect: objective={self.objective!r} has no such term.")
        for name, value in OBJECTIVE_DEFAULTS[self.objective].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("alpha", "beta", "compactness", "mask_learning_rate", "temperature", *dict(SHARES)):
            if not isinstance(getattr(self, name), Real | None):
                raise NemoValueError(f"{name} must be a number, got {getattr(self, name)!r}.")
        for name in ("alpha", "beta", "compactness", "mask_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise NemoValueError(f"{name} must be a number from 0 up, got {value!r}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise NemoValueError(f"temperature must be above 0, got {self.temperature!r}.")
        for name, share in SHARES:
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise NemoValueError(
                    f"{name} is a share of {share} and must be in [0, 1], got {getattr(self, name)!r}."
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
        if self.samples_per_label is not None and self.auto_find_batch_size:
            raise NemoValueError(
                f"auto_find_batch_size tries batch sizes that samples_per_label={self.samples_per_label} does not "
                "divide. Leave one of them out."
            )

    def modular_arguments(self) -> dict[str, Any]:
        """The arguments that `TrainingArguments` does not have, by name."""
        known = {field.name for field in fields(TrainingArguments)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in known}

    def complete(self, config: ModularConfig | None) -> ModularConfig | None:
        """
        What masks must be like for these arguments, where the config leaves it open: `gate="activation"` for MODA, and
        generators that are not detached for groups.
        """
        if config is None and self.objective == "moda":
            return ModularConfig(gate="activation")
        if self.group_column is None:
            return config
        config = config or ModularConfig()
        if config.gate == "activation" or config.detach_generator_inputs is not None:
            return config
        return replace(config, detach_generator_inputs=False)  # the task alone need not tell groups apart

    def check_masks(self, config: ModularConfig) -> None:
        """
        Whether a model with these masks can be trained with these arguments. Warns of groups that it may not learn.

        Raises:
            [`~nemo_hf.errors.NemoValueError`]: if the objective organises activations and the masks are gates.
        """
        if self.objective == "moda" and config.gate != "activation":
            raise NemoValueError(
                f"objective='moda' organises activations, but the masks of the model have gate={config.gate!r}. Use "
                "ModularConfig(gate='activation'), or objective='mwt', which does the same to gates."
            )
        if self.complete(config) != config:
            logger.warning(
                "The masks of the model were put on without detach_generator_inputs=False. Unless convolutions are "
                f"masked, gates may then not learn the groups of {self.group_column!r}, which the task alone need not "
                "tell apart."
            )
