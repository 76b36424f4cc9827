# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 8 for checkpoints: what is damaged, foreign or newer is refused with a clear error."""

import json

import pytest
import torch
from models import (
    BERT,
    CASES,
    DEIT_TEACHER,
    RESNET,
    VIT,
    Samples,
    assert_same_state,
    case_of,
    modular_parent,
    module_masks,
    over_two_models,
    plain_parent,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from nemo_hf import (
    AutoModularModel,
    CheckpointError,
    ModularConfig,
    NemoError,
    NemoValueError,
    extract_module,
    list_maskable_layers,
    push_modules,
    save_module,
)
from nemo_hf.inspection import describe_checkpoint
from nemo_hf.model_card import pipeline_task


def saved_module(case, folder):
    parent = modular_parent(case)
    module = extract_module(parent, module_masks(parent), ["elk", "ant"])
    module.save_pretrained(folder)
    return module


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


FC1, FC2 = "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda c: c["auto_map"].update(AutoModelForImageClassification=3),
            "auto_map must hold the places of classes",
        ),
        (lambda c: c.pop("nemo"), "does not describe a module: .config.nemo. must be.*got None.*extract_module"),
        (lambda c: c["nemo"].update(kind="modular"), "does not describe a module.*kind 'module'"),
        (lambda c: c["nemo"].pop("shapes"), "does not describe a module.*'shapes'"),
        (lambda c: c["nemo"].update(format=2), "has format 2; this version of nemo_hf reads formats up to 1. Upgrade"),
        (lambda c: c["nemo"].pop("format"), "has format None"),
        (lambda c: c["nemo"]["shapes"]["layers"].update({FC1: [32, 65]}), rf"{FC1}' cannot become.*\[32, 65\]"),
        (lambda c: c["nemo"]["shapes"]["layers"].update({FC1: [32, -1]}), rf"{FC1}' cannot become.*\[32, -1\]"),
        (lambda c: c["nemo"]["shapes"]["layers"].update({FC1: [32]}), rf"{FC1}' cannot become.*\[32\]"),
        (lambda c: c["nemo"]["shapes"]["layers"].update({FC1: "all"}), f"{FC1}' cannot become a layer.*'all'"),
        (lambda c: c["nemo"]["shapes"]["layers"].update({"vit.x": [1, 1]}), "'vit.x' cannot become a layer"),
        (
            lambda c: c["nemo"]["shapes"]["attributes"].update({"vit.x": {"a": 1}}),
            "'vit.x' has no number 'a' to set to 1",
        ),
        (
            lambda c: c["nemo"]["shapes"]["attributes"].update({"vit.layers.1.attention": {"head_dim": "x"}}),
            "'vit.layers.1.attention' has no number 'head_dim' to set to 'x'",
        ),
        (
            lambda c: c["nemo"]["shapes"]["attributes"]["vit.layers.1.attention"].update(head_dim=10**12),
            "'vit.layers.1.attention' has no number 'head_dim' to set to 10{12}",
        ),
        (lambda c: c["nemo"]["shapes"].update(attributes=[1]), "'attributes' of its shapes must be a table, got"),
        (lambda c: c["nemo"]["shapes"]["attributes"].update(vit=5), "'vit' of its shapes must be a table, got 5"),
        (lambda c: c["nemo"]["shapes"].update(scatter=[[]]), "'scatter' of its shapes must be a table"),
        (
            lambda c: c["nemo"]["shapes"].update(rotary={"vit.layers.1.attention": 10**12}),
            "'vit.layers.1.attention' cannot have rotary positions of size 10{12}",
        ),
    ],
)
def test_damaged_module_configs_are_refused(change, text, tmp_path):
    saved_module(VIT, tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(CheckpointError, match=text):
        VIT.auto_class.from_pretrained(tmp_path)


@over_two_models
def test_sizes_that_do_not_fit_the_weights_are_refused(case, tmp_path):
    module = saved_module(case, tmp_path)
    name, (inputs, outputs) = next(iter(module.config.nemo["shapes"]["layers"].items()))
    edit_config(tmp_path, lambda config: config["nemo"]["shapes"]["layers"].update({name: [inputs, outputs - 1]}))
    with pytest.raises(CheckpointError, match="mismatch"):
        case.auto_class.from_pretrained(tmp_path)


@over_two_models
def test_truncated_weights_are_refused(case, tmp_path):
    saved_module(case, tmp_path / "module")
    case.masked().save_pretrained(tmp_path / "parent")
    for folder, load in (("module", case.auto_class), ("parent", AutoModularModel)):
        path = tmp_path / folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-64])
        with pytest.raises(CheckpointError, match="MetadataIncompleteBuffer|file not fully covered|incomplete"):
            load.from_pretrained(tmp_path / folder)


@over_two_models
def test_missing_generators_are_named(case, tmp_path):
    case.masked().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = sorted(name for name in tensors if name.endswith("mask_generator.expand.bias"))[0]
    tensors.pop(gone)
    save_file(tensors, path, metadata={"format": "pt"})
    text = r"is damaged: the mask generators .*mask_generator.expand.bias.* are missing from its weights"
    with pytest.raises(CheckpointError, match=text):
        AutoModularModel.from_pretrained(tmp_path)


def test_plain_models_and_modules_are_not_modular(tmp_path):
    VIT.model().save_pretrained(tmp_path / "plain")
    saved_module(VIT, tmp_path / "module")
    with pytest.raises(CheckpointError, match="is not a modular checkpoint: its config has no .nemo. entry"):
        AutoModularModel.from_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="It is a module: load it with the Auto class of its task"):
        AutoModularModel.from_pretrained(tmp_path / "module")
    with pytest.raises(OSError, match="made with .AutoModularModel.from_pretrained"):
        AutoModularModel()


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    saved_module(VIT, tmp_path)
    (tmp_path / "slim.py").write_text("raise SystemExit('the code ran')")
    edit_config(tmp_path, lambda config: config.update(model_type="unheard_of"))
    monkeypatch.setattr("builtins.input", lambda _question: pytest.fail("a question to the user"))
    for load in (AutoModularModel.from_pretrained, lambda folder: push_modules("ann/module", folder)):
        with pytest.raises(CheckpointError, match="The config of .* cannot be read: .*custom code"):
            load(tmp_path)


def test_modular_configs_that_do_not_fit_are_refused(tmp_path):
    VIT.masked().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["nemo"].update(skip_first_blocks=7))
    with pytest.raises(CheckpointError, match="does not fit its model: skip_first_blocks=7 excludes every layer"):
        AutoModularModel.from_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architectures=["Nonesuch"]))
    with pytest.raises(CheckpointError, match=r"no known model class in .architectures.*\['Nonesuch'\]"):
        AutoModularModel.from_pretrained(tmp_path)


def test_a_modular_checkpoint_of_a_newer_format_is_refused(tmp_path):
    VIT.masked().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["nemo"].update(format=2))
    with pytest.raises(CheckpointError, match="format 2"):
        AutoModularModel.from_pretrained(tmp_path)


def test_save_module_refuses_parents_and_a_failure_leaves_the_old_files(tmp_path, monkeypatch):
    with pytest.raises(
        NemoValueError, match="ViTForImageClassification is not a module; make one with .extract_module"
    ):
        save_module(VIT.masked(), tmp_path)
    parent = VIT.masked()
    module = extract_module(parent, module_masks(parent), ["cat"])
    save_module(module, tmp_path / "module")
    before = {file.name: file.read_bytes() for file in (tmp_path / "module").iterdir()}

    class Failing:
        def save_pretrained(self, _folder):
            raise OSError("No space left on device")

    with torch.no_grad():
        module.classifier.bias.add_(1)
    with pytest.raises(OSError, match="No space left"):
        save_module(module, tmp_path / "module", processing_class=Failing())
    assert {file.name: file.read_bytes() for file in (tmp_path / "module").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["module"]


def test_save_module_keeps_a_card_that_is_there(tmp_path):
    parent = BERT.masked()
    module = extract_module(parent, module_masks(parent), ["cat"])
    (tmp_path / "README.md").write_text("mine")
    save_module(module, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\n---\nmine\n" in card
    assert "# Module for cat" in card
    tasks = {"image": "image", "text": "text", "sound": "audio", "spectrogram": "audio"}
    for case in CASES:
        assert pipeline_task(plain_parent(case)) == f"{tasks[case.sees]}-classification"


@pytest.mark.parametrize("case", [case for case in CASES if case is not DEIT_TEACHER], ids=str)
def test_a_reloaded_module_fine_tunes_with_the_plain_trainer(case, tmp_path):
    saved_module(case, tmp_path / "module")
    module = case.auto_class.from_pretrained(tmp_path / "module")
    data = [dict(row, labels=row["labels"] % 2) for row in Samples(case, 16)]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), max_steps=6, learning_rate=5e-3, logging_steps=1, **options)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    trainer = Trainer(module, args, train_dataset=data, eval_dataset=data)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    if not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in module.modules()):
        assert trainer.evaluate()["eval_loss"] < first  # running statistics need more than six steps
    changed = [name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])]
    cut = [name for name in module.config.nemo["shapes"]["layers"] if f"{name}.weight" in before]
    assert any(f"{name}.weight" in changed for name in cut)
    module.save_pretrained(tmp_path / "tuned")
    tuned = case.auto_class.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(tuned(**case.inputs()).logits, module.eval()(**case.inputs()).logits)


@pytest.mark.parametrize("kind", ["module", "parent"])
def test_a_claim_of_a_billion_blocks_is_refused_soon(kind, tmp_path):
    saved_module(VIT, tmp_path) if kind == "module" else VIT.masked().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(num_hidden_layers=10**9))
    load = VIT.auto_class if kind == "module" else AutoModularModel
    with pytest.raises(CheckpointError, match="describes a model of more than 20000 layers"):
        load.from_pretrained(tmp_path)
    assert len(nn.ModuleList(nn.Identity() for _ in range(20_001))) == 20_001  # other models may be as large


def test_a_checkpoint_holds_names_instead_of_a_regular_expression(tmp_path):
    options = {"target_modules": r".*\.mlp\.fc\d", "skip_first_blocks": 0}
    model = VIT.masked(**options)
    names = model.config.nemo["target_modules"]
    assert names == list_maskable_layers(VIT.model(), ModularConfig(**options))
    assert len(names) > 1
    model.save_pretrained(tmp_path)
    assert list_maskable_layers(AutoModularModel.from_pretrained(tmp_path)) == names
    edit_config(tmp_path, lambda config: config["nemo"].update(target_modules=r"(\w+\.?)+!"))
    with pytest.raises(CheckpointError, match="must list the names of its masked layers, got"):
        AutoModularModel.from_pretrained(tmp_path)
    with pytest.raises(NemoError, match="must list the names of its masked layers, got"):
        describe_checkpoint(tmp_path)


def test_a_module_never_replaces_its_parent(tmp_path):
    parent = modular_parent(VIT)
    parent.save_pretrained(tmp_path)
    module = extract_module(parent, module_masks(parent), ["elk", "ant"])
    with pytest.raises(NemoValueError, match="holds a modular model .*, which the module would replace"):
        save_module(module, tmp_path)
    assert_same_state(AutoModularModel.from_pretrained(tmp_path).state_dict(), parent.state_dict())
    with pytest.raises(NemoValueError, match="accuracy of a module must be a share from 0 to 1, got 97"):
        save_module(module, tmp_path / "module", metrics={"accuracy": 97})


@pytest.mark.parametrize("case", [VIT, RESNET, case_of("MobileNetV2ForImageClassification")], ids=str)
def test_a_module_for_other_labels_says_so(case, tmp_path):
    saved_module(case, tmp_path / "module")
    names = ["oak", "elm", "ash"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    tuned = case.auto_class.from_pretrained(tmp_path / "module", ignore_mismatched_sizes=True, **labels)
    assert tuned(**case.inputs()).logits.shape[1] == 3
    save_module(tuned, tmp_path / "tuned")
    assert "# Module for oak, elm, ash" in (tmp_path / "tuned" / "README.md").read_text()
    assert describe_checkpoint(tmp_path / "tuned")["labels"] == names


def test_values_of_the_config_as_with_the_auto_classes(tmp_path):
    BERT.masked().save_pretrained(tmp_path)
    options = {"hidden_dropout_prob": 0.3, "dtype": torch.float64, "attn_implementation": "eager"}
    model, info = AutoModularModel.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert model.config.hidden_dropout_prob == 0.3
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]
    with pytest.raises(CheckpointError, match="nonesuch"):
        AutoModularModel.from_pretrained(tmp_path, nonesuch=1)
