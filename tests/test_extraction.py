# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 2: a module computes what its parent computes with those gates held constant."""

import itertools

import pytest
import torch
from models import (
    LABELS,
    VIT,
    assert_same_state,
    check_exact,
    close,
    gated_by_hooks,
    logits_of,
    modular_parent,
    naive_gates,
    num_neurons,
    over_models,
    over_two_models,
    plain_parent,
    random_masks,
    state_copy,
)

from nemo_hf import (
    Attention,
    ModularConfig,
    ModuleMasks,
    apply_masks,
    constant_gates,
    extract_module,
    hold_gates,
    list_maskable_layers,
)
from nemo_hf.resolution import resolve_parts


LABEL_LISTS = [["cat"], ["elk", "ant"], [3, "bee", 0], list(range(5))]
over_gates = pytest.mark.parametrize("kind", ["mean", "binary"])


def edge_masks(edge, model):
    """Random masks with one kind of edge in the last block, for every label; `None` if the model has no such place."""
    whole = edge in ("everything kept", "nothing kept")
    masks, gates = random_masks(model, skip_first_blocks=0 if whole else 1)
    if whole:
        for mask in masks.values():
            for keep in mask.values():
                keep.fill_(edge == "everything kept")
        return masks, gates
    names = list(masks["cat"])
    attention = [part for _, part in resolve_parts(model) if isinstance(part, Attention)]
    if edge in ("empty head", "no v", "no q"):
        if not attention or (edge == "no q" and attention[-1].unit_norms):
            return None
        part = attention[-1]
        width = num_neurons(model, part.output)
        fused = 2 * width if part.query == part.value else 0
        name = part.query if edge == "no q" else part.value
        units = {
            "empty head": slice(fused + 8, fused + 16),
            "no v": slice(fused, None),
            "no q": slice(0, width),
        }[edge]
        if name not in names:
            return None
        chosen = [(name, units)]
    else:
        last = names[-1].rpartition(".")[0].rpartition(".")[0]
        block = [name for name in names if name.startswith(last)]
        chosen = [(name, slice(None)) for name in ({"empty last layer": names[-1:], "empty block": block}[edge])]
    for mask in masks.values():
        for name, units in chosen:
            mask[name][units] = False
    return masks, gates


@over_models
@over_gates
@pytest.mark.parametrize("labels", LABEL_LISTS, ids=str)
def test_module_of_a_modular_parent_is_exact(case, kind, labels):
    parent = modular_parent(case)
    masks, gates = random_masks(parent)
    module = check_exact(case, parent, masks, gates, labels, kind)
    assert module(**case.inputs()).logits.shape == (4, len(labels))
    assert not any("mask_generator" in name for name in module.state_dict())


@over_models
@pytest.mark.parametrize(("labels", "kind"), [(["cat"], "mean"), (["elk", "ant"], "binary"), (LABELS, "mean")])
def test_module_of_a_plain_parent_is_exact_with_masks_made_by_hand(case, labels, kind):
    parent = plain_parent(case)
    masks, gates = random_masks(parent, skip_first_blocks=0)
    module = check_exact(case, parent, masks, gates, labels, kind)
    with torch.no_grad():
        unmasked = logits_of(parent(**case.inputs()))[..., [LABELS.index(label) for label in labels]]
        assert not torch.allclose(logits_of(module(**case.inputs())), unmasked, atol=1e-3)


@over_models
def test_masks_of_one_layer_are_exact(case):
    parent = plain_parent(case)
    masks, _ = random_masks(parent)
    one_layer = {label: {name: mask[name] for name in list(mask)[-1:]} for label, mask in masks.items()}
    for labels in (["cat"], ["elk", "ant"]):
        check_exact(case, parent, one_layer, None, labels, None)


EDGES = ["empty head", "no v", "no q", "empty block", "everything kept"]


@over_models
@pytest.mark.parametrize(
    ("edge", "kind"),
    [
        *itertools.product(EDGES, ["mean", "binary"]),
        ("empty last layer", "binary"),  # with mean gates it is one of the single layers below
        ("nothing kept", "binary"),  # means of nothing are the same
    ],
)
def test_edges_are_exact(case, edge, kind):
    parent = modular_parent(case)
    made = edge_masks(edge, parent)
    if made is None:
        pytest.skip("the model has no such place")
    module = check_exact(case, parent, *made, ["dog", "bee"], kind)
    if edge == "everything kept":
        assert module.config.nemo["shapes"] == {}


@over_models
def test_every_single_layer_may_be_empty(case):
    parent = modular_parent(case)
    for name in list_maskable_layers(parent)[-7:]:  # a block has up to seven
        masks, gates = random_masks(parent)
        for mask in masks.values():
            mask[name].fill_(False)
        check_exact(case, parent, masks, gates, ["cat", "elk"], "mean")
        only = {label: {name: mask[name]} for label, mask in masks.items()}
        check_exact(case, plain_parent(case), only, None, ["cat", "elk"], "binary")


@over_models
def test_empty_heads_leave_every_layer(case):
    parent = plain_parent(case)
    masks, gates = random_masks(parent, skip_first_blocks=0)
    attention = [part for _, part in resolve_parts(parent) if isinstance(part, Attention)]
    attention = [part for part in attention if part.value in masks["cat"]]
    if not attention:
        pytest.skip("the values of the model are not masked")
    for part in attention:
        neurons = num_neurons(parent, part.value)
        values = slice(neurons // 3 * 2 if part.query == part.value else 0, None)
        for mask in masks.values():
            units = mask[part.value][values]
            units[:] = torch.arange(len(units)) >= len(units) // 2
    module = check_exact(case, parent, masks, gates, ["dog", "bee"], "mean")
    for part in attention:
        assert part.shared_head_bias or num_neurons(module, part.value) <= num_neurons(parent, part.value) // 2
    changed = module.config.nemo["shapes"].get("attributes", {})
    assert len(changed) == sum(part.shared_head_bias is None for part in attention)


@over_models
@over_gates
@torch.no_grad()
def test_held_gates_and_hooks_agree(case, kind):
    parent = modular_parent(case)
    masks, gates = random_masks(parent)
    held = constant_gates(parent, ModuleMasks(masks, gates), ["ant", "elk"], kind)
    expected = naive_gates(masks, gates if kind == "mean" else None, ["ant", "elk"])
    assert list(held) == list(expected) == list_maskable_layers(parent)
    for name, gate in held.items():
        torch.testing.assert_close(gate, expected[name], atol=1e-7, rtol=0)
    module = extract_module(parent, ModuleMasks(masks, gates), ["ant", "elk"], gates=kind)
    with hold_gates(parent, held):
        close(logits_of(module(**case.inputs())), logits_of(parent(**case.inputs()))[..., [0, 4]])


def test_a_masked_layer_without_masks_keeps_all_neurons():
    parent = VIT.masked()
    masks, _ = random_masks(parent)
    some = {label: {name: mask[name] for name in mask if "layers.2" in name} for label, mask in masks.items()}
    check_exact(VIT, parent, some, None, ["cat"], "binary")


@over_gates
@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu", "quick_gelu"])
def test_activations_that_are_not_zero_at_zero_are_exact(kind, activation):
    parent, inputs = VIT.model(hidden_act=activation), VIT.inputs()
    masks, gates = random_masks(parent)
    module = extract_module(parent, ModuleMasks(masks, gates), ["cat", "ant"], gates=kind)
    held = naive_gates(masks, gates if kind == "mean" else None, ["cat", "ant"])
    with torch.no_grad(), gated_by_hooks(parent, held):
        close(module(**inputs).logits, parent(**inputs).logits[:, [2, 0]])


def test_layers_without_biases_are_exact():
    parent, inputs = VIT.model(qkv_bias=False), VIT.inputs()
    masks, gates = random_masks(parent)
    module = extract_module(parent, ModuleMasks(masks, gates), ["cat", "ant"])
    with torch.no_grad(), gated_by_hooks(parent, naive_gates(masks, gates, ["cat", "ant"])):
        close(module(**inputs).logits, parent(**inputs).logits[:, [2, 0]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation_is_exact(attention):
    parent, inputs = VIT.model(attn_implementation=attention), VIT.inputs()
    masks, gates = random_masks(parent)
    module = extract_module(parent, ModuleMasks(masks, gates), ["cat", "ant"])
    assert module.config._attn_implementation == parent.config._attn_implementation == attention
    with torch.no_grad(), gated_by_hooks(parent, naive_gates(masks, gates, ["cat", "ant"])):
        close(module(**inputs).logits, parent(**inputs).logits[:, [2, 0]])


@over_models
def test_extraction_changes_neither_parent_nor_random_numbers(case):
    parent = case.masked().train()
    state, config = state_copy(parent), parent.config.to_dict()
    masks, gates = random_masks(parent)
    random_state = torch.get_rng_state()
    module = extract_module(parent, ModuleMasks(masks, gates), ["cat"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(parent.state_dict(), state)
    assert parent.config.to_dict() == config
    assert parent.training
    assert not module.training
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert_same_state(parent.state_dict(), state)  # no shared memory


@over_two_models
@torch.no_grad()
def test_a_bf16_parent_gives_a_bf16_module(case):
    parent = case.masked()
    masks, gates = random_masks(parent)
    module_masks, inputs = ModuleMasks(masks, gates), case.inputs()
    expected = extract_module(parent, module_masks, ["cat", "ant"])(**inputs).logits
    module = extract_module(parent.to(torch.bfloat16), module_masks, ["cat", "ant"])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.dtype == module.config.dtype == torch.bfloat16
    half = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in inputs.items()}
    close(module(**half).logits.float(), expected, tolerance=5e-2)


def test_hard_gates_extract_exactly_as_binary():
    parent = apply_masks(VIT.model(), ModularConfig(gate="hard", generator_init="paper"))
    masks, gates = random_masks(parent)
    check_exact(VIT, parent, masks, gates, ["cat", "ant"], "binary")
