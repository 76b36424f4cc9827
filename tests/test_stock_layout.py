# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Modules of the stock layout: exact, and loaded by the plain class in a process that knows nothing of nemo_hf."""

import json
import re
import subprocess
import sys

import pytest
import torch
from models import (
    BERT,
    CASES,
    LLAMA,
    VIT,
    Samples,
    case_of,
    close,
    gated_by_hooks,
    logits_of,
    module_masks,
    naive_gates,
    random_masks,
)
from safetensors.torch import load_file, save_file

from nemo_hf import (
    AutoModularModel,
    CheckpointError,
    ModuleMasks,
    UnsupportedModelError,
    apply_masks,
    collect_statistics,
    extract_module,
    save_module,
)
from nemo_hf.architectures import ARCHITECTURES
from nemo_hf.metrics import count_parameters


STOCK_CASES = [case for case in CASES if ARCHITECTURES[case.config_class.model_type].stock]
over_stock_models = pytest.mark.parametrize("case", STOCK_CASES, ids=str)
LABELS = ["elk", "ant"]


def few_neurons(model):
    """Masks and gates of all blocks."""
    return random_masks(model, keep=(0.1, 0.15, 0.2, 0.1, 0.05), skip_first_blocks=0)


def stock_module(case, gates="mean"):
    parent = case.model()
    masks, mean_gates = few_neurons(parent)
    return extract_module(parent, ModuleMasks(masks, mean_gates), LABELS, gates=gates, layout="stock")


@over_stock_models
@pytest.mark.parametrize("kind", ["mean", "binary"])
@torch.no_grad()
def test_a_stock_module_is_exact_small_and_of_the_plain_class(case, kind):
    parent = case.model()
    masks, gates = few_neurons(parent)
    module = extract_module(parent, ModuleMasks(masks, gates), LABELS, gates=kind, layout="stock")
    with gated_by_hooks(parent, naive_gates(masks, gates if kind == "mean" else None, LABELS)):
        expected = logits_of(parent(**case.inputs()))[..., [4, 0]]
    close(logits_of(module(**case.inputs())), expected)
    assert type(module) is case.model_class
    assert type(module.config) is case.config_class
    assert count_parameters(module) < count_parameters(parent)
    assert (module.config.nemo["layout"], module.config.nemo["shapes"]) == ("stock", {})


SCRIPT = """
import json, sys
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
root, results, facts = Path(sys.argv[1]), {}, {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    auto_class = getattr(transformers, json.loads((root / f"{folder.name}.json").read_text()))
    module, info = auto_class.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        results[folder.name] = module(**load_file(root / f"{folder.name}.inputs")).logits.contiguous()
    facts[folder.name] = [type(module).__name__, [name for name, value in info.items() if value]]
assert not any(name.startswith("nemo_hf") for name in sys.modules)
save_file(results, root / "results.safetensors")
(root / "facts.json").write_text(json.dumps(facts))
"""


def test_reloaded_without_nemo_hf_bit_for_bit(tmp_path):
    expected = {}
    for case in STOCK_CASES:
        module = stock_module(case)
        save_module(module, tmp_path / str(case))
        save_file(case.inputs(), tmp_path / f"{case}.inputs")
        (tmp_path / f"{case}.json").write_text(json.dumps(case.auto_class.__name__))
        with torch.no_grad():
            expected[str(case)] = module(**case.inputs()).logits
    run = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results, facts = load_file(tmp_path / "results.safetensors"), json.loads((tmp_path / "facts.json").read_text())
    assert [name for name in expected if not torch.equal(results[name], expected[name])] == []
    assert facts == {str(case): [case.model_class.__name__, []] for case in STOCK_CASES}


def test_heads_and_units_are_padded_to_the_largest_block():
    parent = VIT.model()
    masks = {name: torch.zeros_like(mask) for name, mask in few_neurons(parent)[0]["cat"].items()}
    for name, mask in masks.items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            mask[: 3 if "layers.0" in name else 1] = True
            mask[8:9] = "layers.1" in name
        elif name.endswith("fc1"):
            mask[: 5 if "layers.2" in name else 2] = True
    config = extract_module(parent, ModuleMasks({"cat": masks}), ["cat"], layout="stock").config
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (2, 3, 5)


def test_heads_of_a_decoder_divide_its_width():
    case = case_of("LlamaForSequenceClassification")
    parent = case.model_class(
        case.config_class(**{**case.options, "num_attention_heads": 8, "num_key_value_heads": 8})
    )
    masks = {name: torch.ones_like(mask) for name, mask in few_neurons(parent)[0]["cat"].items()}
    for name, mask in masks.items():
        if name.endswith("v_proj"):
            mask[24:] = False  # three heads stay, but 3 does not divide 32
    module = extract_module(parent, ModuleMasks({"LABEL_0": masks}), ["LABEL_0"], layout="stock")
    assert (module.config.num_attention_heads, module.config.num_key_value_heads, module.config.head_dim) == (4, 4, 8)


def test_a_parent_that_is_not_masked_everywhere_has_no_stock_layout():
    parent = VIT.model()
    masks = module_masks(parent)  # skips the first block
    with pytest.raises(UnsupportedModelError, match=r"block 0 has no masks.*skip_first_blocks=0.*layout='ragged'"):
        extract_module(parent, masks, LABELS, layout="stock")
    assert extract_module(parent, masks, LABELS, layout="auto").config.nemo["layout"] == "ragged"
    parent = case_of("ResNetForImageClassification-basic").model()
    with pytest.raises(UnsupportedModelError, match="ResNetForImageClassification cannot say the sizes"):
        extract_module(parent, module_masks(parent), LABELS, layout="stock")


@pytest.mark.parametrize(("case", "layout"), [(VIT, "stock"), (BERT, "ragged"), (LLAMA, "ragged")], ids=str)
def test_auto_takes_stock_where_it_costs_little(case, layout):
    """ViT with the same masks in all blocks wastes nothing; BERT cannot drop heads."""
    parent = case.model()
    masks = few_neurons(parent)[0]["cat"]
    for name, mask in masks.items():
        if re.search(r"\.(q_proj|k_proj|v_proj|query|key|value)$", name):
            mask[:] = torch.arange(len(mask)) < (4 if name.endswith(("v_proj", "value")) else 3)  # of the first head
        elif name.endswith(("o_proj", "fc2", "output.dense")):
            mask[:] = True
        else:
            mask[:] = masks[re.sub(r"\.\d+\.", ".0.", name)]
    module = extract_module(parent, ModuleMasks({"cat": masks}), ["cat"], layout="auto")
    assert module.config.nemo["layout"] == layout


def test_a_stock_module_is_no_parent(tmp_path):
    module = stock_module(VIT)
    with pytest.raises(UnsupportedModelError, match="ViTForImageClassification is a module already"):
        apply_masks(module)
    save_module(module, tmp_path)
    with pytest.raises(CheckpointError, match="It is a module: load it with the Auto class of its task"):
        AutoModularModel.from_pretrained(tmp_path)


def test_a_uniform_selection_keeps_the_same_number_in_all_blocks():
    parent = VIT.masked(skip_first_blocks=0)
    data = Samples(VIT, size=20)
    statistics = collect_statistics(parent, [data.batch(*range(20))], disable_tqdm=True)
    by_threshold, uniform = statistics.module_masks(0.7), statistics.module_masks(0.7, uniform=True)
    for label in statistics.labels:
        for kind in ("attention.q_proj", "attention.o_proj", "mlp.fc1"):
            layers = [f"vit.layers.{block}.{kind}" for block in range(3)]
            numbers = [int(by_threshold[label][layer].sum()) for layer in layers]
            assert {int(uniform[label][layer].sum()) for layer in layers} == {round(sum(numbers) / 3)}
            for layer in layers:  # the most frequent ones: one selection contains the other
                kept = by_threshold[label][layer] & uniform[label][layer]
                assert kept.sum() == min(by_threshold[label][layer].sum(), uniform[label][layer].sum())
    sizes = {}
    for name, masks in (("threshold", by_threshold), ("uniform", uniform)):
        config = extract_module(parent, masks, ["cat"], layout="stock").config
        sizes[name] = config.intermediate_size
    assert sizes["uniform"] <= sizes["threshold"]
    assert sizes["uniform"] == int(uniform["cat"]["vit.layers.0.mlp.fc1"].sum())


@pytest.mark.parametrize("layout", ["ragged", "stock"])
@torch.no_grad()
def test_biases_follow_their_heads_where_blocks_drop_different_ones(layout):
    case = case_of("BeitForImageClassification-own position bias")
    parent = case.model()
    masks = {name: torch.ones_like(mask) for name, mask in few_neurons(parent)[0]["cat"].items()}
    masks["beit.layers.0.attention.v_proj"][:8] = False  # the first of four heads; the other blocks keep all
    module = extract_module(parent, ModuleMasks({"cat": masks}), ["cat"], layout=layout)
    with gated_by_hooks(parent, {name: mask.float() for name, mask in masks.items()}):
        expected = logits_of(parent(**case.inputs()))[..., [2]]
    close(logits_of(module(**case.inputs())), expected)
