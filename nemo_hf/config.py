# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`ModularConfig`]: which layers carry mask generators, and what these look like."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from transformers.utils import logging

from .errors import NemoValueError


logger = logging.get_logger(__name__)

MODULAR_KIND = "modular"  # `config.nemo["kind"]` of a modular model (a parent)
MODULE_KIND = "module"  # `config.nemo["kind"]` of a module; `slim.py` knows the same word
FORMAT_VERSION = 1
LAYER_GROUPS = ("all", "ffn", "attention")


@dataclass
class ModularConfig:
    """
    Which layers of a model are masked and how their gates are computed.

    Args:
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all"`):
            `"all"` masks the attention projections, the feed-forward layers and the convolutions, `"ffn"` and
            `"attention"` one of the first two.
            A list holds layer names or suffixes of them (`["mlp.fc1"]`). Any other string is a regular expression that
            must match the whole layer name; `config.nemo` of the model then lists the layers that it found.
        skip_first_blocks (`int`, *optional*, defaults to 1):
            Number of encoder blocks, in forward order, that stay unmasked. The paper skips the first.
        generator_hidden_size (`int` or `None`, *optional*, defaults to 16):
            Width of the hidden layer of every mask generator. `None` takes the paper's: the number of gates, or half
            of it from 3073 gates up.
        generator_init (`"open"` or `"paper"`, *optional*, defaults to `"open"`):
            `"open"` starts with every gate near one and a little noise, so that a pretrained model starts from its own
            accuracy. `"paper"` is the initialisation of the reference: Kaiming-normal weights, biases one.
        gate (`"soft"`, `"hard"` or `"activation"`, *optional*, defaults to `"soft"`):
            `"soft"` gates are `relu(tanh(g))`; `"hard"` gates are 0 or 1 in the forward pass, with a straight-through
            gradient. `"activation"` has no generators and changes no output: what counts as the gate of a neuron is
            the mean magnitude of its activations (MODA). Only layers with an activation of their own are then masked.
        detach_generator_inputs (`bool` or `None`, *optional*):
            Whether generators read their inputs without a gradient, so that the weights in front of a layer learn from
            what its gates multiply and not from the gates themselves. `None` detaches unless convolutions are
            masked, which is best for either (docs/benchmarks.md), and not where [`ModularTrainer`] organises gates by
            groups: the task alone need not tell these apart. Publications do not detach.
        activation_threshold (`float` or `None`, *optional*):
            For `gate="activation"`: mean magnitude from which a neuron counts as active. `None` takes 0 behind a ReLU,
            which has exact zeros, and 0.05 behind other activations.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if a value is outside its range.

    Example:

    ```python
    >>> from nemo_hf import ModularConfig
    >>> ModularConfig(target_modules="ffn", generator_hidden_size=8).to_dict()["target_modules"]
    'ffn'
    ```
    """

    target_modules: str | list[str] = "all"
    skip_first_blocks: int = 1
    generator_hidden_size: int | None = 16
    generator_init: Literal["open", "paper"] = "open"
    gate: Literal["soft", "hard", "activation"] = "soft"
    detach_generator_inputs: bool | None = None
    activation_threshold: float | None = None

    def __post_init__(self) -> None:
        if is_pattern(self.target_modules):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise NemoValueError(
                    f"target_modules={self.target_modules!r} is not a valid regular expression ({error}). Use 'all', "
                    "'ffn', 'attention', a list of layer names or suffixes, or a regular expression."
                ) from error
        elif not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules) if isinstance(self.target_modules, Iterable) else []
            if not self.target_modules or not all(isinstance(name, str) for name in self.target_modules):
                raise NemoValueError(
                    f"target_modules must be a string or a non-empty list of strings, got {self.target_modules!r}."
                )
        if not _is_int(self.skip_first_blocks) or self.skip_first_blocks < 0:
            raise NemoValueError(f"skip_first_blocks must be an integer from 0 up, got {self.skip_first_blocks!r}.")
        width = self.generator_hidden_size
        if width is not None and (not _is_int(width) or width < 1):
            raise NemoValueError(
                f"generator_hidden_size must be an integer from 1 up, or None for the paper's width, got {width!r}."
            )
        for name, choices in (("generator_init", ("open", "paper")), ("gate", ("soft", "hard", "activation"))):
            if getattr(self, name) not in choices:
                raise NemoValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if not isinstance(self.detach_generator_inputs, bool | None):
            raise NemoValueError(
                f"detach_generator_inputs must be True, False or None, got {self.detach_generator_inputs!r}."
            )
        threshold = self.activation_threshold
        if threshold is not None and self.gate != "activation":
            raise NemoValueError(f"activation_threshold={threshold!r} has no effect on gate={self.gate!r}.")
        if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold < math.inf):
            raise NemoValueError(f"activation_threshold must be a number from 0 up, or None, got {threshold!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that travels as `config.nemo` of a modular model."""
        return {"kind": MODULAR_KIND, "format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModularConfig:
        """
        The inverse of [`~ModularConfig.to_dict`]. Options that this version does not know are dropped with a warning,
        so that checkpoints of newer versions still load where they can.

        Raises:
            [`~nemo_hf.errors.NemoValueError`]: if `values` does not describe a modular model, or one of a newer
                format, or if they name layers by a regular expression: files come from anywhere, and matching one
                can take forever.
        """
        if not isinstance(values, dict) or values.get("kind", MODULAR_KIND) != MODULAR_KIND:
            raise NemoValueError(f"Expected the `config.nemo` of a modular model, got {values!r}.")
        version = values.get("format", FORMAT_VERSION)
        if not _is_int(version) or version > FORMAT_VERSION:
            raise NemoValueError(
                f"This modular model has format {version!r}; this version of nemo_hf reads formats up to "
                f"{FORMAT_VERSION}. Upgrade nemo_hf to load it."
            )
        targets = values.get("target_modules")
        if is_pattern(targets):
            raise NemoValueError(
                f"`config.nemo` must list the names of its masked layers, got {targets!r:.80}. They are those "
                "in front of `.mask_generator.` in the weights."
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - {"kind", "format"})
        if unknown:
            logger.warning(f"Ignoring options of a newer nemo_hf in `config.nemo`: {', '.join(unknown)}.")
        return cls(**{name: value for name, value in values.items() if name in known})


def is_pattern(target_modules: str | list[str] | None) -> bool:
    """Whether `target_modules` is a regular expression."""
    return isinstance(target_modules, str) and target_modules not in LAYER_GROUPS


def checkpoint_kind(config: object) -> str | None:
    """What `config.nemo` says a model is: [`MODULAR_KIND`], [`MODULE_KIND`], or `None` for a plain model."""
    nemo = getattr(config, "nemo", None)
    return nemo.get("kind") if isinstance(nemo, dict) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
