# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics against plain Python."""

import itertools
import math

import pytest
import torch
from models import VIT
from torch import nn

from nemo_hf import metrics


def naive_jaccard(first, second):
    first, second = ({i for i, kept in enumerate(mask.tolist()) if kept} for mask in (first, second))
    return len(first & second) / len(first | second) if first | second else 0.0


def naive_class_masks(samples, labels, threshold):
    result = {}
    for label in sorted(set(labels.tolist())):
        of_class = samples[labels == label].tolist()
        needed = threshold * len(of_class)
        result[label] = torch.tensor([sum(column) >= needed for column in zip(*of_class, strict=True)])
    return result


@pytest.fixture
def samples():
    labels = torch.randint(0, 4, (40,))
    probability = torch.rand(4, 30)[labels]
    return torch.rand(40, 30) < probability, labels


def test_pairwise_jaccard(samples):
    masks = torch.cat([samples[0][:6], torch.zeros(2, 30, dtype=torch.bool)])
    expected = torch.tensor([[naive_jaccard(first, second) for second in masks] for first in masks])
    torch.testing.assert_close(metrics.pairwise_jaccard(masks), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threshold", [0.5, 0.75, 1.0])
def test_class_masks_cohesion_and_coupling(samples, threshold):
    sample_masks, labels = samples
    expected = naive_class_masks(sample_masks, labels, threshold)
    classes, masks = metrics.class_masks(sample_masks, labels, threshold)
    assert classes.tolist() == list(expected)
    assert torch.equal(masks, torch.stack(list(expected.values())))

    per_class = []
    for label, mask in expected.items():
        of_class = [sample & mask for sample in sample_masks[labels == label]]
        scores = [naive_jaccard(first, second) for first, second in itertools.combinations(of_class, 2)]
        per_class.append(sum(scores) / len(scores))
    cohesion = sum(per_class) / len(per_class)
    assert metrics.cohesion(sample_masks, labels, threshold).item() == pytest.approx(cohesion, abs=1e-6)

    pairs = [naive_jaccard(first, second) for first, second in itertools.combinations(expected.values(), 2)]
    assert metrics.coupling(masks).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    kept = sum(int(mask.sum()) for mask in expected.values()) / (30 * len(expected))
    assert metrics.retention(masks).item() == pytest.approx(kept, abs=1e-6)


@pytest.mark.parametrize("samples", [10, 30, 100, 130])
def test_class_masks_meet_the_threshold_exactly_at_the_boundary(samples):
    for opened in range(1, samples + 1):
        sample_masks = torch.arange(samples)[:, None] < torch.tensor([opened, opened - 1])
        _, masks = metrics.class_masks(sample_masks, torch.zeros(samples, dtype=torch.long), opened / samples)
        assert masks.tolist() == [[True, False]], (opened, samples)


def test_without_pairs_there_is_no_cohesion_and_no_coupling():
    masks = torch.rand(3, 8) < 0.5
    assert math.isnan(metrics.cohesion(masks, torch.arange(3)))
    assert math.isnan(metrics.coupling(masks[:1]))
    assert metrics.cohesion(masks | True, torch.tensor([0, 0, 1])) == 1  # the class with one sample does not count


def test_count_flops_of_a_linear_layer():
    layer = nn.Linear(7, 5)
    assert metrics.count_flops(layer, {"input": torch.zeros(3, 7)}) == 2 * 3 * 7 * 5


def test_count_flops_sees_attention_and_leaves_the_model_alone():
    model, inputs = VIT.model(), {"pixel_values": VIT.inputs()["pixel_values"][:1]}
    implementation = model.config._attn_implementation
    tokens, width = 5, 32
    per_block = 2 * tokens * (4 * width * width + 2 * width * 64) + 2 * 2 * tokens * tokens * width
    patches = 2 * (tokens - 1) * 3 * 8 * 8 * width
    assert metrics.count_flops(model, inputs) == 3 * per_block + patches + 2 * width * 5
    assert model.config._attn_implementation == implementation


def test_count_parameters_counts_shared_ones_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert metrics.count_parameters(nn.Sequential(first, second)) == 16 + 4 + 4


def test_latency_ratio_tells_a_small_model_from_a_large_one():
    small, large = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 3000), nn.Linear(3000, 3000), nn.Linear(3000, 8))
    assert 0 < metrics.latency_ratio(small, large, {"input": torch.zeros(64, 8)}, pairs=5) < 1
