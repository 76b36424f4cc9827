# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Long runs: a training that is killed at any moment continues as if nothing had happened."""

import json
import random
import shutil
import time

import interrupted_training
import pytest
import torch
from models import BERT, Samples, arguments, assert_same_state
from transformers import TrainerCallback

from nemo_hf import CheckpointError, ModularTrainer, NemoValueError
from nemo_hf.checkpoints import TRAINER_STATE, is_complete


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINER_STATE)


def trainer_of(output_dir, **options):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
    return ModularTrainer(BERT.model(), arguments(output_dir, **options), train_dataset=Samples(BERT))


def finished(output_dir):
    """Everything that the last checkpoint holds but for the weights, whose bytes can be compared."""
    last = output_dir / f"checkpoint-{interrupted_training.STEPS}"
    states = [torch.load(last / name, weights_only=False) for name in FILES[1:4]]
    history = json.loads((last / TRAINER_STATE).read_text())["log_history"]
    losses = [(entry["step"], entry["loss"], entry["loss_contrastive"]) for entry in history]
    return [(last / FILES[0]).read_bytes(), losses, *map(_plain, states)]


def _plain(state):
    """A nested state with lists of numbers in place of tensors and arrays, exactly comparable."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state


def wait_for(process, step, number):
    while step.value < number and process.is_alive():
        time.sleep(1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_killed_at_ten_random_moments_ends_bit_identical(seed, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process, step = interrupted_training.start(whole)
    wait_for(process, step, 1)
    began = time.perf_counter()
    wait_for(process, step, interrupted_training.STEPS - 1)
    step_time = (time.perf_counter() - began) / (interrupted_training.STEPS - 2)  # with its share of the saving
    process.join()
    assert process.exitcode == 0
    generator = random.Random(seed)
    half_written = 0
    for moment in sorted(generator.randrange(interrupted_training.STEPS - 4) for _ in range(10)):
        process, step = interrupted_training.start(killed)
        wait_for(process, step, moment)
        time.sleep(generator.uniform(0, 2 * step_time))
        process.kill()
        process.join()
        assert process.exitcode == -9  # killed, not finished or failed
        half_written += any(not is_complete(folder) for folder in killed.glob("checkpoint-*"))
    process, _ = interrupted_training.start(killed)
    process.join()
    assert process.exitcode == 0
    assert half_written > 0  # some of the moments were while a checkpoint was written
    assert finished(killed) == finished(whole)


@pytest.mark.parametrize("gone", FILES)
def test_a_half_written_checkpoint_is_passed_over(gone, tmp_path):
    whole = trainer_of(tmp_path)
    whole.train()
    last = tmp_path / "checkpoint-4"
    written_later = FILES[FILES.index(gone) :]
    for name in written_later:
        (last / name).unlink()
    (last / gone).write_bytes(b'{"half')  # the process was killed in this file
    resumed = trainer_of(tmp_path)
    began_at = []

    class Start(TrainerCallback):
        def on_step_begin(self, _args, state, _control, **_):
            began_at.append(state.global_step)

    resumed.add_callback(Start)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is no complete.*trainer_state.json.*checkpoint-2\."):
        resumed.train(resume_from_checkpoint=str(last))
    assert began_at == []
    resumed.train(resume_from_checkpoint=True)
    assert began_at == [2, 3]
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    assert is_complete(last)


def test_without_a_complete_checkpoint_nothing_can_be_resumed(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(NemoValueError, match=r"no complete checkpoint in .*\. Call .train\(\). without"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    trainer_of(tmp_path, max_steps=2).train(resume_from_checkpoint=False)
    assert is_complete(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_is_written_over_is_incomplete_until_it_is_whole(tmp_path):
    trainer_of(tmp_path).train()
    stale = tmp_path / "checkpoint-4" / ".tmp123"  # what safetensors leaves when it is killed
    stale.write_bytes(b"half a model")
    shutil.rmtree(tmp_path / "checkpoint-2")
    again, seen = trainer_of(tmp_path), []
    save_model = again.save_model
    again.save_model = lambda *args, **kwargs: (seen.append(is_complete(stale.parent)), save_model(*args, **kwargs))
    again.train()
    assert seen == [True, False]  # at step 2 the old one of step 4 is whole still
    assert is_complete(stale.parent)
    assert not stale.exists()


def test_what_fails_after_a_checkpoint_is_whole_is_no_failed_write(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, push_to_hub=False)

    def failing(_folder):
        raise OSError("the Hub is away")

    monkeypatch.setattr(trainer, "_push_from_checkpoint", failing)
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    monkeypatch.setattr(trainer, "init_hf_repo", lambda **_: None)
    with pytest.raises(OSError, match="^the Hub is away$"):
        trainer.train()
    assert is_complete(tmp_path / "checkpoint-2")
