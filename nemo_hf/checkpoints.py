# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a training that may be killed, or whose disk may be full, while one is written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import CheckpointError, NemoValueError
from .files import write_error


TRAINER_STATE = "trainer_state.json"  # `Trainer` writes it after the weights, the optimizer and the random states


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end: a process that is killed in between leaves no whole last file."""
    try:
        return isinstance(json.loads(Path(checkpoint, TRAINER_STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def resumable_checkpoint(choice: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | None:
    """
    The checkpoint that a training continues from.

    Args:
        choice (`str` or `bool`, *optional*): what the user passes as `resume_from_checkpoint`: a checkpoint, or `True`
            for the last complete one.
        output_dir (`str`): the folder of the training.

    Returns:
        `str`, *optional*: its folder, `None` to start afresh.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for `True`, if there is no complete checkpoint.
        [`~nemo_hf.errors.CheckpointError`]: if the named one is incomplete.
    """
    if not choice:
        return None
    last = _last_complete(output_dir)
    if choice is True and last is None:
        raise NemoValueError(
            f"There is no complete checkpoint in {output_dir}. Call `train()` without resume_from_checkpoint."
        )
    if choice is not True and not is_complete(choice):
        remedy = f" The last complete one in {output_dir} is {last}." if last else ""
        raise CheckpointError(
            f"{choice} is no complete checkpoint: it has no readable {TRAINER_STATE}, which is written last.{remedy}"
        )
    return last if choice is True else str(choice)


def _last_complete(output_dir: str | os.PathLike) -> str | None:
    # `get_last_checkpoint` of transformers 5.23 goes by the number alone and finds the half-written folder.
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if number := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name):
            steps[int(number[1])] = folder
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if is_complete(steps[step])), None)


@contextlib.contextmanager
def writing_checkpoint(trainer: Trainer, trial: Any) -> Iterator[None]:
    """
    Around the code that writes the checkpoint of this step. What an earlier training left in its folder is removed
    first: the folder is never a mixture that looks complete.

    Args:
        trainer (`Trainer`): the trainer that writes.
        trial (*optional*): of a hyperparameter search.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the checkpoint could not be written; its folder is removed.
    """
    folder = Path(trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
    if trainer.args.should_save and folder.exists():
        shutil.rmtree(folder)
    trainer.accelerator.wait_for_everyone()  # before another process writes its random state there
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # `torch.save` raises RuntimeError where a disk is full
        if is_complete(folder):
            raise  # what failed came afterwards
        if trainer.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        last = _last_complete(folder.parent)
        state = f"{last} is complete: resume_from_checkpoint=True continues there." if last else "It is the first one."
        raise write_error(folder, error, state) from error
