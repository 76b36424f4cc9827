# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The terms of the loss: values, independent recomputation, and finiteness at the edges."""

import math

import pytest
import torch

from nemo_hf import NemoValueError
from nemo_hf.objectives import ZERO_NORM, CohesionCouplingLoss, CompactnessLoss, ContrastiveLoss, NemoLoss


all_losses = pytest.mark.parametrize("loss_class", [ContrastiveLoss, NemoLoss, CohesionCouplingLoss])
LABELS = torch.arange(128) % 10


def value(loss_class, gates, labels, temperature=0.2, alpha=1.0):
    masks = gates if isinstance(gates, dict) else {"layer": gates}
    return sum(loss_class(alpha, temperature)(masks, labels).values())  # of CohesionCouplingLoss, the second is beta


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        (torch.ones(128, 40), 2.250),
        (torch.nn.functional.one_hot(LABELS, 10).float(), 0.0616),
        (torch.zeros(128, 40), math.log(2)),
    ],
    ids=["identical", "disjoint", "zero"],
)
def test_nemo_loss_has_the_check_values_of_the_reference(gates, expected):
    """METHOD.md 3: B = 128, labels `arange(128) % 10`, τ = 0.2."""
    torch.testing.assert_close(value(NemoLoss, gates, LABELS), torch.tensor(expected), atol=1e-3, rtol=0)


def naive_contrastive(masks, labels, temperature, alpha):
    """Khosla et al., equation 2, spelled out per sample in double precision."""
    per_layer = []
    for gates in masks.values():
        unit = [row / math.sqrt(row.square().sum() + ZERO_NORM) for row in gates.double()]
        terms = []
        for i in range(len(labels)):
            others = [j for j in range(len(labels)) if j != i]
            partners = [j for j in others if labels[j] == labels[i]]
            if partners:
                total = sum(math.exp(unit[i] @ unit[j] / temperature) for j in others)
                logs = [math.log(math.exp(unit[i] @ unit[j] / temperature) / total) for j in partners]
                terms.append(-sum(logs) / len(logs))
        per_layer.append(sum(terms) / len(terms))
    return alpha * sum(per_layer) / len(per_layer)


def naive_nemo(masks, labels, temperature, alpha):
    """METHOD.md 3, spelled out per sample in double precision."""
    per_layer = []
    for gates in masks.values():
        unit = gates.double() / gates.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
        terms = []
        for i in range(len(labels)):
            same = [float(labels[i] == label) for label in labels]
            positive = sum(math.exp(unit[i] @ unit[j] * same[j] / temperature) for j in range(len(labels)))
            negative = sum(math.exp(unit[i] @ unit[j] * (1 - same[j]) / temperature) for j in range(len(labels)))
            terms.append(-math.log((positive + 1e-8) / (positive + negative + 1e-8)))
        per_layer.append(sum(terms) / len(terms))
    return alpha * sum(per_layer) / len(per_layer)


@pytest.mark.parametrize(
    ("loss_class", "naive"), [(ContrastiveLoss, naive_contrastive), (NemoLoss, naive_nemo)], ids=["corrected", "nemo"]
)
def test_losses_equal_a_naive_loop(loss_class, naive):
    masks = {"a": torch.rand(12, 7), "b": torch.rand(12, 5).sub(0.5).relu(), "c": torch.rand(12, 7)}
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 5, 6, 6])  # label 5 has no partner
    expected = torch.tensor(naive(masks, labels, 0.3, 0.7), dtype=torch.float32)
    torch.testing.assert_close(value(loss_class, masks, labels, 0.3, 0.7), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["gates", "activations"])
@pytest.mark.parametrize("several", [False, True], ids=["one label each", "several labels each"])
def test_cohesion_and_coupling_equal_a_naive_loop_in_double_precision(several, scale):
    """METHOD.md 3 (MwT; MODA on activations), from the definition: cosine similarities of all pairs, one by one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": 7, "b": 5, "c": 7}
    masks = {
        name: scale * torch.rand(9, width, generator=generator, dtype=torch.float64).sub(0.3).relu()
        for name, width in shapes.items()
    }
    masks["b"][0] = 0  # nothing open: similar to nothing
    labels = torch.rand(9, 4, generator=generator) > 0.6 if several else torch.tensor([0, 1, 2, 0, 1, 2, 0, 5, 6])
    lacks, shared = [], []
    for gates in masks.values():
        alike, unlike = [], []
        for i in range(9):
            for j in range(i):
                squares = [float(gates[k].square().sum()) + ZERO_NORM for k in (i, j)]
                similarity = float(gates[i] @ gates[j]) / math.sqrt(squares[0] * squares[1])
                same = bool((labels[i] & labels[j]).any()) if several else labels[i] == labels[j]
                (alike if same else unlike).append(similarity)
        lacks.append(1 - sum(alike) / len(alike))
        shared.append(sum(unlike) / len(unlike))
    terms = CohesionCouplingLoss(0.7, 1.3)(masks, labels)
    assert terms["loss_cohesion"].item() == pytest.approx(0.7 * sum(lacks) / 3, abs=1e-12)
    assert terms["loss_coupling"].item() == pytest.approx(1.3 * sum(shared) / 3, abs=1e-12)


def test_cohesion_and_coupling_have_their_extremes():
    disjoint = {"layer": torch.nn.functional.one_hot(LABELS, 10).double() * 100}
    identical = {"layer": torch.full((128, 40), 100.0, dtype=torch.float64)}
    for masks, expected in ((disjoint, (0, 0)), (identical, (0, 1.5))):
        assert list(CohesionCouplingLoss(0.5, 1.5)(masks, LABELS).values()) == pytest.approx(expected, abs=1e-7)
    assert CohesionCouplingLoss(0.5, 1.5)(identical, torch.arange(128))["loss_cohesion"] == 0  # no pairs
    assert CohesionCouplingLoss(0.5, 1.5)(identical, torch.zeros(128).long())["loss_coupling"] == 0


def test_corrected_loss_does_not_prefer_collapsed_gates():
    identical, zero = (value(ContrastiveLoss, gates, LABELS) for gates in (torch.ones(128, 40), torch.zeros(128, 40)))
    disjoint = value(ContrastiveLoss, torch.nn.functional.one_hot(LABELS, 10).float(), LABELS)
    torch.testing.assert_close(zero, identical, atol=1e-4, rtol=0)
    assert disjoint < identical - 1


@all_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("gates", "labels"),
    [
        (torch.rand(6, 8), torch.zeros(6, dtype=torch.long)),
        (torch.rand(6, 8), torch.arange(6)),
        (torch.rand(1, 8), torch.zeros(1, dtype=torch.long)),
        (torch.zeros(6, 8), torch.arange(6) % 2),
        (torch.ones(6, 8), torch.arange(6) % 2),
    ],
    ids=["one class", "no pairs", "one sample", "all zero", "all one"],
)
def test_value_and_gradient_are_finite(loss_class, gates, labels, dtype):
    gates = gates.clone().to(dtype).requires_grad_()
    loss = value(loss_class, gates, labels, temperature=0.05)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    (gradient,) = torch.autograd.grad(loss, gates)
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()


def test_a_batch_without_pairs_gives_zero():
    assert value(ContrastiveLoss, torch.rand(6, 8), torch.arange(6)) == 0


def test_a_row_of_zeros_has_a_gradient():
    gates = torch.rand(6, 8)
    gates[0] = 0
    gates.requires_grad_()
    (gradient,) = torch.autograd.grad(value(ContrastiveLoss, gates, torch.arange(6) % 2), gates)
    assert gradient[0].abs().min() > 0


@all_losses
def test_half_precision_is_close_to_single(loss_class):
    gates = torch.rand(32, 24).to(torch.bfloat16)
    expected = value(loss_class, gates.float(), LABELS[:32])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value(loss_class, gates, LABELS[:32]), expected, atol=1e-6, rtol=1e-6)


def test_compactness_is_a_hinge_on_the_mean_over_all_neurons():
    masks = {"wide": torch.full((4, 30), 0.4), "narrow": torch.full((4, 10), 0.8).to(torch.bfloat16)}
    mean = (0.4 * 30 + 0.8 * 10) / 40
    loss = CompactnessLoss(2.0, 0.1)(masks, None)["loss_compactness"]
    torch.testing.assert_close(loss, torch.tensor(2.0 * (mean - 0.1)), atol=2e-3, rtol=0)
    assert CompactnessLoss(2.0, 0.6)(masks, None)["loss_compactness"] == 0


def test_compactness_of_activations_pulls_until_few_are_active():
    active = torch.tensor([[8.0, 0.0, 0.0, 4.0], [2.0, 0.0, 6.0, 0.0]], requires_grad=True)
    for target, weight in ((0.4, 2.0), (0.5, 0.0)):
        loss = CompactnessLoss(2.0, target, activations=True)({"layer": active}, None)["loss_compactness"]
        assert loss.item() == pytest.approx(weight * 20 / 8)
    (gradient,) = torch.autograd.grad(
        CompactnessLoss(2.0, 0.0, True)({"layer": active}, None)["loss_compactness"], active
    )
    torch.testing.assert_close(gradient, torch.full_like(active, 2.0 / 8))


@all_losses
def test_labels_that_are_no_classes_are_refused(loss_class):
    gates = torch.rand(4, 8)
    with pytest.raises(NemoValueError, match="the batch has no labels"):
        value(loss_class, gates, None)
    with pytest.raises(NemoValueError, match=r"one integer label per sample.*got torch.float32.*Regression"):
        value(loss_class, gates, torch.rand(4))
    with pytest.raises(NemoValueError, match=r"shape \(4,\); got torch.int64 of shape \(4, 2\)"):
        value(loss_class, gates, torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(NemoValueError, match="the forward pass recorded none"):
        value(loss_class, {}, torch.arange(4))
