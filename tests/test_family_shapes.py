# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What is cut where neurons are tied: the sizes of layers, counted by hand."""

import dataclasses
import json

import pytest
import torch
import transformers
from models import LLAMA, RESNET, VIT, case_of, check_exact, module_masks, over_models, random_masks

from nemo_hf import (
    ModularConfig,
    ModuleMasks,
    NemoRuntimeError,
    NemoValueError,
    UnsupportedModelError,
    apply_masks,
    extract_module,
    hold_gates,
    list_maskable_layers,
    record_masks,
)
from nemo_hf.architectures import UNSUPPORTED
from nemo_hf.extraction import constant_gates
from nemo_hf.metrics import count_flops, count_parameters
from nemo_hf.resolution import resolve_streams
from nemo_hf.slim import ScatterChannels


def cut_with(case, **kept):
    """A module for which some layers keep the listed neurons (by the end of their name) and the others all."""
    parent, masks = masks_with(case, **kept)
    return parent, extract_module(parent, masks, ["cat"])


def masks_with(case, **kept):
    parent = case.model()
    masks = {name: torch.ones_like(mask) for name, mask in random_masks(parent)[0]["cat"].items()}
    for suffix, neurons in kept.items():
        found = [name for name in masks if name.endswith(suffix)]
        assert found, suffix
        for name in found:
            masks[name][:] = False
            masks[name][list(neurons)] = True
    return parent, ModuleMasks({"cat": masks})


def test_grouped_query_heads_go_with_the_key_value_head_that_they_share():
    # 4 query heads of 8 units, 2 heads of keys and values; keep three units of v of the second.
    _, module = cut_with(LLAMA, v_proj=[8, 9, 15])
    attention = module.model.layers[1].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (16, 8)
    assert (attention.v_proj.width, attention.v_proj.index.tolist()) == (8, [0, 1, 2])  # mostly padding
    assert attention.o_proj.in_features == 16
    assert module.model.layers[0].self_attn.q_proj.out_features == 32  # the first block is not masked


def test_rotary_units_go_in_pairs_that_all_heads_of_a_layer_share():
    # Unit 1 of a query head turns with unit 5; the other head of the layer needs the pair (2, 6).
    kept = {"v_proj": [0, 8], "k_proj": range(16), "q_proj": [1, 8 + 1, 16 + 6]}
    _, module = cut_with(LLAMA, **kept)
    attention = module.model.layers[1].self_attn
    assert attention.head_dim == 4
    assert attention.rotary_index.tolist() == [1, 2, 5, 6]
    assert attention.k_proj.out_features == 8
    assert attention.scaling == 8**-0.5  # of the parent


def test_units_under_a_norm_per_head_are_not_masked():
    model = case_of("Qwen3ForSequenceClassification").model()
    reasons = list_maskable_layers(model, reasons=True)
    assert "Qwen3RMSNorm normalises the units of each head" in reasons["model.layers.1.self_attn.q_proj"]
    assert reasons["model.layers.1.self_attn.v_proj"] is None
    mask = {"model.layers.1.self_attn.k_proj": torch.ones(16, dtype=torch.bool)}
    with pytest.raises(NemoValueError, match="k_proj' cannot be cut: Qwen3RMSNorm"):
        extract_module(model, ModuleMasks({"cat": mask}), ["cat"])


def test_heads_that_attend_to_all_tokens_alike_share_heads():
    # Four heads of 8 units. q and k meet in unit 9, of the second head; the others have three, one and two units of v.
    kept = {"q_proj": [0, 9, 17], "k_proj": [1, 9, 25], "v_proj": [0, 1, 2, 9, 10, 16, 24, 26]}
    parent, masks = masks_with(VIT, **kept)
    attention = extract_module(parent, masks, ["cat"]).vit.layers[1].attention
    assert (attention.num_attention_heads, attention.head_dim) == (2, 6)
    assert (attention.q_proj.width, attention.q_proj.index.tolist()) == (12, [0])
    assert attention.v_proj.out_features == attention.o_proj.in_features == 12
    rows = parent.vit.layers[1].attention.v_proj.weight[[9, 10]]
    assert torch.equal(attention.v_proj.weight[:2], rows)
    rows = parent.vit.layers[1].attention.v_proj.weight[[0, 1, 2, 16, 24, 26]]
    assert torch.equal(attention.v_proj.weight[6:], rows)
    assert (attention.v_proj.weight[2:6] == 0).all()
    check_exact(VIT, VIT.masked(), {"cat": dict(masks["cat"])}, None, ["cat"], "binary")


def test_heads_with_a_bias_of_their_own_do_not_share():
    name = "BeitForImageClassification-own position bias"
    _, module = cut_with(case_of(name), q_proj=[0], v_proj=[0, 8, 9])
    assert module.beit.layers[1].attention.num_attention_heads == 2


def test_fused_projections_are_cut_in_thirds():
    _, module = cut_with(case_of("GPT2ForSequenceClassification"), c_attn=[0, 32, 64, 65, 66])
    attention = module.transformer.h[1].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (1, 3, 3)
    assert tuple(attention.c_attn.weight.shape) == (32, 9)
    assert (attention.c_attn.weight[:, 1:3] == 0).all()  # q and k share one unit, padded to the three of v


def test_a_gated_unit_stays_where_both_sides_are_kept():
    _, module = cut_with(LLAMA, gate_proj=range(10), up_proj=range(6, 64))
    assert module.model.layers[1].mlp.down_proj.in_features == 4
    _, module = cut_with(case_of("ModernBertForSequenceClassification"), Wi=[0, 1, 2, 64 + 1, 64 + 5])
    mlp = module.model.layers[1].mlp
    assert (mlp.Wi.out_features, mlp.Wo.in_features) == (2, 1)


def test_channels_leave_convolution_norm_and_the_next_convolution():
    first, last = "stages.1.layers.0.layer.0.convolution", "stages.1.layers.0.layer.2.convolution"
    parent, module = cut_with(RESNET, **{first: [0, 2], last: [5], "stages.1.layers.0.shortcut.convolution": []})
    block = module.resnet.encoder.stages[1].layers[0]
    first, second, third = block.layer
    assert tuple(first.convolution.weight.shape) == (2, 16, 1, 1)
    assert (first.normalization.num_features, second.convolution.in_channels) == (2, 2)
    assert third.normalization.index.tolist() == [5]
    assert third.normalization.width == 32  # the next block writes to all channels
    assert tuple(third.convolution.weight.shape) == (1, 8, 1, 1)
    assert block.shortcut.convolution.out_channels == 1  # a convolution cannot be empty: one zero channel
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    assert count_flops(module, pixels) < count_flops(parent, pixels)


def narrow_stream(case):
    """The last stage of a bottleneck ResNet, in which three layers write to channels 5, 9 and 11 of the stream."""
    kept = {
        "stages.1.layers.0.layer.2": [5, 9],
        "stages.1.layers.0.shortcut": [9, 11],
        "stages.1.layers.1.layer.2": [],
    }
    parent, masks = masks_with(case, **{f"{name}.convolution": channels for name, channels in kept.items()})
    module = extract_module(parent, masks, ["cat"])
    apply_masks(parent, ModularConfig()).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), hold_gates(parent, constant_gates(parent, masks, ["cat"], "binary")):
        torch.testing.assert_close(module(pixels).logits, parent(pixels).logits[:, 2:3], rtol=1e-5, atol=1e-5)
    return module, module.resnet.encoder.stages[1].layers


def test_a_channel_to_which_no_layer_writes_leaves_the_stream():
    module, (first, second) = narrow_stream(RESNET)
    branch, shortcut = first.layer[2].normalization, first.shortcut.normalization
    assert (branch.width, branch.index.tolist()) == (3, [0, 1])
    assert (shortcut.width, shortcut.index.tolist()) == (3, [1, 2])
    assert second.layer[0].convolution.in_channels == module.classifier[1].in_features == 3
    assert second.layer[2].convolution.out_channels == 1


def test_layers_that_write_the_same_channels_need_no_scattering():
    kept = {"stages.1.layers.0.layer.2": [5], "stages.1.layers.0.shortcut": [5], "stages.1.layers.1.layer.2": [5]}
    _, module = cut_with(RESNET, **{f"{name}.convolution": channels for name, channels in kept.items()})
    stage = [
        name for name, layer in module.named_modules() if isinstance(layer, ScatterChannels) and "stages.1" in name
    ]
    assert stage == []
    assert module.classifier[1].in_features == 1


def test_a_stream_of_which_nothing_is_left_keeps_one_channel():
    kept = dict.fromkeys(("stages.1.layers.0.layer.2", "stages.1.layers.0.shortcut", "stages.1.layers.1.layer.2"), [])
    _, module = cut_with(RESNET, **{f"{name}.convolution": channels for name, channels in kept.items()})
    assert module.classifier[1].in_features == 1
    logits = module(pixel_values=torch.randn(2, 3, 16, 16)).logits
    torch.testing.assert_close(logits, module.classifier[1].bias.expand(2, 1))


def test_an_activation_that_moves_zero_keeps_the_stream_whole():
    module, (first, second) = narrow_stream(
        dataclasses.replace(RESNET, options={**RESNET.options, "hidden_act": "sigmoid"})
    )
    assert first.layer[2].normalization.width == module.classifier[1].in_features == 32
    assert second.layer[0].convolution.in_channels == 32


def test_a_stream_that_is_read_in_groups_of_channels_stays_whole():
    model = case_of("EfficientNetForImageClassification").model()
    first = model.efficientnet.encoder.blocks[0]  # without an expansion: depthwise on the stream
    assert not hasattr(first, "expansion")
    read = [name for stream in resolve_streams(model) for name in stream.readers]
    assert read
    assert not any("blocks.0" in name or "depthwise" in name for name in read)


def test_groups_of_channels_are_padded_to_one_size():
    # Layers of 32 channels in 8 groups of 4.
    name = "RegNetForImageClassification-Y"
    _, module = cut_with(case_of(name), **{"layer.0.convolution": [0, 1, 2, 8], "layer.1.convolution": [3, 8]})
    first, grouped, excite, last = module.regnet.encoder.stages[1].layers[1].layer
    assert grouped.convolution.groups == 2
    assert tuple(grouped.convolution.weight.shape) == (2, 3, 3, 3)
    assert first.convolution.out_channels == 6  # three channels of the first group, one and two of padding
    assert excite.attention[0].in_channels == excite.attention[2].out_channels == last.convolution.in_channels == 2


def test_expansion_and_depthwise_convolution_share_their_gates():
    case = case_of("MobileNetV2ForImageClassification")
    reasons = list_maskable_layers(case.model(), reasons=True)
    assert "shares the gates of" in reasons["mobilenet_v2.layer.3.expand_1x1.convolution"]
    assert reasons["mobilenet_v2.layer.3.conv_3x3.convolution"] is None
    kept = {"layer.3.conv_3x3.convolution": [1, 4, 5], "mobilenet_v2.conv_1x1.convolution": range(7)}
    _, module = cut_with(case, **kept)
    layer = module.mobilenet_v2.layer[3]
    assert layer.expand_1x1.normalization.num_features == layer.reduce_1x1.convolution.in_channels == 3
    assert layer.conv_3x3.convolution.groups == layer.conv_3x3.convolution.in_channels == 3
    assert module.classifier.in_features == 7


def test_heads_stay_where_all_blocks_share_a_bias_per_head():
    for name, table in (("MPNetForSequenceClassification", None), ("BeitForImageClassification-own position bias", 1)):
        parent, module = cut_with(case_of(name), **({"attn.v": [8, 9]} if table is None else {"v_proj": [8, 9]}))
        if table is None:
            attention = module.mpnet.encoder.layer[1].attention.attn
            assert attention.num_attention_heads == 4
        else:
            assert module.beit.layers[1].attention.num_attention_heads == 1
            bias = module.beit.layers[1].relative_position_bias.relative_position_bias_table
            expected = parent.beit.layers[1].relative_position_bias.relative_position_bias_table[:, 1:2]
            assert torch.equal(bias, expected)


@over_models
def test_a_module_is_as_small_on_disk_as_its_parameters(case, tmp_path):
    parent = case.model()
    module = extract_module(parent, module_masks(parent), ["elk", "cat"])
    assert count_parameters(module) < count_parameters(parent)
    module.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    names = {name for name, _ in module.named_parameters()}
    others = [tensor for name, tensor in module.state_dict().items() if name not in names]
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in others)
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + 4 * count_parameters(module) + buffers


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_families_that_cannot_be_supported_say_why(model_type):
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=32, num_attention_heads=4, intermediate_size=64, embedding_size=16, vocab_size=50
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UnsupportedModelError, match="'albert' cannot be supported: all its blocks are one layer"):
        apply_masks(model)


def test_a_layer_that_is_called_twice_is_refused():
    model = apply_masks(VIT.model())
    model.vit.layers.append(model.vit.layers[2])
    with pytest.raises(NemoRuntimeError, match="calls vit.layers.2.attention.q_proj twice"), record_masks(model):
        model(**VIT.inputs())
