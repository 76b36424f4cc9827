# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""ModuleMasks: the algebra on selections, figures, files."""

import math

import numpy as np
import pytest
import torch

from nemo_hf import CheckpointError, ModuleMasks, NemoValueError, NeuronMask
from nemo_hf.files import read_tensors, write_tensors


def tensors(*bits):
    return torch.tensor([bit == "1" for bit in bits[0]]), torch.tensor([bit == "1" for bit in bits[1]])


def layers(*bits):
    return dict(zip(("up", "down"), tensors(*bits), strict=True))


MASKS = {"cat": layers("1100", "10"), "dog": layers("0110", "10"), 7: layers("0000", "01")}
GATES = {"cat": {"up": torch.rand(4), "down": torch.rand(2)}}
GATES |= {label: {"up": torch.rand(4), "down": torch.rand(2)} for label in ("dog", 7)}


def equal(mask, *bits):
    return all(torch.equal(mask[layer], expected) for layer, expected in layers(*bits).items())


def test_algebra():
    masks = ModuleMasks(MASKS)
    cat, dog = masks["cat"], masks["dog"]
    assert equal(cat | dog, "1110", "10")
    assert equal(cat & dog, "0100", "10")
    assert equal(cat - dog, "1000", "00")
    assert equal(cat | MASKS[7], "1100", "11")  # a plain dictionary will do
    assert equal(cat, "1100", "10")  # unchanged
    assert isinstance(cat | dog, NeuronMask)
    assert equal(masks.union(), "1110", "11")
    assert equal(masks.union([7, "cat"]), "1100", "11")
    with pytest.raises(NemoValueError, match="only be combined if they are over the same layers"):
        cat | {"up": torch.ones(4, dtype=torch.bool)}


def test_figures():
    masks = ModuleMasks(MASKS)
    assert masks["cat"].retention == pytest.approx(3 / 6)
    assert masks.retention(["cat", "dog"]) == pytest.approx(4 / 6)
    assert masks.retention() == pytest.approx((3 / 6 + 3 / 6 + 1 / 6) / 3)
    assert masks.coupling() == pytest.approx((2 / 4 + 0 + 0) / 3)
    assert math.isnan(ModuleMasks({"cat": MASKS["cat"]}).coupling())
    assert (masks.labels, masks.layers, len(masks)) == (["cat", "dog", 7], ["up", "down"], 3)
    assert ("cat" in masks, 7 in masks, "7" in masks) == (True, True, False)
    assert repr(masks) == "ModuleMasks(3 labels, 2 layers, mean retention 0.389)"


def test_mean_gates_are_the_mean_over_the_labels():
    masks = ModuleMasks(MASKS, GATES)
    mean = masks.mean_gates(["cat", 7])
    torch.testing.assert_close(mean["up"], (GATES["cat"]["up"] + GATES[7]["up"]) / 2)
    assert masks.has_gates
    with pytest.raises(NemoValueError, match=r"hold no mean gates.*module_masks\(\).*gates='binary'"):
        ModuleMasks(MASKS).mean_gates()


def test_unknown_label_is_named_with_the_known_ones():
    masks = ModuleMasks(MASKS, GATES)
    for call in (lambda: masks["cow"], lambda: masks.union(["cow"]), lambda: masks.mean_gates(["cow"])):
        with pytest.raises(NemoValueError, match="no mask for label 'cow'. There are masks for 'cat', 'dog', 7"):
            call()
    with pytest.raises(NemoValueError, match="Name at least one label"):
        masks.union([])
    with pytest.raises(NemoValueError, match="Labels go into a list, got 'cat'"):
        masks.retention("cat")


def test_selections_of_other_sizes_are_not_combined():
    other = ModuleMasks({"cat": layers("1111", "1")})
    with pytest.raises(NemoValueError, match="over the same layers of the same sizes"):
        ModuleMasks({"cat": layers("11", "1")})["cat"] | other["cat"]


def test_integers_of_numpy_are_labels(tmp_path):
    masks = ModuleMasks({np.int64(1): layers("11", "1")})
    masks.save_pretrained(tmp_path)
    assert ModuleMasks.from_pretrained(tmp_path).labels == [1]


@pytest.mark.parametrize(
    ("masks", "gates", "text"),
    [
        ({}, None, "the mask of at least one label"),
        ({"cat": {}}, None, "other layers or sizes"),
        ({"cat": {"up": [True, False]}}, None, "'cat' must hold a boolean tensor for each layer"),
        (
            {"cat": layers("11", "1"), "dog": {"up": tensors("11", "1")[0]}},
            None,
            "'dog' has other layers or sizes.*'cat'",
        ),
        (
            {"cat": layers("11", "1"), "dog": layers("111", "1")},
            None,
            "'dog' has other layers or sizes than that of 'cat'",
        ),
        ({"cat": {"up": torch.ones(3)}}, None, r"'up' for label 'cat' must be a boolean tensor.*torch.float32"),
        ({"cat": {"up": torch.ones(3, 1).bool()}}, None, r"shape \(num_neurons,\), got torch.bool of shape \(3, 1\)"),
        (MASKS, {"cat": GATES["cat"]}, "gates of 'up' for label 'dog' are missing or of another size"),
        (MASKS, GATES | {"dog": {"up": torch.rand(3), "down": torch.rand(2)}}, "gates of 'up' for label 'dog'"),
    ],
)
def test_inconsistent_masks_are_refused(masks, gates, text):
    with pytest.raises(NemoValueError, match=text):
        ModuleMasks(masks, gates)


@pytest.mark.parametrize("gates", [None, GATES], ids=["without gates", "with gates"])
def test_save_and_load_are_inverse(gates, tmp_path):
    masks = ModuleMasks(MASKS, gates, threshold=0.8, origin="learnt")
    masks.save_pretrained(tmp_path)
    loaded = ModuleMasks.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.layers, loaded.threshold) == (masks.labels, masks.layers, 0.8)
    assert loaded.origin == "learnt"
    assert loaded.has_gates is (gates is not None)
    for label in MASKS:
        for layer in masks.layers:
            assert torch.equal(loaded[label][layer], MASKS[label][layer])
            if gates is not None:
                assert torch.equal(loaded.mean_gates([label])[layer], GATES[label][layer])
    assert [file.name for file in tmp_path.iterdir()] == ["module_masks.safetensors"]


@pytest.mark.parametrize(("threshold", "origin"), [(0.8, "statistics"), (None, "by hand")])
def test_files_of_before_that_do_not_say_where_masks_come_from(threshold, origin, tmp_path):
    path = tmp_path / "module_masks.safetensors"
    ModuleMasks(MASKS, threshold=threshold).save_pretrained(tmp_path)
    tensors, description = read_tensors(tmp_path, path.name)
    del description["origin"]
    write_tensors(path, tensors, description)
    assert ModuleMasks.from_pretrained(tmp_path).origin == origin
    write_tensors(path, tensors, {**description, "origin": ["learnt"]})
    with pytest.raises(CheckpointError, match="is damaged .*origin must be one of 'statistics', 'learnt', 'by hand'"):
        ModuleMasks.from_pretrained(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no module_masks.safetensors in"):
        ModuleMasks.from_pretrained(tmp_path)
    ModuleMasks(MASKS).save_pretrained(tmp_path)
    path = tmp_path / "module_masks.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="module_masks.safetensors is damaged or was not written by nemo_hf"):
        ModuleMasks.from_pretrained(tmp_path)
