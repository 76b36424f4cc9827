# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 4: modules and parents reload in a fresh process, bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from models import (
    BERT,
    CASES,
    VIT,
    logits_of,
    modular_parent,
    module_masks,
    over_models,
    over_two_models,
    plain_parent,
)
from PIL import Image
from processors import image_processor, tokenizer
from safetensors.torch import load_file, save_file
from transformers import pipeline

from nemo_hf import AutoModularModel, extract_module, list_maskable_layers, record_masks, save_module


TEXTS = ["w1 w2 w3", "w7", "w9 unknown w20 w5 w5"]
LABELS = ["elk", "ant", "cat"]

# Runs in a process of its own: reloads all that the fixture below saved and reports the logits.
SCRIPT = """
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
import nemo_hf
from nemo_hf import AutoModularModel, record_masks

root = Path(sys.argv[1])
results, facts = {}, {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    inputs = load_file(root / f"{folder.name}.inputs")
    auto_class = getattr(transformers, (folder / "auto_class").read_text())
    module, info = auto_class.from_pretrained(folder / "module", output_loading_info=True)
    parent = AutoModularModel.from_pretrained(folder / "parent")
    with torch.no_grad(), record_masks(parent) as gates:
        outputs = {"parent": parent(**inputs).logits, "module": module(**inputs).logits}
    for name, value in (outputs | gates).items():
        results[f"{folder.name}/{name}"] = value.contiguous()
    facts[folder.name] = {
        "classes": [type(module).__name__, type(module.config).__name__, type(parent).__name__],
        "loading": {name: sorted(map(str, value)) for name, value in info.items() if value},
        "training": module.training or parent.training,
        "labels": list(module.config.id2label.values()),
        "model_types": [module.config.model_type]
        + [config.model_type for config in (getattr(module.config, "vision_config", None),) if config],
    }
    if (folder / "texts.json").exists():
        classify = transformers.pipeline("text-classification", model=str(folder / "module"), device="cpu")
        facts[folder.name]["pipeline"] = classify(json.loads((folder / "texts.json").read_text()), top_k=None)
    if (folder / "image.png").exists():
        classify = transformers.pipeline("image-classification", model=str(folder / "module"), device="cpu")
        facts[folder.name]["pipeline"] = classify(Image.open(folder / "image.png"))
save_file(results, root / "results.safetensors")
(root / "facts.json").write_text(json.dumps(facts))
"""


def labels_of(case):
    """Three labels, two or one: every number is reloaded for some families."""
    return LABELS[: 3 - CASES.index(case) % 3]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Everything saved here, reloaded there: expected values, results, facts."""
    root = tmp_path_factory.mktemp("reload")
    expected = {}
    for case in CASES:
        folder, inputs = root / str(case), case.inputs()
        parent = modular_parent(case)
        module = extract_module(parent, module_masks(parent), labels_of(case))
        processor = {VIT: image_processor, BERT: tokenizer}.get(case, lambda: None)()
        save_module(module, folder / "module", processing_class=processor)
        parent.save_pretrained(folder / "parent")
        save_file(inputs, root / f"{case}.inputs")
        (folder / "auto_class").write_text(case.auto_class.__name__)
        with torch.no_grad(), record_masks(parent) as gates:
            outputs = {"parent": parent(**inputs).logits, "module": module(**inputs).logits}
        expected |= {f"{case}/{name}": value for name, value in (outputs | gates).items()}
        if case is BERT:
            (folder / "texts.json").write_text(json.dumps(TEXTS))
            expected["text"] = pipeline("text-classification", model=module, tokenizer=processor)(TEXTS, top_k=None)
        if case is VIT:
            image = Image.effect_noise((20, 20), 60).convert("RGB")
            image.save(folder / "image.png")
            expected["image"] = pipeline("image-classification", model=module, image_processor=processor)(image)
    (root / "reload.py").write_text(SCRIPT)
    run = subprocess.run([sys.executable, root / "reload.py", root], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return root, expected, load_file(root / "results.safetensors"), json.loads((root / "facts.json").read_text())


@over_models
def test_reloaded_in_a_fresh_process_bit_for_bit(reloaded, case):
    root, expected, results, facts = reloaded
    names = [name for name in expected if name.startswith(f"{case}/")]
    gates = list_maskable_layers(modular_parent(case))
    assert len(names) == 2 + len(gates)  # parent, module, and the gates of every layer
    assert [name for name in names if not torch.equal(results[name], expected[name])] == []
    model, config = case.model_class.__name__, case.config_class.__name__
    assert facts[str(case)]["classes"] == [f"Slim{model}", f"Slim{config}", model]
    assert facts[str(case)]["loading"] == {}
    assert facts[str(case)]["training"] is False
    assert facts[str(case)]["labels"] == labels_of(case)
    nested = {"clip": ["clip_vision_model"], "siglip": ["siglip_vision_model"]}.get(case.config_class.model_type, [])
    assert facts[str(case)]["model_types"] == [f"nemo_{case.config_class.model_type}", *nested]
    card = (root / str(case) / "module" / "README.md").read_text()
    assert f"import {case.auto_class.__name__}" in card


def test_pipelines_in_a_fresh_process(reloaded):
    _, expected, _, facts = reloaded
    assert facts[str(BERT)]["pipeline"] == expected["text"]
    assert facts[str(VIT)]["pipeline"] == expected["image"]
    for scores in (*expected["text"], expected["image"]):
        assert {score["label"] for score in scores} == set(LABELS)


@over_models
@torch.no_grad()
def test_the_stock_class_loads_a_parent_as_a_plain_model(reloaded, case):
    root = reloaded[0]
    model, info = case.auto_class.from_pretrained(root / str(case) / "parent", output_loading_info=True)
    if not case.has_two_heads or type(model) is case.model_class:
        assert type(model) is case.model_class
    assert not info["missing_keys"]
    assert all(".mask_generator." in name for name in info["unexpected_keys"])
    torch.testing.assert_close(logits_of(model(**case.inputs())), logits_of(plain_parent(case)(**case.inputs())))


@over_models
@torch.no_grad()
def test_auto_modular_model_restores_weights_config_and_class(reloaded, case):
    folder, original = reloaded[0] / str(case) / "parent", modular_parent(case)
    torch.manual_seed(123)
    model, info = AutoModularModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is case.model_class
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in original.state_dict().items()
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.state_dict().items())
    assert model.config.nemo == original.config.nemo
    assert {p.dtype for p in AutoModularModel.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@over_two_models
@torch.no_grad()
def test_a_module_saved_twice_stays_the_same(case, reloaded, tmp_path):
    module = case.auto_class.from_pretrained(reloaded[0] / str(case) / "module")
    module.save_pretrained(tmp_path / "again")
    again = case.auto_class.from_pretrained(tmp_path / "again")
    assert again.config.nemo == module.config.nemo
    assert torch.equal(again(**case.inputs()).logits, module(**case.inputs()).logits)


@over_two_models
def test_save_module_writes_processor_and_card_and_leaves_no_rest(reloaded, case):
    folder = reloaded[0] / str(case) / "module"
    assert {"config.json", "model.safetensors", "README.md"} < {file.name for file in folder.iterdir()}
    assert any(file.name.startswith(("preprocessor", "processor", "tokenizer")) for file in folder.iterdir())
    assert sorted(file.name for file in folder.parent.iterdir() if file.name.startswith(".")) == []
    card = (folder / "README.md").read_text()
    assert "elk, ant, cat" in card
    assert case.auto_class.__name__ in card
