# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The suites of examples/benchmarks: what they measure on, and one at a hundredth of its size by the command line."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import recipes
import suite_run
import torch
from datasets import ClassLabel, Dataset, Features, Image
from magnitude import magnitude_masks, neuron_norms
from methods import METHODS
from PIL import Image as PILImage
from safetensors.torch import load_file
from suite_data import crop_and_flip, draw_subsets, stratified
from transformers import AutoConfig, ViTConfig, ViTForImageClassification

from nemo_hf import ModularConfig, extract_module
from nemo_hf.metrics import count_parameters


BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
LABELS = ["ant", "bee", "cat"]


def tiny_vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))


def test_subsets_are_random_different_and_always_the_same():
    subsets = draw_subsets(10, 5, 20)
    assert subsets == draw_subsets(10, 5, 20)
    assert len({tuple(subset) for subset in subsets}) == 20
    assert all(len(set(subset)) == 5 and subset == sorted(subset) for subset in subsets)
    assert {label for subset in subsets for label in subset} == set(range(10))
    assert draw_subsets(100, 50, 3) != draw_subsets(100, 51, 3)  # no list of all subsets, of which there are 1e29


@pytest.mark.parametrize(("num_labels", "size", "number"), [(6, 3, 20), (6, 2, 15), (10, 9, 10), (10, 10, 1)])
def test_all_subsets_where_there_are_no_more(num_labels, size, number):
    subsets = {tuple(subset) for subset in draw_subsets(num_labels, size, 20)}
    assert len(subsets) == number == math.comb(num_labels, size)


def test_every_label_keeps_its_share_of_the_samples():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    chosen = stratified(labels, 20)
    assert torch.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert chosen.equal(stratified(labels, 20))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert not chosen.equal(torch.arange(20))
    assert torch.bincount(labels[stratified(labels, 4)]).tolist() == [2, 1, 1]  # none is left out
    for all_of_them in (None, 100, 1000):
        assert stratified(labels, all_of_them).equal(torch.arange(100))


def test_crops_move_and_mirror_images():
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).repeat(200, 3, 1, 1)
    images[-1] = 0  # black, as what moves in is
    changed = crop_and_flip({"pixel_values": images, "labels": torch.zeros(200)})["pixel_values"]
    assert changed.shape == images.shape
    assert changed[-1].eq(0).all()
    mirrored = 0
    for image in changed[:-1, 0]:
        inside = image[image > 0].view(-1, int((image > 0).any(0).sum()))  # a rectangle, not only scattered pixels
        steps = inside.diff(dim=1)
        mirrored += bool((steps < 0).any())
        assert steps.abs().eq(1).all()
        assert inside.diff(dim=0).eq(8).all()
    assert 60 < mirrored < 140
    assert len({tuple(image.flatten().tolist()) for image in changed[:, 0]}) > 60


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_magnitude_pruning_reaches_the_asked_size(share, num_labels):
    model = tiny_vit()
    config = ModularConfig()
    parameters = share * count_parameters(model)
    masks, reached = magnitude_masks(model, config, num_labels, parameters)
    assert abs(reached - parameters) < 0.02 * count_parameters(model)
    module = extract_module(model, masks, list(range(num_labels)))
    assert count_parameters(module) == reached
    for name, norms in neuron_norms(model, config).items():
        kept = masks[0][name]
        assert kept.any()
        assert torch.isclose(norms.mean(), torch.tensor(1.0))
        assert kept.all() or norms[kept].min() >= norms[~kept].max()


def test_magnitude_pruning_has_limits():
    model = tiny_vit()
    smallest, _ = magnitude_masks(model, ModularConfig(), 1, 0)
    assert {int(mask.sum()) for mask in smallest[0].values()} == {1}


@pytest.mark.parametrize("name", [*recipes.SMALL, *recipes.PAPER])
def test_rows_are_models_that_transformers_can_make(name):
    row = {**recipes.SMALL, **recipes.PAPER}[name]
    for config in (row.config, row.scaled(0.01).config):
        values = AutoConfig.for_model(row.model_type, **config).to_dict()
        assert {key: values[key] for key in config} == dict(config)
    assert row.scaled(1) == row
    assert row.scaled(0.01).epochs <= max(1, row.epochs / 50)


# ---- From the command line ----


def write_data(folder):
    """Images whose label says which third of them is bright."""
    features = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
    generator = np.random.default_rng(0)
    for split, number in (("train", 240), ("test", 60)):
        labels = generator.integers(0, 3, number)
        pixels = generator.integers(0, 60, (number, 28, 28)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[:, 9 * label : 9 * label + 9] += 150
        images = [PILImage.fromarray(image) for image in pixels]
        data = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.mark.parametrize("published_recipe", [False, True], ids=["adamw", "published recipe"])
@pytest.mark.parametrize("method", ["standard", "nemo_hf"])
def test_a_training_in_pieces_ends_where_a_whole_one_does(method, published_recipe, data, tmp_path, monkeypatch):
    # Batches are drawn one ahead of the steps, so that the crops after a checkpoint are other random ones.
    monkeypatch.setattr(suite_run, "crop_and_flip", lambda batch: batch)
    row = replace(recipes.SMALL["fashion_mnist/vit"].scaled(0.01), epochs=2, published_recipe=published_recipe)
    spec = {"kind": METHODS[method].kind, "seed": 0, "recipe": asdict(row), "settings": {}, "validation": False}
    spec["scale"] = 0.01
    weights = []
    for name, deadlines in (("whole", [math.inf]), ("pieces", [0, 0, math.inf])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(json.dumps(spec))
        for deadline in deadlines:
            run = suite_run.Run(tmp_path / name, str(data), deadline)
            if deadline == 0:  # one step
                with pytest.raises(suite_run.Unfinished):
                    run.train()
            else:
                seconds = run.train()["seconds"]
                assert run.train()["seconds"] == seconds  # not trained again
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-5)


def run_suite(folder, data, *options):
    command = [sys.executable, BENCHMARKS / "suite.py", "--output_dir", folder / "bench", "--scale", "0.01"]
    command += ["--data", f"fashion_mnist={data}", "--rows", "fashion_mnist/vgg", "--num_subsets", "1"]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def test_the_suite_runs_goes_on_and_says_what_failed(data, tmp_path):
    bad = ("--override", "nemo_hf.alpha=-1", "--tag", "bad")
    methods = ("--methods", "standard", "nemo_hf")
    first = run_suite(tmp_path, data, *methods, *bad, "--jobs", "2")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "2 started, 1 failed, 0 left" in first.stdout
    assert "alpha must be a number from 0 up, got -1" in first.stdout

    stopped = run_suite(tmp_path, data, *methods, "--time_limit", "0")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "0 started, 0 failed, 1 left" in stopped.stdout
    second = run_suite(tmp_path, data, *methods)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 started, 0 failed, 0 left" in second.stdout
    third = run_suite(tmp_path, data, *methods)
    assert third.returncode == 0
    assert "0 started, 0 failed, 0 left" in third.stdout
    other = run_suite(tmp_path, data, *methods, "--validation")
    assert other.returncode == 1
    assert "with other options" in other.stderr

    entries = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert [entry["name"] for entry in entries] == ["standard", "nemo_hf, mean", "nemo_hf, binary"]
    for entry in entries:
        (run,) = entry["runs"]
        assert entry["seeds"] == [0]
        assert list(run["by_size"]) == ["1", "2", "3"]
        assert run["by_size"]["1"]["accuracy"] == 1
        assert 0 <= run["module_accuracy"] <= 1
        assert run["training_seconds"] > 0
    assert entries[0]["runs"][0]["by_size"]["2"]["parameter_retention"] == 1
    assert entries[1]["runs"][0]["by_size"]["1"]["parameter_retention"] < 1
    page = (tmp_path / "bench" / "results.md").read_text()
    assert "| nemo_hf, mean |" in page
    assert "nan" not in page
    assert (tmp_path / "bench" / "fashion_mnist-vgg.png").stat().st_size > 10_000
