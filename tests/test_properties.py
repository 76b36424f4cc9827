# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Properties over random shapes, labels, types and masks: no NaN, no crash, no silent change.
`HYPOTHESIS_PROFILE=long pytest tests/test_properties.py` tries a hundred times as many.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import BERT, LABELS, LLAMA, RESNET, VIT, check_exact, num_neurons, plain_parent

from nemo_hf import ModularConfig, ModuleMasks, NeuronStatistics, list_maskable_layers, metrics
from nemo_hf.labels import shares_label
from nemo_hf.module_masks import NeuronMask
from nemo_hf.objectives import OBJECTIVE_DEFAULTS, CompactnessLoss, ContrastiveLoss, make_objective
from nemo_hf.slicing import PADDING, folded_bias, padded_heads, take_columns, take_groups, take_rows


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def label_batches(draw, size):
    """Ids, one class or many, or booleans with samples of several labels or none."""
    if draw(st.booleans()):
        return torch.tensor(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
    row = st.lists(st.booleans(), min_size=3, max_size=3)
    return torch.tensor(draw(st.lists(row, min_size=size, max_size=size)), dtype=torch.bool)


@st.composite
def gate_batches(draw):
    """Gates in [0, 1] of some layers, with samples or layers of zeros, ones, or all alike; and labels."""
    batch = draw(sizes)
    widths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    generator = rng(draw(seeds))
    dtype = draw(st.sampled_from(DTYPES))
    masks = {}
    for number, width in enumerate(widths):
        gates = torch.rand(batch, width, generator=generator)
        kind = draw(st.sampled_from(["any", "sparse", "zeros", "ones", "alike", "tiny"]))
        if kind == "sparse":
            gates = gates * (torch.rand(batch, width, generator=generator) < 0.3)
        elif kind == "alike":
            gates = gates[:1].expand(batch, width)
        elif kind != "any":
            gates = torch.full_like(gates, {"zeros": 0.0, "ones": 1.0, "tiny": 1e-7}[kind])
        masks[f"layer{number}"] = gates.to(dtype).clone().requires_grad_(True)
    return masks, draw(label_batches(batch))


def make_term(objective, temperature):
    if objective.startswith("compactness"):
        return CompactnessLoss(1.0, 0.3, activations=objective.endswith("activations"))
    return make_objective(objective, 1.0, 1.0, temperature)


@pytest.mark.parametrize("objective", [*OBJECTIVE_DEFAULTS, "compactness", "compactness of activations"])
@given(gate_batches(), st.sampled_from([0.05, 0.2, 1.0]), seeds)
def test_objectives_are_finite_and_do_not_depend_on_the_order_of_samples(objective, batch, temperature, seed):
    masks, labels = batch
    term = make_term(objective, temperature)
    loss = sum(term(masks, labels).values())
    assert loss.dim() == 0
    assert torch.isfinite(loss)
    if loss.requires_grad:
        loss.backward()
    for gates in masks.values():
        assert gates.grad is None or torch.isfinite(gates.grad).all()
    order = torch.randperm(len(labels), generator=rng(seed))
    other = sum(term({name: gates[order] for name, gates in masks.items()}, labels[order]).values())
    torch.testing.assert_close(other, loss, rtol=1e-4, atol=1e-5)
    renamed = {name: masks[name] for name in reversed(masks)}
    torch.testing.assert_close(sum(term(renamed, labels).values()), loss, rtol=1e-4, atol=1e-5)


@given(gate_batches())
def test_the_contrastive_loss_is_no_less_than_its_bound_and_zero_without_pairs(batch):
    masks, labels = batch
    loss = ContrastiveLoss(1.0, 0.2)(masks, labels)["loss_contrastive"].item()
    same = shares_label(labels) & ~torch.eye(len(labels), dtype=torch.bool)
    if not same.any():
        assert loss == 0
    else:  # logsumexp over n others of similarities in [0, 5], minus a mean of some of them
        assert -1e-4 <= loss <= 5 + math.log(len(labels)) + 1e-4


@st.composite
def mask_batches(draw, label_kind=label_batches):
    count, width = draw(sizes), draw(st.integers(1, 20))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return torch.rand(count, width, generator=rng(draw(seeds))) < share, draw(label_kind(count))


@given(mask_batches(), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_metrics_are_shares_or_say_that_there_is_none(batch, threshold):
    masks, labels = batch
    classes, class_masks = metrics.class_masks(masks, labels, threshold)
    assert class_masks.shape == (len(classes), masks.shape[1])
    members = [labels == c if labels.dim() == 1 else labels[:, c] for c in classes.tolist()]
    for member, class_mask in zip(members, class_masks, strict=True):
        needed = Fraction(str(threshold)) * int(member.sum())
        assert class_mask.tolist() == [count >= needed for count in masks[member].sum(0).tolist()]
    cohesion = metrics.cohesion(masks, labels, threshold).item()
    assert math.isnan(cohesion) == (not any(member.sum() > 1 for member in members))
    assert math.isnan(cohesion) or -1e-6 <= cohesion <= 1 + 1e-6
    coupling = metrics.coupling(class_masks).item()
    assert math.isnan(coupling) == (len(classes) < 2)
    assert math.isnan(coupling) or -1e-6 <= coupling <= 1 + 1e-6
    jaccard = metrics.pairwise_jaccard(masks)
    assert ((jaccard >= 0) & (jaccard <= 1)).all()
    assert torch.equal(jaccard, jaccard.T)
    assert 0 <= metrics.retention(masks) <= 1


@given(mask_batches(), st.data())
def test_statistics_equal_a_loop_whatever_the_batches(batch, data):
    masks, labels = batch
    gates = masks * torch.rand(masks.shape, generator=rng(data.draw(seeds)))
    dtype = data.draw(st.sampled_from(DTYPES))
    count = 5 if labels.dim() == 1 else 3
    first = data.draw(st.integers(0, masks.shape[1] - 1))
    layers = {"a": first, "b": masks.shape[1] - first} if first else {"b": masks.shape[1]}
    statistics = NeuronStatistics(list(range(count)), layers)
    parts = sorted(data.draw(st.lists(st.integers(0, len(labels)), max_size=3)))
    for start, stop in zip([0, *parts], [*parts, len(labels)], strict=True):
        chunk = gates[start:stop].to(dtype).split(list(layers.values()), 1)
        statistics.update(dict(zip(layers, chunk, strict=True)), labels[start:stop])
    is_open = gates.to(dtype) > 0
    for label in range(count):
        member = labels == label if labels.dim() == 1 else labels[:, label]
        assert statistics.num_samples[label] == member.sum()
        assert torch.equal(statistics.open_counts[label], is_open[member].sum(0).int())
        torch.testing.assert_close(statistics.gate_sums[label], gates.to(dtype).float()[member].sum(0))
    if statistics.num_samples.any():
        threshold = data.draw(st.sampled_from([0.1, 0.9, 1.0]))
        made = statistics.module_masks(threshold, uniform=data.draw(st.booleans()))
        assert made.labels == torch.nonzero(statistics.num_samples).flatten().tolist()
        assert all(mask.any() for label in made.labels for mask in made[label].values())  # no layer is empty
        assert all(((gate >= 0) & (gate <= 1)).all() for gate in made.mean_gates().values())
        assert 0 < made.retention() <= 1
        statistics.cohesion(threshold)


@st.composite
def selections(draw, count):
    widths = {f"layer{i}": draw(st.integers(1, 9)) for i in range(draw(st.integers(1, 3)))}
    masks = [
        {name: torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for name, n in widths.items()}
        for _ in range(count)
    ]
    return [NeuronMask(mask) for mask in masks]


@given(selections(3))
def test_selections_are_an_algebra(three):
    def same(one, other):
        return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)

    a, b, c = three
    before = [{name: mask.clone() for name, mask in selection.items()} for selection in three]
    assert same(a | b, b | a)
    assert same(a & b, b & a)
    assert same(a | (b | c), (a | b) | c)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a - b, a - (a & b))
    assert same((a - b) | (a & b), a)
    assert same(a | a, a)
    assert (a - a).retention == 0
    assert (a - b).retention + (a & b).retention == pytest.approx(a.retention)
    assert all(same(NeuronMask(kept), now) for kept, now in zip(before, three, strict=True))
    masks = ModuleMasks({"a": a, "b": b, "c": c})
    assert same(masks.union(["a", "c"]), a | c)
    assert masks.retention() == pytest.approx((a.retention + b.retention + c.retention) / 3)


@given(sizes, sizes, st.sampled_from(DTYPES), seeds, st.data())
def test_rows_and_columns_are_those_of_the_index(outputs, inputs, dtype, seed, data):
    weight = torch.randn(outputs, inputs, generator=rng(seed)).to(dtype)
    gates = torch.rand(outputs, generator=rng(seed))
    index = torch.tensor(data.draw(st.lists(st.integers(PADDING, outputs - 1), max_size=12)), dtype=torch.long)
    taken = take_rows(weight, index, gates)
    assert taken.dtype == dtype
    assert taken.shape == (len(index), inputs)
    for row, i in zip(taken, index.tolist(), strict=True):
        assert torch.equal(row, torch.zeros_like(row) if i == PADDING else weight[i] * gates[i].to(dtype))
    assert torch.equal(take_columns(weight.T, index), take_rows(weight, index).T)
    one_group = take_groups(weight[:, :, None, None], torch.arange(outputs)[None], torch.arange(inputs)[None])
    assert torch.equal(one_group, weight[:, :, None, None])


@given(sizes, sizes, seeds, st.data())
def test_padded_heads_hold_the_kept_units_in_order(num_heads, head_size, seed, data):
    keep = torch.rand(num_heads, head_size, generator=rng(seed)) < 0.5
    heads = torch.tensor(sorted(data.draw(st.sets(st.integers(0, num_heads - 1)))), dtype=torch.long)
    size = max(1, int(keep.sum(1).max()))
    index = padded_heads(keep, heads, size)
    assert index.shape == (len(heads) * size,)
    found = [unit for unit in index.tolist() if unit != PADDING]
    assert found == [h * head_size + i for h in heads.tolist() for i in keep[h].nonzero().flatten().tolist()]


@given(sizes, sizes, st.booleans(), seeds)
def test_a_folded_bias_is_what_dropped_inputs_gave(outputs, inputs, has_bias, seed):
    generator = rng(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    dropped = torch.rand(inputs, generator=generator) < 0.5
    constants = torch.randn(inputs, generator=generator)
    features = torch.where(dropped, constants, torch.randn(inputs, generator=generator))
    folded = folded_bias(weight, bias, dropped, constants)
    expected = torch.nn.functional.linear(features, weight, bias)
    actual = torch.nn.functional.linear(features[~dropped], weight[:, ~dropped], folded)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [VIT, BERT, RESNET, LLAMA], ids=str)
@given(
    keep=st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=30, max_size=30),
    labels=st.lists(st.sampled_from(LABELS), min_size=1, max_size=5, unique=True),
    kind=st.sampled_from(["mean", "binary"]),
    seed=seeds,
)
@example(keep=[0.0] * 30, labels=["cat"], kind="mean", seed=0)
@example(keep=[1.0] * 30, labels=LABELS, kind="binary", seed=0)
def test_a_module_computes_what_its_parent_does_with_these_gates_held(case, keep, labels, kind, seed):
    parent, generator = plain_parent(case), rng(seed)
    layers = list_maskable_layers(parent, ModularConfig())
    widths = {name: (num_neurons(parent, name), share) for name, share in zip(layers, keep * 9, strict=False)}
    masks = {
        label: {name: torch.rand(size, generator=generator) < share for name, (size, share) in widths.items()}
        for label in LABELS
    }
    gates = {
        label: {name: torch.rand(size, generator=generator) for name, (size, _) in widths.items()} for label in LABELS
    }
    module = check_exact(case, parent, masks, gates, labels, kind)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
