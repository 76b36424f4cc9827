# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The convolutional networks of examples/benchmarks/cnns.py, which a user's file could register in the same way."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import cnns
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from nemo_hf import (
    Architecture,
    Chain,
    Convolution,
    ModularConfig,
    ModularTrainer,
    ModularTrainingArguments,
    ModuleMasks,
    UnsupportedModelError,
    apply_masks,
    architectures,
    constant_gates,
    extract_module,
    hold_gates,
    list_maskable_layers,
    record_masks,
    register_architecture,
    remove_masks,
)
from nemo_hf.maskable import maskable_layers


ROOT = Path(__file__).parent.parent
CNNS_FILE = ROOT / "examples" / "benchmarks" / "cnns.py"


LABELS = ["ant", "bee", "cat", "dog", "elk"]
FAMILIES = {
    "vgg": (cnns.CifarVGGConfig, {"depths": (1, 1, 2, 1, 1)}, 15_253_578),
    "simcnn": (cnns.SimCNNConfig, {"depths": (1, 1, 1, 1, 2)}, 16_040_010),
    "resnet": (cnns.CifarResNetConfig, {"depths": (2, 1, 1, 1)}, 11_173_962),
    "rescnn": (cnns.ResCNNConfig, {}, 16_014_410),
    "mobilenet": (cnns.CifarMobileNetConfig, {}, 3_217_226),
}
over_families = pytest.mark.parametrize("family", list(FAMILIES))


def tiny(family, masked=None):
    """A tiny model in which no bias, norm or running statistic is trivial; `masked`: blocks that masks skip."""
    torch.manual_seed(0)
    config_class, options, _ = FAMILIES[family]
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = AutoModelForImageClassification.from_config(config_class(width_multiplier=1 / 16, **options, **names))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.2 * (torch.rand_like(tensor) if name.endswith("running_var") else torch.randn_like(tensor)))
    if masked is not None:
        apply_masks(model, ModularConfig(skip_first_blocks=masked))
    return model.eval()


def images(number=3):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def random_masks(model, share=0.5):
    """Per label and maskable layer a random mask and random class-mean gates."""
    generator = torch.Generator().manual_seed(2)
    neurons = {name: layer.weight.shape[0] for name, layer in model.named_modules() if hasattr(layer, "weight")}
    names = list_maskable_layers(model)
    masks = {label: {n: torch.rand(neurons[n], generator=generator) < share for n in names} for label in LABELS}
    gates = {label: {n: 0.1 + 0.9 * torch.rand(neurons[n], generator=generator) for n in names} for label in LABELS}
    return masks, gates


@contextlib.contextmanager
def gated_by_hooks(model, held):
    """Multiply what comes out of each batch norm, or of a hidden linear layer, before the activation."""
    hooks = []
    for name, gate in held.items():
        gate = gate[:, None, None] if name.endswith(".convolution") else gate
        hooked = model.get_submodule(name.replace(".convolution", ".norm"))
        hooks.append(hooked.register_forward_hook(lambda _, __, outputs, gate=gate: outputs * gate))
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def check_exact(family, parent, masks, gates, labels, kind):
    """Compare a module with its plain parent, whose layers hooks multiply by the same gates."""
    masks = ModuleMasks(masks, gates)
    module = extract_module(parent, masks, labels, gates=kind)
    plain = tiny(family)
    plain.load_state_dict({n: t for n, t in parent.state_dict().items() if ".mask_generator." not in n})
    with gated_by_hooks(plain, constant_gates(parent, masks, labels, kind)):
        expected = plain(images()).logits[:, [LABELS.index(label) for label in labels]]
    logits = module(images()).logits
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    return module


@over_families
def test_size_is_that_of_the_published_network(family):
    config_class, _, parameters = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config_class(num_labels=10))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@over_families
def test_every_convolution_but_the_first_and_every_hidden_layer_is_masked(family):
    model = tiny(family)
    named = list_maskable_layers(model, reasons=True)
    layers = {name: type(layer).__name__ for name, layer in model.named_modules()}
    assert set(named) == {name for name in layers if layers[name] in ("Conv2d", "Linear")} - {"classifier"}
    unmasked = [name for name, reason in named.items() if reason]
    if family == "mobilenet":
        assert unmasked == [f"layers.{i}.convolution" for i in range(0, 26, 2)]
        assert all(named[name].startswith("shares the gates of layers.") for name in unmasked)
    else:
        assert unmasked == [next(iter(named))]


@over_families
@pytest.mark.parametrize("kind", ["mean", "binary"])
@pytest.mark.parametrize("labels", [["cat"], ["elk", "ant"], LABELS], ids=len)
def test_modules_are_exact(family, kind, labels):
    for skip in (0, 1):
        parent = tiny(family, masked=skip)
        module = check_exact(family, parent, *random_masks(parent), labels, kind)
        assert module(images()).logits.shape == (3, len(labels))


@over_families
def test_modules_with_an_empty_layer_or_everything_kept_are_exact(family):
    parent = tiny(family, masked=0)
    masks, gates = random_masks(parent)
    for name in list_maskable_layers(parent):
        emptied = {label: {**mask, name: torch.zeros_like(mask[name])} for label, mask in masks.items()}
        check_exact(family, parent, emptied, gates, ["dog", "bee"], "mean")
    everything = check_exact(family, parent, *random_masks(parent, share=2), ["dog", "bee"], "mean")
    assert everything.config.nemo["shapes"] == {}
    nothing = check_exact(family, parent, *random_masks(parent, share=-1), ["dog", "bee"], "mean")
    assert nothing.num_parameters() < everything.num_parameters() / 3


def test_a_pointwise_convolution_keeps_the_channels_of_the_depthwise_one_behind_it():
    parent = tiny("mobilenet", masked=1)
    masks, _ = random_masks(parent)
    module = extract_module(parent, ModuleMasks(masks), ["cat"])
    for i in range(1, 26, 2):
        kept = int(masks["cat"][f"layers.{i}.convolution"].sum())
        before, depthwise = module.layers[i - 1].convolution, module.layers[i].convolution
        assert before.out_channels == depthwise.out_channels == depthwise.groups == kept
    assert module.classifier.in_features == int(masks["cat"]["layers.26.convolution"].sum())


def test_several_positions_of_a_channel_leave_the_first_hidden_layer_together():
    parent = tiny("simcnn", masked=1)
    masks, _ = random_masks(parent)
    module = extract_module(parent, ModuleMasks(masks), ["cat"])
    last = [name for name in masks["cat"] if name.startswith("layers.")][-1]
    assert module.hidden[0].linear.in_features == 4 * int(masks["cat"][last].sum())


@over_families
def test_masks_come_off_without_a_trace(family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images()).logits
        remove_masks(apply_masks(model))
        assert torch.equal(model(images()).logits, expected)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@over_families
def test_the_gradient_reaches_every_generator(family):
    model = tiny(family, masked=1).train()
    model(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    generators = {name: p for name, p in model.named_parameters() if ".mask_generator.expand" in name}
    assert len(generators) == 2 * len(list_maskable_layers(model))
    assert [name for name, parameter in generators.items() if not parameter.grad.any()] == []


@over_families
@torch.no_grad()
def test_a_batch_of_one(family):
    model = tiny(family, masked=1)
    together = model(images()).logits
    with record_masks(model) as gates:
        alone = model(images()[:1]).logits
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)
    assert list(gates) == list_maskable_layers(model)
    assert {gate.shape[0] for gate in gates.values()} == {1}
    module = extract_module(model, ModuleMasks(random_masks(model)[0]), ["cat"])
    assert module(images()[:1], return_dict=False)[0].shape == (1, 1)


@over_families
def test_training_statistics_and_the_module_of_a_label_pair(family, tmp_path):
    data = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images(20))]
    arguments = ModularTrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=10, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = ModularTrainer(tiny(family), arguments, train_dataset=data)
    trainer.train()
    masks = trainer.collect_statistics().module_masks()
    assert masks.labels == LABELS
    parent = trainer.model.eval()
    module = extract_module(parent, masks, ["bee", "elk"])
    with torch.no_grad(), hold_gates(parent, constant_gates(parent, masks, ["bee", "elk"], "mean")):
        expected = parent(images()).logits[:, [1, 4]]
        torch.testing.assert_close(module(images()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def register(monkeypatch):
    """Replace the entry of SimCNN, for one test."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))

    def replace(*chains, head="classifier"):
        heads = {"SimCNNForImageClassification": (head,)}
        register_architecture(Architecture("simcnn", heads=heads, chains=chains), exist_ok=True)

    return replace


def step(**changed):
    paths = {"layer": "layers.*.convolution", "norm": "layers.*.norm", "activation": "layers.*.activation"}
    return Convolution(**paths | changed)


@pytest.mark.parametrize(
    ("chain", "head", "message"),
    [
        (Chain((step(),)), "head", "'heads' names 'head', where there is nothing"),
        (Chain((step(layer="layers.*.conv"),)), "classifier", "names 'layers.*.conv', where there is nothing"),
        (
            Chain((step(norm="layers.*.bn"),)),
            "classifier",
            "'chains.norm' names 'layers.0.bn', where there is nothing",
        ),
        (Chain((step(norm="layers.*.activation"),)), "classifier", "names 'layers.0.activation', where there is ReLU"),
        (Chain((step(),), reader="head"), "classifier", "'chains.reader' names 'head', where there is nothing"),
        (Chain((step(),), path="body"), "classifier", "'chains.path' names 'body', where there is nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_entry_that_does_not_fit_says_where(register, chain, head, message):
    register(chain, head=head)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        apply_masks(tiny("simcnn"))


def test_every_step_at_the_top_level_is_a_block(register):
    register(*(Chain((Convolution(f"layers.{i}.convolution", norm=f"layers.{i}.norm"),)) for i in (0, 2, 4)))
    model = tiny("simcnn")
    assert [layer.block for layer in maskable_layers(model)] == [0, 1, 2]
    assert list_maskable_layers(model) == ["layers.2.convolution", "layers.4.convolution"]


RELOAD = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import cnns
from nemo_hf import AutoModularModel

root, results = Path(sys.argv[1]), {}
inputs = load_file(root / "inputs.safetensors")["images"]
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    module = AutoModelForImageClassification.from_pretrained(folder / "module")
    parent = AutoModularModel.from_pretrained(folder / "parent")
    with torch.no_grad():
        results[f"{folder.name}/module"] = module(inputs).logits
        results[f"{folder.name}/parent"] = parent(inputs).logits
save_file(results, root / "results.safetensors")
"""


def test_modules_and_parents_reload_in_a_fresh_process(tmp_path):
    expected = {}
    for family in FAMILIES:
        parent = tiny(family, masked=1)
        module = extract_module(parent, ModuleMasks(*random_masks(parent)), ["dog", "bee"])
        module.save_pretrained(tmp_path / family / "module")
        parent.save_pretrained(tmp_path / family / "parent")
        with torch.no_grad():
            expected[f"{family}/module"] = module(images()).logits
            expected[f"{family}/parent"] = parent(images()).logits
    save_file({"images": images()}, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-c", RELOAD, tmp_path, CNNS_FILE.parent]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "not initialized" not in finished.stderr
    results = load_file(tmp_path / "results.safetensors")
    assert sorted(results) == sorted(expected)
    assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_the_page_about_architectures_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_an_architecture.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))
    exec("\n".join(blocks), {})
