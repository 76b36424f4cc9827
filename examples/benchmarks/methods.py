# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What the suites compare. Data alone, so that importing this file costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """
    A way to get modules.

    Args:
        description (`str`): for the table.
        kind (`"plain"`, `"modular"`, `"pruned"` or `"learned"`): trained by the `Trainer` of transformers, its modules
            being itself with logits restricted to the labels; trained by [`~nemo_hf.ModularTrainer`]; the plain model,
            pruned; or the plain model with the masks of [`~nemo_hf.learn_masks`].
        settings (`Mapping[str, Any]`, *optional*): fields of [`~nemo_hf.ModularConfig`] and
            [`~nemo_hf.ModularTrainingArguments`] that are not their defaults, and `threshold` of the masks; arguments
            of [`~nemo_hf.learn_masks`] where they are learned.
        gates (`tuple[str, ...]`, *optional*): what multiplies the neurons of modules; the first is the method's own.
        needs (`tuple[str, ...]`, *optional*): methods whose results on the same row and seed this one starts from.
    """

    description: str
    kind: Literal["plain", "modular", "pruned", "learned"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    gates: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


ROW_RATE = "learning_rate"  # as a setting's value: the learning rate of the row
# The mask generators of the reference code: full width, Kaiming-normal weights, biases one, trained like the weights.
_PUBLISHED = {
    "generator_hidden_size": None,
    "generator_init": "paper",
    "detach_generator_inputs": False,
    "mask_learning_rate": ROW_RATE,
}

METHODS = {
    "standard": Method("the plain model; its modules are itself, logits restricted to the labels", kind="plain"),
    "magnitude": Method(
        "the plain model without its smallest neurons, as large as the modules of nemo_hf",
        kind="pruned",
        gates=("binary",),
        needs=("standard", "nemo_hf"),
    ),
    "learned": Method(
        "the plain model with masks that were learned afterwards", "learned", gates=("binary",), needs=("standard",)
    ),
    "mwt": Method("Modularizing-while-Training", "modular", {"objective": "mwt", **_PUBLISHED}, ("binary",)),
    "moda": Method("MODA", "modular", {"objective": "moda", "gate": "activation"}, ("binary",)),
    "nemo": Method("NeMo as published", "modular", {"objective": "nemo", **_PUBLISHED}, ("binary",)),
    "nemo_hf": Method("the defaults of nemo_hf", "modular", gates=("mean", "binary")),
}
# Learning masks takes as long as another training, and needs to be asked for.
DEFAULT_METHODS = [name for name in METHODS if name != "learned"]
