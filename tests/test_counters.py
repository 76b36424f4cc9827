# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The counters of parameters and operations against counts made by hand, of parents and modules alike."""

import functools
import json
import math

import pytest
import torch
from models import modular_parent, module_masks, over_models, plain_parent
from torch import nn
from transformers.pytorch_utils import Conv1D

from nemo_hf import extract_module
from nemo_hf.metrics import count_flops, count_parameters


# How families call the projection to queries and the one behind the attention, and what part of the first q is.
PROJECTIONS = [
    ("q_proj", "o_proj", 1),
    ("q_proj", "out_proj", 1),
    ("self.query", "output.dense", 1),
    ("q_lin", "out_lin", 1),
    ("attn.q", "attn.o", 1),
    ("Wqkv", "Wo", 3),
    ("c_attn", "c_proj", 3),
]
# Families whose attention is more than that: scores of positions, fewer keys than queries, projections without a call.
MORE_ATTENTION = ("deberta-v2", "pvt_v2", "siglip", "wavlm")
FIXED_WORK = ("deberta-v2", "swinv2")  # a part that all samples of a batch share, on relative positions
BUFFERS = ("index", "running_mean", "running_var", "num_batches_tracked", "rotary_index")


def operations_by_hand(model, inputs):
    """Multiplications and additions of every layer that a forward pass calls, from the shapes that it sees there."""
    counted, hooks, layers = [], [], dict(model.named_modules())

    def count_layer(layer, _inputs, output):
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            each = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        else:
            each = layer.nx if isinstance(layer, Conv1D) else layer.in_features
        counted.append(2 * each * output.numel())

    def count_attention(_layer, _inputs, output, share, values):
        samples, tokens, width = output.shape  # of windows, where there are some
        counted.append(2 * samples * tokens * tokens * (width // share + values))

    for name, layer in layers.items():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D):
            hooks.append(layer.register_forward_hook(count_layer))
        for query, output, share in PROJECTIONS:
            behind = layers.get(name.removesuffix(query) + output)
            if name.endswith(f".{query}") and behind is not None:
                behind = getattr(behind, "linear", behind)  # what a ScatterLinear computes
                values = behind.nx if isinstance(behind, Conv1D) else behind.in_features
                hook = functools.partial(count_attention, share=share, values=values)
                hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return sum(counted)


@over_models
def test_operations_agree_with_a_count_by_hand(case):
    parent = modular_parent(case)
    module = extract_module(parent, module_masks(parent), ["elk", "cat"])
    one, four = ({name: value[:size] for name, value in case.inputs().items()} for size in (1, 4))
    counts = []
    for model in (plain_parent(case), module):
        counts.append(count_flops(model, one))
        by_hand, family = operations_by_hand(model, one), case.config_class.model_type
        if family in MORE_ATTENTION:
            assert by_hand < counts[-1]
        else:
            assert by_hand == pytest.approx(counts[-1], rel=0.01)
        if family not in FIXED_WORK:
            assert count_flops(model, four) == 4 * counts[-1]
    assert counts[1] < counts[0]


@over_models
def test_parameters_agree_with_the_shapes_in_the_file(case, tmp_path):
    parent = modular_parent(case)
    for model in (plain_parent(case), extract_module(parent, module_masks(parent), ["elk", "cat"])):
        model.save_pretrained(tmp_path)
        data = (tmp_path / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        counted = sum(math.prod(shape) for name, shape in shapes.items() if name.rpartition(".")[2] not in BUFFERS)
        assert count_parameters(model) == counted
