# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""A training in a process of its own that can be killed at any moment and continues where it was."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from unittest import mock

from models import BERT, Samples, arguments
from transformers import TrainerCallback

from nemo_hf import ModularConfig, ModularTrainer
from nemo_hf.checkpoints import is_complete


STEPS, SAVE_STEPS = 40, 2
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])  # processes start from one that has imported everything


class _Progress(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, _args, state, _control, **_):
        self.step.value = state.global_step


def train(output_dir, step):
    """Dropout, several epochs, two learning rates, a schedule: everything that a checkpoint must restore."""
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 2}
    options |= {"learning_rate": 1e-2, "mask_learning_rate": 2e-2, "weight_decay": 0.1, "warmup_steps": 5}
    trainer = ModularTrainer(
        BERT.model(),
        arguments(output_dir, **options, gradient_accumulation_steps=2, lr_scheduler_type="cosine"),
        train_dataset=Samples(BERT, 60),
        modular_config=ModularConfig(generator_init="paper"),
        callbacks=[_Progress(step)],
    )
    trainer.train(resume_from_checkpoint=any(map(is_complete, output_dir.glob("checkpoint-*"))))


def start(output_dir):
    """The process, and its current step as a shared value, -1 before the first."""
    # Python 3.11 finds what it shall preload on the path of the environment only.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    step = CONTEXT.Value("i", -1)
    process = CONTEXT.Process(target=train, args=(output_dir, step))
    process.start()
    return process, step
