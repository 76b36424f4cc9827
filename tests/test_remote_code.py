# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 4, third way: a module carries `slim.py` and loads with `trust_remote_code=True` where nemo_hf is not."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from models import BERT, CASES, LLAMA, VIT, module_masks
from PIL import Image
from processors import feature_extractor, image_processor, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline

import nemo_hf
from nemo_hf import Architecture, extract_module, register_architecture, save_module, slim
from nemo_hf.architectures import ARCHITECTURES


ALL_CASES = {str(case): case for case in CASES}
PROCESSORS = {str(VIT): image_processor, str(BERT): tokenizer, "Wav2Vec2ForSequenceClassification": feature_extractor}
LABELS = ["elk", "ant", "cat"]
SLIM = Path(slim.__file__)
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

# Runs where `import nemo_hf` fails: loads all modules with the code beside them and reports the logits.
SCRIPT = """
import json
import sys
from pathlib import Path

sys.modules["nemo_hf"] = None
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
root = Path(sys.argv[1])
results, facts = {}, {}
for folder in sorted(path for path in root.iterdir() if (path / "config.json").exists()):
    auto_class = json.loads((folder / "config.json").read_text())["auto_map"]
    auto_class = getattr(transformers, next(name for name in auto_class if name != "AutoConfig"))
    module, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        results[folder.name] = module(**load_file(root / f"{folder.name}.inputs")).logits.contiguous()
    facts[folder.name] = {
        "class": type(module).__name__,
        "module": type(module).__module__,
        "loading": {name: sorted(map(str, value)) for name, value in info.items() if value},
    }
    if (folder / "sample.json").exists():
        task, sample = json.loads((folder / "sample.json").read_text())
        sample = Image.open(folder / "image.png") if task == "image-classification" else sample
        sample = torch.tensor(sample).numpy() if task == "audio-classification" else sample
        classify = transformers.pipeline(task, model=str(folder), trust_remote_code=True, device="cpu")
        facts[folder.name]["pipeline"] = classify(sample, top_k=3)
    if (folder / "again").exists():
        module.save_pretrained(folder / "again")
        collection = {"subfolder": folder.name, "trust_remote_code": True}  # the code in the root, the modules below
        (root / "slim.py").write_bytes((folder / "slim.py").read_bytes())
        with torch.no_grad():
            module = auto_class.from_pretrained(root, **collection)
            results["subfolder"] = module(**load_file(root / f"{folder.name}.inputs")).logits.contiguous()
try:
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    facts["untrusted"] = str(error)
save_file(results, root / "results.safetensors")
(root / "facts.json").write_text(json.dumps(facts))
"""


def sample_of(name, folder):
    """What a pipeline sees: the task and the sample."""
    if name == str(VIT):
        image = Image.effect_noise((20, 20), 60).convert("RGB")
        image.save(folder / "image.png")
        return "image-classification", image, None
    if name == str(BERT):
        return "text-classification", "w1 w2 w3", "w1 w2 w3"
    sound = torch.randn(300).tolist()
    return "audio-classification", np.asarray(sound, dtype=np.float32), sound


def save_with_processor(name, module, folder):
    """The module with its processor and a sample; returns what the pipeline says here."""
    processor = PROCESSORS[name]()
    save_module(module, folder, processing_class=processor)
    task, sample, as_json = sample_of(name, folder)
    (folder / "sample.json").write_text(json.dumps([task, as_json]))
    kind = {"image": "image_processor", "text": "tokenizer", "audio": "feature_extractor"}[task.split("-")[0]]
    return pipeline(task, model=module, **{kind: processor})(sample, top_k=3)


def run_without_nemo_hf(root):
    (root / "load.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, root / "load.py", root], capture_output=True, text=True, cwd=root, env=environment
    )
    assert run.returncode == 0, run.stderr
    return load_file(root / "results.safetensors"), json.loads((root / "facts.json").read_text())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """One module per case, saved here and loaded there: root, expected values, results, facts."""
    root = tmp_path_factory.mktemp("remote")
    expected, said = {}, {}
    for name, case in ALL_CASES.items():
        parent, folder, inputs = case.model(), root / name, case.inputs()
        module = extract_module(parent, module_masks(parent), LABELS)
        if name in PROCESSORS:
            said[name] = save_with_processor(name, module, folder)
        else:
            module.save_pretrained(folder)
        if name == str(LLAMA):
            (folder / "again").mkdir()
        save_file(inputs, root / f"{name}.inputs")
        with torch.no_grad():
            expected[name] = module(**inputs).logits
    return root, expected, said, *run_without_nemo_hf(root)


def test_the_cases_are_all_families_of_transformers():
    stock = {name for name in ARCHITECTURES if slim._is_stock(slim.CONFIG_MAPPING[name])}
    assert {case.model().config.model_type for case in ALL_CASES.values()} == stock


@pytest.mark.parametrize("name", ALL_CASES)
def test_loaded_where_nemo_hf_is_not_bit_for_bit(loaded, name):
    root, expected, _, results, facts = loaded
    assert torch.equal(results[name], expected[name])
    assert facts[name]["class"] == f"Slim{ALL_CASES[name].model_class.__name__}"
    assert facts[name]["module"].startswith("transformers_modules.")
    assert facts[name]["loading"] == {}
    assert filecmp.cmp(root / name / "slim.py", SLIM, shallow=False)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pipelines_where_nemo_hf_is_not(loaded, name):
    _, _, said, _, facts = loaded
    assert facts[name]["pipeline"] == said[name]
    assert {score["label"] for score in said[name]} == set(LABELS)


def test_nothing_is_executed_without_trust(loaded):
    assert "trust_remote_code=True" in loaded[4]["untrusted"]


@torch.no_grad()
def test_saved_again_and_in_a_subfolder_where_nemo_hf_is_not(loaded):
    root, expected, _, results, _ = loaded
    assert torch.equal(results["subfolder"], expected[str(LLAMA)])
    folder = root / str(LLAMA) / "again"
    again = LLAMA.auto_class.from_pretrained(folder)
    assert type(again).__module__ == "nemo_hf.slim"
    assert torch.equal(again(**LLAMA.inputs()).logits, expected[str(LLAMA)])
    assert filecmp.cmp(folder / "slim.py", SLIM, shallow=False)


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_code_of_a_checkpoint_never_runs_where_nemo_hf_is_imported(tmp_path, trust):
    parent = VIT.model()
    extract_module(parent, module_masks(parent), LABELS).save_pretrained(tmp_path)
    (tmp_path / "slim.py").write_text("raise RuntimeError('executed')")
    module = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(module).__module__ == "nemo_hf.slim"


def test_names_of_slim_classes_resolve():
    assert slim.SlimViTConfig is slim.slim_config_class(ViTConfig)
    assert slim.SlimViTForImageClassification is slim.slim_model_class(ViTForImageClassification)
    assert slim.__getattr__("SlimDonutSwinConfig").model_type == "nemo_donut-swin"  # has no entry in the table
    for name in ("SlimNothing", "Slim", "ViTConfig", "__path__"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            slim.__getattr__(name)


class OwnConfig(ViTConfig):
    model_type = "own_vit"


class OwnViT(ViTForImageClassification):
    config_class = OwnConfig
    _auto_class = "AutoModelForImageClassification"  # as if it came from the Hub


def test_modules_of_own_classes_carry_no_code(tmp_path):
    AutoConfig.register("own_vit", OwnConfig, exist_ok=True)
    AutoModelForImageClassification.register(OwnConfig, OwnViT, exist_ok=True)
    vit = ARCHITECTURES["vit"]
    entry = Architecture("own_vit", {"OwnViT": ("classifier",)}, vit.blocks, vit.attention, vit.feed_forward)
    register_architecture(entry, exist_ok=True)
    parent = OwnViT(
        OwnConfig(**VIT.options, num_labels=5, id2label=dict(enumerate(["ant", "bee", "cat", "dog", "elk"])))
    )
    parent.config.auto_map = {"AutoModelForImageClassification": "own.OwnViT"}
    try:
        extract_module(parent, module_masks(parent), ["cat"]).save_pretrained(tmp_path)
    finally:
        del ARCHITECTURES["own_vit"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "slim.py").exists()
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)).__name__ == "SlimOwnViT"


def test_parents_carry_no_code(tmp_path):
    VIT.masked().save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    assert nemo_hf.AutoModularModel.from_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "vit"
