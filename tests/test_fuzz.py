# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Mutated files: each loads, or raises an error of nemo_hf. Nothing runs, nothing hangs, no memory is taken for what a
file only claims to hold.
"""

import collections
import random
import re
import shutil
import warnings

import pytest
import torch
import transformers
from models import VIT, modular_parent
from test_full_disk import write_masks, write_module, write_statistics
from transformers import AutoModelForImageClassification

from nemo_hf import (
    AutoModularModel,
    ModuleMasks,
    NemoError,
    NeuronStatistics,
    extract_module,
    list_modules,
)
from nemo_hf.auto import load_config
from nemo_hf.collection import ModuleEntry, entry_dict, write_index
from nemo_hf.hub import _item
from nemo_hf.inspection import describe_checkpoint
from nemo_hf.report import read_log_history


pytest.importorskip("resource")  # of Unix
from fuzzing import Watch, mutated_json, mutated_safetensors  # noqa: E402


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A parent with everything beside it, a module, a collection."""
    folder = tmp_path_factory.mktemp("originals")
    parent = modular_parent(VIT)
    parent.save_pretrained(folder / "parent")
    write_statistics(folder / "parent", 0)
    write_masks(folder / "parent", 0)
    (folder / "parent" / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}], "best": null}')
    write_module(folder / "module", 1)
    (folder / "module" / "slim.py").write_text("raise SystemExit('code of the checkpoint ran')")
    (folder / "collection").mkdir()
    entry = ModuleEntry("cat", ["cat"], 0.5, 0.25, 100, 400, parent="ann/vit", groups=[1], accuracy=0.5)
    entries = {name: {**entry_dict(entry), "folder": name} for name in ("cat", "dog")}
    write_index(folder / "collection" / "nemo_modules.json", entries)
    return folder


@torch.no_grad()
def load_parent(folder):
    model = AutoModularModel.from_pretrained(folder)
    assert any(".mask_generator." in name for name, _ in model.named_parameters())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@torch.no_grad()
def load_module(folder):
    # What is no JSON, or of no model type of ours, is for transformers to refuse; nemo_hf's own loaders wrap that.
    load_config(folder)
    AutoModelForImageClassification.from_pretrained(folder)


def use_statistics(folder):
    statistics = NeuronStatistics.from_pretrained(folder)
    repr(statistics)
    statistics.frequency()
    statistics.cohesion()
    masks = statistics.module_masks()
    extract_module(modular_parent(VIT), masks, masks.labels[:1])
    statistics.save_pretrained(folder / "again")
    assert NeuronStatistics.from_pretrained(folder / "again").labels == statistics.labels


def use_masks(folder):
    masks = ModuleMasks.from_pretrained(folder)
    repr(masks)
    masks.coupling()
    extract_module(modular_parent(VIT), masks, masks.labels[:2])
    masks.save_pretrained(folder / "again")
    assert ModuleMasks.from_pretrained(folder / "again").labels == masks.labels


def push(folder):
    _item("name", folder, processing_class=None, metrics=None, base_model=None, dataset=None)


OUT_OF_MEMORY = re.compile("not enough memory|can't allocate|cannot allocate|MemoryError|bad_alloc")
LOADERS = {
    "statistics": ("parent", "neuron_statistics.safetensors", mutated_safetensors, (), use_statistics, 125),
    "masks": ("parent", "module_masks.safetensors", mutated_safetensors, (), use_masks, 125),
    "index": ("collection", "nemo_modules.json", mutated_json, (), list_modules, 150),
    "history": ("parent", "trainer_state.json", mutated_json, (), read_log_history, 100),
    "info of a parent": ("parent", "config.json", mutated_json, (), describe_checkpoint, 75),
    "info of a module": ("module", "config.json", mutated_json, (), describe_checkpoint, 75),
    "info of weights": ("parent", "model.safetensors", mutated_safetensors, (), describe_checkpoint, 75),
    "config of a parent": ("parent", "config.json", mutated_json, (), load_parent, 30),
    "nemo of a parent": ("parent", "config.json", mutated_json, ("nemo",), load_parent, 30),
    "weights of a parent": ("parent", "model.safetensors", mutated_safetensors, (), load_parent, 30),
    "nemo of a module": ("module", "config.json", mutated_json, ("nemo",), load_module, 40),
    "config of a module": ("module", "config.json", mutated_json, (), load_module, 40),
    "shapes of a module": ("module", "config.json", mutated_json, ("nemo", "shapes"), load_module, 50),
    "weights of a module": ("module", "model.safetensors", mutated_safetensors, (), load_module, 30),
    "folder to push": ("module", "config.json", mutated_json, (), push, 30),
}
over_loaders = pytest.mark.parametrize("loader", LOADERS)


def fuzz(loader, times, originals, watch, folder):
    kind, name, mutate, under, load, _ = LOADERS[loader]
    shutil.copytree(originals / kind, folder, dirs_exist_ok=True)
    content = (originals / kind / name).read_bytes()
    load(folder)  # as it is, it loads
    counts = collections.Counter()
    for seed in range(times):
        generator = random.Random(f"{loader} {seed}")
        mutation = mutate(content, generator, under) if under else mutate(content, generator)
        (folder / name).write_bytes(mutation)
        error = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with watch.loading(folder):
                    load(folder)
            except NemoError as raised:
                error = raised
            except BaseException as raised:
                raise AssertionError(f"{loader}, mutation {seed}: {raised!r:.500}") from raised
        counts[type(error).__name__] += 1
        if found := error and OUT_OF_MEMORY.search(f"{error!r} {error.__cause__!r}"):
            raise AssertionError(f"{loader}, mutation {seed}: {found[0]}") from error
    return counts


@pytest.fixture(autouse=True)
def quiet():
    """Reports of weights that do not fit."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


@over_loaders
def test_mutated_files(loader, originals, watch, tmp_path):
    times = LOADERS[loader][-1]
    counts = fuzz(loader, times, originals, watch, tmp_path)
    assert counts.total() - counts["NoneType"] > times // 10  # enough mutations are refused, so they reach the checks


@pytest.mark.slow
@over_loaders
def test_thousands_of_mutated_files(loader, originals, watch, tmp_path):
    counts = fuzz(loader, 30 * LOADERS[loader][-1], originals, watch, tmp_path)
    warnings.warn(f"{loader}: {counts.total()} mutations, {dict(counts)}", stacklevel=1)  # for the record
