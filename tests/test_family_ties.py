# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What `docs/removing_neurons.md` says of single families: windows, biases per head, sizes of v, constants."""

from dataclasses import replace

import pytest
import torch
from models import CASES, LABELS, RESNET, case_of, check_exact, gated_by_hooks, naive_gates, plain_parent, random_masks
from torch import nn

from nemo_hf import (
    ModularConfig,
    ModuleMasks,
    Stream,
    apply_masks,
    extract_module,
    list_maskable_layers,
    record_masks,
    register_architecture,
)
from nemo_hf.architectures import ARCHITECTURES
from nemo_hf.errors import NemoValueError, UnsupportedModelError
from nemo_hf.layers import MaskedLayer
from nemo_hf.maskable import maskable_layers
from nemo_hf.masking import masked_layers
from nemo_hf.resolution import resolve_streams
from nemo_hf.slim import layer_sizes


SWIN, SWINV2 = case_of("SwinForImageClassification"), case_of("Swinv2ForImageClassification")
PVT = case_of("PvtV2ForImageClassification-spatial reduction")
EFFICIENT = case_of("EfficientNetForImageClassification")
WAVLM = case_of("WavLMForSequenceClassification")
DEBERTA, DEBERTA_OWN = (
    case_of(f"DebertaV2ForSequenceClassification-{variant} position projections") for variant in ("shared", "own")
)
SPEECH = [case for case in CASES if case.sees == "sound"]


def cut(case, masks):
    """The parent and an exact module of one label for which layers keep the neurons that the masks say."""
    parent = plain_parent(case)
    return parent, check_exact(case, parent, {"cat": masks}, None, ["cat"], "binary")


@pytest.mark.parametrize("case", [SWIN, SWINV2], ids=str)
@torch.no_grad()
def test_windows_of_an_image_share_one_gate(case):
    model, seen = case.masked(), {}
    for layer_name, layer in masked_layers(model).items():
        layer.register_forward_hook(lambda _layer, args, output, n=layer_name: seen.update({n: (args[0], output)}))
    with record_masks(model) as gates:
        model(**case.inputs())
    windows = {layer_name for layer_name in gates if seen[layer_name][0].shape[0] > 4}
    assert windows == {layer.name for layer in maskable_layers(model) if layer.windowed and layer.name in gates}
    for layer_name in windows:
        layer, (inputs, outputs) = model.get_submodule(layer_name), seen[layer_name]
        per_image = inputs.view(4, -1, inputs.shape[-1])
        torch.testing.assert_close(gates[layer_name], layer.mask_generator(per_image.mean(1)), atol=1e-6, rtol=1e-5)
        plain = nn.functional.linear(per_image, layer.weight, layer.bias)
        expected = plain * gates[layer_name][:, None]
        torch.testing.assert_close(outputs.view(expected.shape), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "roles", "text"),
    [
        (PVT, ("query", "key", "value"), "as wide together as the residual stream"),
        (DEBERTA, ("query_proj", "key_proj"), "relative positions share it"),
        (WAVLM, ("q_proj", "k_proj", "v_proj", "out_proj"), "uses its weights without calling it"),
        (EFFICIENT, ("expand_conv",), "shares the gates of"),
    ],
    ids=str,
)
def test_layers_that_are_never_masked_have_a_reason(case, roles, text):
    model = case.model()
    reasons = list_maskable_layers(model, ModularConfig(skip_first_blocks=0), reasons=True)
    because = {layer: reason for layer, reason in reasons.items() if reason and text in reason}
    assert because
    assert because.keys() == {layer for layer in reasons if layer.rpartition(".")[2] in roles}
    masks = {label: {next(iter(because)): torch.ones(8, dtype=torch.bool)} for label in LABELS}
    with pytest.raises(NemoValueError, match="cannot be cut"):
        extract_module(model, ModuleMasks(masks), ["cat"])
    if case is WAVLM:
        with pytest.raises(NemoValueError, match="uses its weights without calling it"):
            apply_masks(model, ModularConfig(target_modules="attention"))


def test_cosine_attention_keeps_units_that_only_q_or_only_k_has():
    block = "swinv2.encoder.layers.1.blocks.1.attention"
    masks = {f"{block}.self.{role}": torch.ones(32, dtype=torch.bool) for role in ("query", "key")}
    masks[f"{block}.self.query"].view(4, 8)[:, :4] = False
    masks[f"{block}.self.key"].view(4, 8)[:, 2:6] = False
    masks[f"{block}.self.value"] = torch.arange(32) >= 16  # two of four heads
    model, module = cut(SWINV2, masks)
    owner, parent = module.get_submodule(f"{block}.self"), model.get_submodule(f"{block}.self")
    assert (owner.num_attention_heads, owner.attention_head_size, owner.all_head_size) == (2, 8, 16)
    assert torch.equal(owner.logit_scale, parent.logit_scale[2:])
    bias = owner.continuous_position_bias_mlp[2]
    assert bias.out_features == 2
    assert torch.equal(bias.weight, parent.continuous_position_bias_mlp[2].weight[2:])
    neither = {name: mask.clone() for name, mask in masks.items()}
    neither[f"{block}.self.key"].view(4, 8)[:, :2] = False
    _, module = cut(SWINV2, neither)
    assert module.get_submodule(f"{block}.self").attention_head_size == 8  # v has eight


def test_heads_take_their_bias_columns_along_in_swin():
    block = "swin.encoder.layers.0.blocks.1.attention"
    model, module = cut(SWIN, {f"{block}.v_proj": torch.arange(16) < 8})
    table = "relative_position_bias.relative_position_bias_table"
    assert torch.equal(module.get_parameter(f"{block}.{table}"), model.get_parameter(f"{block}.{table}")[:, :1])


@pytest.mark.parametrize("case", [DEBERTA, DEBERTA_OWN], ids=str)
def test_values_of_deberta_have_a_size_of_their_own(case):
    block = "deberta.encoder.layer.1.attention"
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[0, 1, 9, 30]] = True
    _, module = cut(case, {f"{block}.self.value_proj": mask})
    owner = module.get_submodule(f"{block}.self")
    assert layer_sizes(owner.query_proj) == (32, 24)  # three heads of eight units
    assert layer_sizes(owner.value_proj) == (32, 6)  # three heads of two units
    assert layer_sizes(module.get_submodule(f"{block}.output.dense")) == (6, 32)
    if case is DEBERTA_OWN:
        assert layer_sizes(owner.pos_key_proj) == layer_sizes(owner.pos_query_proj) == (32, 24)


def test_a_zeroed_unit_before_a_biased_depthwise_convolution_moves_into_the_bias():
    block = "pvt_v2.encoder.layers.1.blocks.1.mlp"
    for kept in (0, 5):
        model, module = cut(PVT, {f"{block}.dense1": torch.arange(64) < kept})
        mlp = module.get_submodule(block)
        assert mlp.dwconv.dwconv.groups == mlp.dense1.out_features == mlp.dense2.in_features == max(1, kept)
        assert not torch.equal(mlp.dense2.bias, model.get_submodule(block).dense2.bias)


def test_expansion_depthwise_and_squeeze_excite_shrink_together():
    block = "efficientnet.encoder.blocks.2"
    layers = ("expansion.expand_conv", "depthwise_conv.depthwise_conv", "squeeze_excite.expand")
    width = layer_sizes(plain_parent(EFFICIENT).get_submodule(f"{block}.{layers[0]}"))[1]
    depthwise = f"{block}.depthwise_conv.depthwise_conv"
    _, module = cut(EFFICIENT, {depthwise: torch.arange(width) % 4 == 0})
    assert {layer_sizes(module.get_submodule(f"{block}.{name}"))[1] for name in layers} == {width // 4}
    assert layer_sizes(module.get_submodule(f"{block}.squeeze_excite.reduce"))[0] == width // 4
    sigmoid = EFFICIENT.model(hidden_act="sigmoid")
    assert "whose output for zero is not zero" in list_maskable_layers(sigmoid, reasons=True)[depthwise]


@pytest.mark.parametrize("case", SPEECH, ids=str)
def test_layerdrop_is_refused(case):
    model = case.model(layerdrop=0.1)
    with pytest.raises(UnsupportedModelError, match=r"config.layerdrop=0.1.*Set it to 0"):
        apply_masks(model)
    assert not any(isinstance(layer, MaskedLayer) for layer in model.modules())


def test_entries_with_wrong_words_are_refused():
    entry, model = ARCHITECTURES["swinv2"], SWINV2.model()
    wrong = replace(entry, attention=replace(entry.attention, reasons={"keys": "no"}))
    with pytest.raises(NemoValueError, match="must name query, key, value, output, got 'keys'"):
        register_architecture(wrong, exist_ok=True)
    wrong = replace(entry, attention=replace(entry.attention, head_rows=("attention.self.dropout",)))
    try:
        register_architecture(wrong, exist_ok=True)
        with pytest.raises(UnsupportedModelError, match="field 'attention.head_rows' names .*dropout"):
            apply_masks(model)
    finally:
        register_architecture(entry, exist_ok=True)


def test_streams_that_do_not_fit_are_refused_before_training():
    entry, model = ARCHITECTURES["resnet"], RESNET.model()
    stem, branch, shortcut = entry.chains
    for chains in ((stem,), (replace(stem, reader="classifier.1"), branch)):
        with pytest.raises(NemoValueError, match="describes a `stream`.* Only the last may have one"):
            register_architecture(replace(entry, chains=chains), exist_ok=True)
    wrong = {
        "field 'stream' names '.*shortcut.convolution .to read 16 channels.'": {
            "chains": (stem, branch, replace(shortcut, shortcut=False))
        },
        "field 'stream.activation' names 'resnet.embedder.act', where there is nothing": {
            "stream": Stream(reader="classifier.1", activation="act")
        },
        "field 'stream.reader' names 'classifier', where there is Sequential": {"stream": Stream(reader="classifier")},
    }
    try:
        for message, changes in wrong.items():
            register_architecture(replace(entry, **changes), exist_ok=True)
            with pytest.raises(UnsupportedModelError, match=message):
                apply_masks(model)
    finally:
        register_architecture(entry, exist_ok=True)


def test_a_convolution_that_reads_more_than_the_stream_is_refused():
    entry, model = ARCHITECTURES["resnet"], RESNET.model()
    stem, branch, shortcut = entry.chains
    try:  # as if the stem were concatenated with something
        register_architecture(replace(entry, chains=(stem, stem, branch, shortcut)), exist_ok=True)
        with pytest.raises(UnsupportedModelError, match="field 'stream' names .*embedder.* .to read 8 channels."):
            apply_masks(model)
    finally:
        register_architecture(entry, exist_ok=True)


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus()])
def test_the_activation_behind_an_addition_counts_too(activation):
    model = RESNET.model()
    assert [stream.width for stream in resolve_streams(model)] == [8, 16, 32]
    model.resnet.encoder.stages[1].layers[1].activation = activation
    assert resolve_streams(model) == []


def test_an_activation_with_a_parameter_is_asked_in_its_own_dtype():
    model = RESNET.model(hidden_act="prelu").double()
    inputs = {name: tensor.double() for name, tensor in RESNET.inputs().items()}
    masks, _ = random_masks(model, skip_first_blocks=0)
    for index, label in enumerate(LABELS):
        module = extract_module(model, ModuleMasks(masks), [label])
        with torch.no_grad(), gated_by_hooks(model, naive_gates(masks, None, [label])):
            expected = model(**inputs).logits[:, [index]]
        assert module.dtype == torch.float64
        torch.testing.assert_close(module(**inputs).logits, expected, atol=1e-10, rtol=1e-10)
