# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Neuron-level modular training for transformers: train one classifier, cut out a small module for any labels."""

from importlib.metadata import version

from . import families as families  # fills the architecture table
from .architectures import (
    Architecture,
    Attention,
    Chain,
    Convolution,
    FeedForward,
    StockLayout,
    Stream,
    register_architecture,
)
from .auto import AutoModularModel
from .collection import ModuleEntry, list_modules
from .config import ModularConfig
from .errors import CheckpointError, NemoError, NemoRuntimeError, NemoValueError, UnsupportedModelError
from .extraction import constant_gates, extract_module
from .hub import push_modules, save_module
from .mask_learning import learn_masks
from .masking import apply_masks, hold_gates, list_maskable_layers, record_masks, remove_masks
from .module_masks import ModuleMasks, NeuronMask
from .report import write_report
from .schedules import ModularSchedule
from .statistics import NeuronStatistics, collect_statistics
from .trainer import ModularTrainer
from .training_args import ModularTrainingArguments


__version__ = version("nemo_hf")

__all__ = [
    "Architecture",
    "Attention",
    "AutoModularModel",
    "Chain",
    "CheckpointError",
    "Convolution",
    "FeedForward",
    "ModularConfig",
    "ModularSchedule",
    "ModularTrainer",
    "ModularTrainingArguments",
    "ModuleEntry",
    "ModuleMasks",
    "NemoError",
    "NemoRuntimeError",
    "NemoValueError",
    "NeuronMask",
    "NeuronStatistics",
    "StockLayout",
    "Stream",
    "UnsupportedModelError",
    "apply_masks",
    "collect_statistics",
    "constant_gates",
    "extract_module",
    "hold_gates",
    "learn_masks",
    "list_maskable_layers",
    "list_modules",
    "push_modules",
    "record_masks",
    "register_architecture",
    "remove_masks",
    "save_module",
    "write_report",
]
