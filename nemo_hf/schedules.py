# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`ModularSchedule`]: weights of the modular terms that change during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .errors import NemoValueError
from .training_args import ModularTrainingArguments


# The weights, and the terms that each of them multiplies.
WEIGHTED_TERMS = {
    "alpha": ("loss_contrastive", "loss_cohesion"),
    "beta": ("loss_coupling",),
    "compactness": ("loss_compactness",),
}


class ModularSchedule(TrainerCallback):
    """
    Multiplies the weights of the modular terms by factors that depend on the progress of training. Weights without a
    factor of their own grow linearly over `args.modular_warmup_ratio` of the steps, as without this callback.

    The factors follow the global step, so that a resumed training continues where it stopped.

    Args:
        factors (`Callable[[float], float]`): for `alpha`, `beta` or `compactness`: progress in (0, 1] → factor.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for another name, or something that cannot be called.

    Example:

    ```python
    >>> from nemo_hf import ModularSchedule
    >>> schedule = ModularSchedule(compactness=lambda progress: progress**2)
    >>> trainer = ModularTrainer(model, args, train_dataset=train, callbacks=[schedule])
    ```
    """

    def __init__(self, **factors: Callable[[float], float]):
        for name, factor in factors.items():
            if name not in WEIGHTED_TERMS or not callable(factor):
                raise NemoValueError(
                    f"ModularSchedule takes functions of the progress for {', '.join(WEIGHTED_TERMS)}; got "
                    f"{name}={factor!r}."
                )
        self.factors = factors
        self.current: dict[str, float] = {}  # term → factor in this step

    def on_step_begin(
        self, args: ModularTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the factors of the step that begins."""
        progress = (state.global_step + 1) / state.max_steps
        warmth = min(1.0, progress / args.modular_warmup_ratio) if args.modular_warmup_ratio else 1.0
        for name, terms in WEIGHTED_TERMS.items():
            factor = self.factors[name](progress) if name in self.factors else warmth
            self.current.update(dict.fromkeys(terms, factor))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Outside of a training all factors are 1."""
        self.current.clear()

    def factor(self, term: str) -> float:
        """The factor of a term in this step; 1 outside of a training."""
        return self.current.get(term, 1.0)
