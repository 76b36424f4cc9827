# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 3 and 8: a module is really small, says where it comes from, and bad input gets a clear error."""

import base64
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from models import BERT, CASES, LABELS, VIT, module_masks, naive_gates, over_models, over_two_models, random_masks
from transformers import PreTrainedModel, ViTConfig

from nemo_hf import ModuleMasks, NemoValueError, UnsupportedModelError, extract_module
from nemo_hf.extraction import resolve_labels
from nemo_hf.metrics import count_flops, count_parameters


HEADS, HEAD_SIZE = 4, 8
# Six linear layers with biases in every block. The others are counted in test_family_shapes.py.
DENSE = {"vit", "deit", "bert", "roberta", "distilbert", "dinov2", "xlm-roberta", "camembert", "electra"}
over_dense_models = pytest.mark.parametrize(
    "case", [case for case in CASES if case.config_class.model_type in DENSE and case.variant != "SwiGLU"], ids=str
)


def expected_parameters(parent, held, labels):
    """Parameters of a module from first principles (METHOD.md 5), for the families with biases everywhere."""
    total = count_parameters(parent)
    kept = {name: gate > 0 for name, gate in held.items()}
    names = list(held)
    for start in range(0, len(names), 6):
        q, k, v, o, up, down = (kept[name] for name in names[start : start + 6])
        width = len(o)
        similarity, values = (q & k).view(HEADS, HEAD_SIZE).sum(1), v.view(HEADS, HEAD_SIZE).sum(1)
        alike = (values > 0) & (similarity == 0)  # they attend to all tokens alike
        own = (values > 0) & (similarity > 0) if alike.sum() > 1 else values > 0
        alike &= ~own
        size = max([1, *torch.maximum(similarity, values)[own].tolist()])
        number = int(own.sum())
        if alike.any():
            several = [(math.ceil(int(values[alike].sum()) / size), size) for size in range(size, HEAD_SIZE + 1)]
            possible = [(number + more, size) for more, size in several if more <= alike.sum()]
            number, size = min(possible, key=lambda heads: heads[0] * (heads[1] + 4))
        units, filled = number * size, int(similarity[own].sum())
        scores = units if 2 * filled > units else filled
        before = 4 * (width * width + width) + 2 * len(up) * width + len(up) + width
        after = (2 * scores + units) * (width + 1) + int(o.sum()) * (units + 1)
        after += int(up.sum()) * (width + 1) + int(down.sum()) * (int(up.sum()) + 1)
        total += after - before
    heads_of_model = [layer for name, layer in parent.named_modules() if getattr(layer, "out_features", 0) == 5]
    return total - sum((5 - labels) * (head.in_features + 1) for head in heads_of_model)


@over_dense_models
def test_a_module_has_exactly_the_parameters_that_are_needed(case, tmp_path):
    parent = case.model()
    masks, gates = random_masks(parent)
    module = extract_module(parent, ModuleMasks(masks, gates), ["elk", "cat"])
    expected = expected_parameters(parent, naive_gates(masks, gates, ["elk", "cat"]), 2)
    assert count_parameters(module) == expected
    assert module.config.nemo["parameter_retention"] == pytest.approx(expected / count_parameters(parent))

    module.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    indices = [entry["shape"][0] for name, entry in header.items() if name.endswith(".index")]
    assert len(indices) == len(module.config.nemo["shapes"]["scatter"])
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + 4 * expected + 8 * sum(indices)
    assert {entry["dtype"] for name, entry in header.items() if not name.endswith(".index")} == {"F32"}


@over_dense_models
def test_attention_shrinks_and_a_removed_neuron_is_gone_from_both_sides(case):
    parent = case.model()
    masks, _ = random_masks(parent)
    q, k, v, o, up, down = list(masks["cat"])[:6]
    mask = {name: torch.ones_like(keep) for name, keep in masks["cat"].items()}
    mask[v][:] = False
    mask[v][9:12] = True  # three units of head 1, none of the others
    mask[q][:] = False
    mask[q][8:13] = True  # five units of head 1 ...
    mask[k][8:10] = False  # ... of which k keeps three
    mask[up][10:] = False
    mask[down][:20] = False
    module = extract_module(parent, ModuleMasks({"cat": mask}), ["cat"])
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name in (q, k, v):
        assert layers[name].weight.shape == (3, 32)
        assert layers[name].bias.shape == (3,)
    assert layers[o].weight.shape == (32, 3)
    assert layers[up].weight.shape == (10, 32)
    assert layers[f"{down}.linear"].weight.shape == (12, 10)
    assert module.get_submodule(down).index.tolist() == list(range(20, 32))
    single = {name: value[:1] for name, value in case.inputs().items()}
    assert count_flops(module, single) < count_flops(parent, single)


@over_models
def test_labels_are_remapped_in_the_order_given(case):
    parent = case.masked()
    config = extract_module(parent, module_masks(parent), ["elk", 1, "cat"]).config
    assert config.id2label == {0: "elk", 1: "bee", 2: "cat"}
    assert config.label2id == {"elk": 0, "bee": 1, "cat": 2}
    assert config.num_labels == 3
    assert config.model_type == f"nemo_{parent.config.model_type}"
    assert len(parent.config.id2label) == 5


@pytest.mark.parametrize("kind", ["mean", "binary"])
@over_two_models
def test_provenance(case, kind):
    parent = case.masked()
    parent.config._name_or_path = "someone/modular"
    masks, gates = random_masks(parent)
    module_masks = ModuleMasks(masks, gates, threshold=0.85)
    nemo = extract_module(parent, module_masks, ["elk", "cat"], gates=kind).config.nemo
    assert {
        name: nemo[name] for name in ("kind", "format", "labels", "label_ids", "masks", "threshold", "gates", "layout")
    } == {
        "kind": "module",
        "format": 1,
        "labels": ["elk", "cat"],
        "label_ids": [4, 2],
        "masks": "by hand",
        "threshold": 0.85,
        "gates": kind,
        "layout": "ragged",
    }
    assert nemo["parent"] == {"name_or_path": "someone/modular", "class": str(case)}
    assert list(nemo["neurons"]) == list(masks["elk"])
    kept = 0
    for name, packed in nemo["neurons"].items():
        union = masks["elk"][name] | masks["cat"][name]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8), count=len(union))
        assert bits.astype(bool).tolist() == union.tolist()
        kept += int(union.sum())
    assert nemo["neuron_retention"] == pytest.approx(kept / sum(len(mask) for mask in masks["elk"].values()))
    assert 0 < nemo["parameter_retention"] < 1
    json.dumps(nemo)  # travels in config.json


@over_two_models
def test_a_module_of_one_label_can_be_trained_though_its_parent_was(case):
    parent = case.masked()
    parent(**case.inputs(), labels=torch.tensor([0, 1, 2, 3]))
    assert parent.config.problem_type == "single_label_classification"  # set by transformers, invalid for one label
    module = extract_module(parent, module_masks(parent), ["cat"])
    assert module.config.problem_type is None
    assert parent.config.problem_type == "single_label_classification"
    assert torch.isfinite(module(**case.inputs(), labels=torch.zeros(4)).loss)


def test_gates_default_to_mean_where_there_are_some():
    parent = VIT.masked()
    assert extract_module(parent, module_masks(parent), ["ant"]).config.nemo["gates"] == "mean"
    assert extract_module(parent, module_masks(parent, with_gates=False), ["ant"]).config.nemo["gates"] == "binary"


@torch.no_grad()
def test_masks_may_be_keyed_by_ids():
    parent = BERT.masked()
    masks, gates = random_masks(parent)
    by_id = ModuleMasks(*({LABELS.index(label): value for label, value in part.items()} for part in (masks, gates)))
    by_name = ModuleMasks(masks, gates)
    for labels in (["elk", "cat"], [4, 2]):
        first, second = (extract_module(parent, kind, labels)(**BERT.inputs()).logits for kind in (by_id, by_name))
        assert torch.equal(first, second)


def test_resolve_labels():
    config = VIT.model().config
    assert resolve_labels(config, ["dog", 0]) == [3, 0]
    for labels in ([], "dog", 3, ()):
        with pytest.raises(NemoValueError, match="labels must be a non-empty list of label names or ids, got"):
            resolve_labels(config, labels)
    for unknown in ("cow", 5, -1, True, 1.5):
        with pytest.raises(
            NemoValueError, match=f"Unknown label {unknown!r}. The model's labels are 'ant', .*ids 0 to 4"
        ):
            resolve_labels(config, ["dog", unknown])
    with pytest.raises(NemoValueError, match=r"A label is given twice: \['dog', 3\]"):
        resolve_labels(config, ["dog", 3])
    assert resolve_labels(ViTConfig(id2label={0: "ant", 1: "bee"}), ["bee", 0]) == [1, 0]  # without label2id


def test_bad_input_is_refused():
    parent = VIT.masked()
    masks = module_masks(parent)
    with pytest.raises(NemoValueError, match="Unknown label 'cow'"):
        extract_module(parent, masks, ["cow"])
    with pytest.raises(NemoValueError, match="layout must be .*'ragged'.*got 'dense'"):
        extract_module(parent, masks, ["cat"], layout="dense")
    with pytest.raises(NemoValueError, match="gates must be 'mean' or 'binary', got 'soft'"):
        extract_module(parent, masks, ["cat"], gates="soft")
    with pytest.raises(NemoValueError, match="hold no mean gates.*gates='binary'"):
        extract_module(parent, module_masks(parent, with_gates=False), ["cat"], gates="mean")
    only_cat = ModuleMasks({"cat": dict(masks["cat"])})
    with pytest.raises(NemoValueError, match="There is no mask for label 'dog'. There are masks for 'cat'"):
        extract_module(parent, only_cat, ["cat", "dog"])


def test_masks_of_another_model_are_refused():
    parent = VIT.masked()
    with pytest.raises(NemoValueError, match="for another model: 'bert.encoder.*' is not a maskable layer of ViTFor"):
        extract_module(parent, module_masks(BERT.masked()), ["cat"])
    wider = VIT.model(intermediate_size=80)
    with pytest.raises(NemoValueError, match="for another model: 'vit.layers.1.mlp.fc1' has 64 neurons, the mask 80"):
        extract_module(parent, module_masks(wider), ["cat"])


@over_two_models
def test_a_module_is_not_cut_again(case):
    parent = case.masked()
    module = extract_module(parent, module_masks(parent), ["cat", "dog"])
    with pytest.raises(
        UnsupportedModelError, match="is a module already. Masks and further cuts start from its parent"
    ):
        extract_module(module, module_masks(parent), ["cat"])


def test_several_threads_may_extract():
    parent, functions = VIT.masked(), (PreTrainedModel.init_weights, torch.nn.init.kaiming_uniform_)
    masks = module_masks(parent)

    def logits(label):
        with torch.no_grad():
            return extract_module(parent, masks, [label])(**VIT.inputs()).logits

    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(logits, 5 * LABELS))
    assert all(torch.equal(one, logits(label)) for one, label in zip(found, 5 * LABELS, strict=True))
    assert (PreTrainedModel.init_weights, torch.nn.init.kaiming_uniform_) == functions


@pytest.mark.parametrize("layout", ["ragged", "stock"])
def test_nothing_is_initialised_that_is_loaded_afterwards(layout, monkeypatch):
    """A model of the parent's full size is made; random numbers for all of it took most of the time and memory."""
    parent = VIT.masked(skip_first_blocks=0)

    def draw(*_, **__):
        raise AssertionError("random weights")

    monkeypatch.setattr(VIT.model_class, "_init_weights", draw)
    monkeypatch.setattr("torch.nn.init.kaiming_uniform_", draw)
    extract_module(parent, module_masks(parent), ["cat"], layout=layout)
