# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""`gate="activation"`: no generators, the activations of neurons are recorded and counted, modules are binary."""

import copy
import dataclasses

import pytest
import torch
from models import BERT, RESNET, VIT, Samples, arguments, case_of
from torch import nn

from nemo_hf import (
    AutoModularModel,
    Convolution,
    ModularConfig,
    ModularTrainer,
    NemoRuntimeError,
    NemoValueError,
    NeuronStatistics,
    apply_masks,
    collect_statistics,
    constant_gates,
    extract_module,
    hold_gates,
    list_maskable_layers,
    record_masks,
    remove_masks,
)
from nemo_hf.architectures import ARCHITECTURES


LLAMA = case_of("LlamaForSequenceClassification")
CONFIG = ModularConfig(gate="activation", skip_first_blocks=0, activation_threshold=0.0)
# A layer of each model, its activation, and the dimensions over which activations are averaged.
WATCHED = [
    (VIT, "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.activation_fn", (1,)),
    (LLAMA, "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.act_fn", (1,)),
    (
        RESNET,
        "resnet.encoder.stages.0.layers.0.layer.0.convolution",
        "resnet.encoder.stages.0.layers.0.layer.0.activation",
        (2, 3),
    ),
]
over_watched = pytest.mark.parametrize(
    ("case", "layer", "activation", "dims"), WATCHED, ids=["vit", "llama", "resnet"]
)
over_cases = pytest.mark.parametrize("case", [VIT, BERT, LLAMA, RESNET], ids=str)


def batch_of(case, size=8):
    return Samples(case, size).batch(*range(size))


@over_watched
@torch.no_grad()
def test_the_mean_magnitude_of_activations_is_recorded(case, layer, activation, dims):
    model = case.model().eval()
    batch = {name: value for name, value in batch_of(case).items() if name != "attention_mask"}
    expected_logits = model(**batch).logits
    seen = []
    model.get_submodule(activation).register_forward_hook(lambda _, args, output: seen.append(output))
    apply_masks(model, CONFIG)
    seen.clear()
    with record_masks(model) as masks:
        outputs = model(**batch)
    assert torch.equal(outputs.logits, expected_logits)
    torch.testing.assert_close(masks[layer], seen[0].abs().mean(dims))
    strict = apply_masks(
        case.model().eval(), ModularConfig(gate="activation", skip_first_blocks=0, activation_threshold=0.01)
    )
    with record_masks(strict) as above:
        strict(**batch)
    torch.testing.assert_close(above[layer], masks[layer] * (masks[layer] > 0.01))
    assert 0 < (above[layer] > 0).sum() <= (masks[layer] > 0).sum()


@torch.no_grad()
def test_padding_is_left_out():
    model = apply_masks(BERT.model().eval(), CONFIG)
    batch = batch_of(BERT, 4)
    longer = {name: nn.functional.pad(value, (0, 3)) for name, value in batch.items() if name != "labels"}
    with record_masks(model) as masks:
        model(**batch)
    with record_masks(model) as padded:
        model(**longer)
    for name in masks:
        torch.testing.assert_close(padded[name], masks[name])


@over_cases
def test_masks_come_off_and_survive_a_copy(case):
    model = case.model().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(apply_masks(model, CONFIG))
    assert list(twin.state_dict()) == list(state)
    with record_masks(twin) as masks, torch.no_grad():
        twin(**batch_of(case))
    assert list(masks) == list_maskable_layers(twin)
    remove_masks(twin)
    assert not any(layer._forward_hooks for layer in twin.modules())
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
    with record_masks(model) as masks, torch.no_grad():  # the original still has its own
        model(**batch_of(case))
    assert masks


@over_cases
@torch.no_grad()
def test_a_module_computes_what_its_parent_computes_without_the_neurons(case, tmp_path):
    model = apply_masks(case.model().eval(), ModularConfig(gate="activation", activation_threshold=0.05))
    batch = batch_of(case, 12)
    statistics = collect_statistics(model, [batch], disable_tqdm=True)
    statistics.save_pretrained(tmp_path)
    masks = NeuronStatistics.from_pretrained(tmp_path).module_masks(threshold=0.7)
    assert not masks.has_gates
    assert masks.retention() < 1
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    module = extract_module(model, masks, [1])
    assert module.config.nemo["gates"] == "binary"
    with hold_gates(model, constant_gates(model, masks, [model.config.id2label[1]], "binary")):
        expected = model(**inputs).logits[:, [1]]
    torch.testing.assert_close(module(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert (model(**inputs).logits[:, [1]] - expected).abs().max() > 1e-4
    with pytest.raises(NemoValueError, match="hold no mean gates"):
        extract_module(model, masks, [1], gates="mean")


def test_training_with_moda_switches_neurons_off_and_reloads(tmp_path):
    model = RESNET.model()
    args = arguments(tmp_path, objective="moda", compactness=100.0, max_steps=40, learning_rate=1e-2)
    config = ModularConfig(gate="activation", activation_threshold=0.3)
    trainer = ModularTrainer(model, args, modular_config=config, train_dataset=Samples(RESNET))
    before = trainer.evaluate(Samples(RESNET))["eval_neuron_retention"]
    trainer.train()
    assert trainer.evaluate(Samples(RESNET))["eval_neuron_retention"] < before - 0.1
    trainer.save_model()
    again = AutoModularModel.from_pretrained(tmp_path)
    with record_masks(again) as masks, torch.no_grad():
        again.eval()(**batch_of(RESNET))
    with record_masks(model) as expected, torch.no_grad():
        model.eval()(**batch_of(RESNET))
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_layers_without_an_activation_of_their_own_are_not_masked():
    reasons = list_maskable_layers(VIT.model(), CONFIG, reasons=True)
    assert [name for name, reason in reasons.items() if reason is None] == [
        f"vit.layers.{i}.mlp.fc1" for i in range(3)
    ]
    assert "no activation that is zero at zero is its own" in reasons["vit.layers.1.attention.q_proj"]
    with pytest.raises(NemoValueError, match="query cannot be cut: no activation that is zero at zero"):
        apply_masks(BERT.model(), ModularConfig(gate="activation", target_modules="attention"))
    sigmoid = VIT.model(hidden_act="sigmoid")
    with pytest.raises(
        NemoValueError, match="No layer of this ViTForImageClassification can be masked: no activation"
    ):
        apply_masks(sigmoid, CONFIG)


def test_an_activation_that_two_layers_share_says_nothing_of_either(monkeypatch):
    entry = ARCHITECTURES["resnet"]
    steps = (Convolution("layer.*.convolution", "layer.*.normalization", "layer.0.activation"),)
    chains = (entry.chains[0], dataclasses.replace(entry.chains[1], steps=steps), entry.chains[2])
    monkeypatch.setitem(ARCHITECTURES, "resnet", dataclasses.replace(entry, chains=chains))
    assert list_maskable_layers(RESNET.model(), CONFIG) == ["resnet.embedder.embedder.convolution"]


def test_the_threshold_depends_on_the_activation():
    for hidden_act, threshold in (("relu", 0.0), ("gelu", 0.05)):
        model = apply_masks(VIT.model(hidden_act=hidden_act), ModularConfig(gate="activation"))
        (recorder,) = model.vit.layers[1].mlp.activation_fn._forward_hooks.values()
        assert recorder.threshold == threshold
    with pytest.raises(NemoValueError, match="activation_threshold must be a number from 0 up, or None, got -1"):
        ModularConfig(gate="activation", activation_threshold=-1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_can_be_recomputed(tmp_path, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = VIT.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = ModularTrainer(model, arguments(tmp_path, objective="moda"), train_dataset=Samples(VIT))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if checkpointing and reentrant:
            with pytest.raises(NemoRuntimeError, match="recorded gates carry no gradient"):
                trainer.compute_loss(model.train(), batch_of(VIT))
            return
        trainer.compute_loss(model.train(), batch_of(VIT)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])
