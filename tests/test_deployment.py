# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 4 for what comes after loading: modules in bf16, exported and compiled."""

import copy

import pytest
import torch
from models import LLAMA, RESNET, VIT, case_of, close, modular_parent, module_masks, over_models, plain_parent

from nemo_hf import extract_module


# One family per kind of tie: plain heads, positions that turn pairs of units, channels that are scattered, fused
# projections, windows.
TIES = [VIT, LLAMA, RESNET, case_of("GPT2ForSequenceClassification"), case_of("SwinForImageClassification")]
over_ties = pytest.mark.parametrize("case", TIES, ids=str)


def module_of(case):
    parent = modular_parent(case)
    return extract_module(parent, module_masks(parent), ["elk", "cat"])


def half_precision_error(model, inputs):
    """How far the logits of a model are from those of its copy in bf16, relative to the largest."""
    expected = model(**inputs).logits
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    logits = copy.deepcopy(model).bfloat16()(**half).logits
    assert logits.dtype == torch.bfloat16
    return ((logits.float() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@over_models
@torch.no_grad()
def test_a_module_in_bf16_stays_near_itself(case):
    limit = 2e-2
    if case.sees == "sound":  # with random weights bf16 moves these parents further: no module can do better
        limit = 1.5 * half_precision_error(plain_parent(case), case.inputs())
    assert half_precision_error(module_of(case), case.inputs()) <= limit


@over_ties
@torch.no_grad()
def test_a_module_can_be_exported(case):
    module, inputs = module_of(case), case.inputs()
    module.config.use_cache = False  # a cache is nothing that torch.export can return, of no decoder of transformers
    exported = torch.export.export(module, (), kwargs=inputs, strict=False).module()
    close(exported(**inputs).logits, module(**inputs).logits)


@over_ties
@torch.no_grad()
def test_a_module_compiles_to_one_graph(case):
    module, inputs = module_of(case), case.inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)  # the whole path but code generation
    close(compiled(**inputs).logits, module(**inputs).logits)
