# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""A full disk or a folder that is read-only: a clear error, and what was there before is intact."""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from models import LABELS, VIT, Samples, arguments, assert_same_state, modular_parent, module_masks
from processors import image_processor
from test_report import checkpoint, statistics_of

from nemo_hf import AutoModularModel, CheckpointError, ModularTrainer, extract_module, save_module, write_report
from nemo_hf.checkpoints import is_complete


resource = pytest.importorskip("resource")  # of Unix
NOBODY = 65534


@contextlib.contextmanager
def limited(size):
    """No file of this process may grow beyond `size` bytes: every writer meets the error that a full disk gives."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # pytest catches what is printed in files.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def read_only(folder):
    """Nothing in `folder` can be changed, not even by root, who therefore becomes someone else."""
    for path, _, files in os.walk(folder):
        os.chmod(path, 0o555)
        for name in files:
            os.chmod(os.path.join(path, name), 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, _, _ in os.walk(folder):
            os.chmod(path, 0o755)


@pytest.fixture
def folder():
    """Others than the owner cannot reach into `tmp_path`."""
    path = Path(tempfile.mkdtemp())
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_module(folder, version):
    parent = modular_parent(VIT)
    module = extract_module(parent, module_masks(parent), LABELS[: 1 + version])
    save_module(module, folder, processing_class=image_processor(), metrics={"accuracy": 0.5 + 0.1 * version})


def write_statistics(folder, version):
    statistics_of(modular_parent(VIT), LABELS, seed=version).save_pretrained(folder)


def write_masks(folder, version):
    statistics_of(modular_parent(VIT), LABELS, seed=version).module_masks().save_pretrained(folder)


def write_the_report(folder, version):
    source = folder.parent / f"parent-{version}"
    if not source.exists():
        checkpoint(source, LABELS[: 2 + version])
    write_report(source, folder)


WRITERS = [write_module, write_statistics, write_masks, write_the_report]
over_writers = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))


@over_writers
def test_a_full_disk_leaves_what_was_there(write, folder):
    target = folder / "target"
    write(folder / "other", 1)  # everything that the second version needs is there
    write(target, 0)
    before = content(target)
    largest = max(map(len, before.values()))
    for limit in (0, 100, 2000, largest // 2):
        with limited(limit), pytest.raises(CheckpointError, match=f"{target}.* could not be written: .*too large"):
            write(target, 1)
        now = content(target)
        if write is write_the_report:  # each of its files is whole: the old one, or already the new one
            new = content(folder / "other")
            assert now.keys() == before.keys()
            assert all(now[name] == before[name] or limit > len(now[name]) for name in new)
        else:
            assert now == before
        assert {path.name for path in folder.iterdir()} <= {"target", "other", "parent-0", "parent-1"}
    write(target, 1)
    assert content(target).keys() == before.keys()
    assert content(target) != before


@over_writers
def test_a_read_only_folder_is_named_and_unchanged(write, folder):
    target = folder / "target"
    write(folder / "other", 1)
    write(target, 0)
    before = content(folder)
    with read_only(folder):
        for place in (target, folder / "new"):
            text = rf"{place}.* could not be written: .*Permission denied.*before is unchanged.*MB are free"
            with pytest.raises(CheckpointError, match=text):
                write(place, 1)
    assert content(folder) == before


def trainer_of(output_dir, **options):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **options}
    return ModularTrainer(VIT.model(), arguments(output_dir, **options), train_dataset=Samples(VIT))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "limit", [0, 500, 3000, 20_000, 100_000], ids=["first byte", "config", "state", "weights", "optimizer"]
)
def test_a_full_disk_leaves_the_last_good_checkpoint_and_training_continues_there(limit, whole, tmp_path):
    shutil.copytree(Path(whole.args.output_dir, "checkpoint-2"), tmp_path / "checkpoint-2")
    good = content(tmp_path)
    assert max(map(len, good.values())) > limit
    trainer = trainer_of(tmp_path)
    text = r"checkpoint-4 could not be written: .*checkpoint-2 is complete: resume_from_checkpoint=True.*MB are free"
    with limited(limit), pytest.raises(CheckpointError, match=text):
        trainer.train(resume_from_checkpoint=True)
    assert content(tmp_path) == good
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same_state(trainer.model.state_dict(), whole.model.state_dict())


def test_the_first_checkpoint_cannot_be_written(folder):
    output = folder / "output"
    output.mkdir()
    trainer = trainer_of(output)
    text = r"checkpoint-2 could not be written: .*Permission denied.*It is the first one"
    with read_only(output), pytest.raises(CheckpointError, match=text):
        trainer.train()
    assert content(output) == {}


def test_push_stages_nothing_that_is_not_whole(hub, client):
    """The staging folder is on a full disk: nothing is committed."""
    client.run('result = push_modules("ann/full", {"cat": cat}).oid')
    repository = hub.repositories["ann/full"]
    before = dict(repository.branches), repository.content()
    code = """
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, limits[1]))
    try:
        push_modules("ann/full", {{"cat": dog, "dog": dog}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    """
    for limit in (0, 1000, 40_000):
        answer = client(code.format(limit=limit))
        assert "CheckpointError" in answer.kinds, answer.error
        assert "could not be written" in answer.error
        assert (dict(repository.branches), repository.content()) == before
    client.run('push_modules("ann/full", {"cat": dog, "dog": dog})')
    assert repository.content() != before[1]


def test_a_parent_is_whole_after_a_failed_save(folder):
    """`save_pretrained` of transformers: weights go to a temporary name; nothing of them is lost."""
    parent = modular_parent(VIT)
    parent.save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    with limited(20_000), pytest.raises(Exception, match="too large"):
        VIT.masked(seed=1).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not is_complete(folder)
    assert_same_state(AutoModularModel.from_pretrained(folder).state_dict(), parent.state_dict())
    assert torch.equal(AutoModularModel.from_pretrained(folder).classifier.bias, parent.classifier.bias)
