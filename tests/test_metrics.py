# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics against plain Python."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import BERT, LABELS, LLAMA, RESNET, VIT, Samples, module_masks
from torch import nn

from nemo_hf import collect_statistics, extract_module, metrics, record_masks
from nemo_hf.extraction import module_overlap, module_parameters


over_families = pytest.mark.parametrize("case", [VIT, BERT, RESNET, LLAMA], ids=str)
SELECTIONS = [["cat"], ["elk", "ant"], ["cat", "dog"], LABELS]


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


@pytest.mark.parametrize("packed", [False, True], ids=["booleans", "packed"])
def test_blocks_do_not_change_what_is_computed(samples, packed, monkeypatch):
    masks = samples[0]
    expected = torch.tensor([[naive_jaccard(first, second) for second in masks] for first in masks])
    of_classes = torch.stack(list(naive_class_masks(*samples, 0.5).values()))
    given = torch.from_numpy(np.packbits(masks.numpy(), axis=1)) if packed else masks
    for rows, columns in ((4, 8), (7, 16), (2048, 8192)):
        monkeypatch.setattr(metrics, "BLOCK_ROWS", rows)
        monkeypatch.setattr(metrics, "BLOCK_COLUMNS", columns)
        torch.testing.assert_close(metrics.pairwise_jaccard(given), expected, atol=1e-6, rtol=0)
        mean = expected.triu(1).sum() / (40 * 39 / 2)
        torch.testing.assert_close(metrics.mean_jaccard(given), mean, atol=1e-6, rtol=0)
        assert torch.equal(metrics.class_masks(*samples, 0.5)[1], of_classes)
        common = metrics.intersection_sizes(given[:3], given[5:])
        assert common.tolist() == [[int((first & second).sum()) for second in masks[5:]] for first in masks[:3]]


@over_families
def test_cohesion_and_coupling_of_a_model_equal_a_naive_loop(case):
    model, data = case.masked(), Samples(case, size=20)
    batches = [data.batch(*range(start, start + 5)) for start in range(0, 20, 5)]
    with torch.no_grad():
        rows = []
        for batch in batches:
            with record_masks(model) as gates:
                model(**{name: value for name, value in batch.items() if name != "labels"})
            rows.append(torch.cat(list(gates.values()), 1) > 0)
    rows, labels = torch.cat(rows), data.columns["labels"]
    statistics = collect_statistics(model, batches, disable_tqdm=True, reservoir_samples=None)
    expected = naive_class_masks(rows, labels, 0.75)
    scores = []
    for label, mask in expected.items():
        pairs = itertools.combinations([row & mask for row in rows[labels == label]], 2)
        scores.append(np.mean([naive_jaccard(*pair) for pair in pairs]))
    assert 0 < statistics.cohesion(0.75) == pytest.approx(np.mean(scores), abs=1e-6)
    masks = statistics.module_masks(0.75)
    joined = [torch.cat(list(masks[label].values())) for label in LABELS]
    pairs = [naive_jaccard(*pair) for pair in itertools.combinations(joined, 2)]
    assert 0 < masks.coupling() == pytest.approx(np.mean(pairs), abs=1e-6)


def linear_parameters(model):
    """Counted layer by layer, by the names of the layers' classes."""
    kinds = {"Linear", "Conv1D", "Conv2d"}
    layers = [layer for _, layer in model.named_modules() if type(layer).__name__ in kinds]
    return sum(tensor.numel() for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None)


@over_families
def test_weight_retention_over_all_parameters_and_over_linear_layers(case):
    plain, parent = case.model(), case.masked()
    masks = module_masks(parent)
    for labels in SELECTIONS:
        module = extract_module(parent, masks, labels)
        total = sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in plain.parameters())
        linear = linear_parameters(module) / linear_parameters(plain)
        for model in (plain, parent):  # generators do not count
            assert metrics.parameter_retention(module, model) == total == module.config.nemo["parameter_retention"]
            assert metrics.parameter_retention(module, model, linear_only=True) == linear != total
        assert metrics.count_parameters(module, linear_only=True) == linear_parameters(module)
        assert module_parameters(parent, masks, [labels], linear_only=True) == [linear_parameters(module)]
    assert metrics.count_parameters(parent, generators=False) == sum(p.numel() for p in plain.parameters())


@over_families
def test_overlap_equals_that_of_the_sets_of_parameters(case):
    """Every parameter of the parent is a number of its own, which modules without mean gates hold unchanged."""
    parent, start = case.masked().double(), 1
    names = metrics.parameter_names(parent, generators=False)
    for name in sorted(names):
        parameter = parent.get_parameter(name)
        parameter.data = torch.arange(start, start + parameter.numel(), dtype=torch.float64).view_as(parameter)
        start += parameter.numel()
    masks = module_masks(parent)
    before = {name: parameter.clone() for name, parameter in parent.named_parameters()}
    overlap = module_overlap(parent, masks, SELECTIONS)
    modules = [extract_module(parent, masks, labels, gates="binary") for labels in SELECTIONS]
    numbers = [{int(n) for p in module.parameters() for n in p.flatten().tolist()} - {0} for module in modules]
    expected = [[len(first & second) / (start - 1) for second in numbers] for first in numbers]
    torch.testing.assert_close(overlap, torch.tensor(expected), atol=1e-7, rtol=0)
    assert overlap[0, 1] < overlap[0, 0] == overlap[0, 2]
    assert all(torch.equal(parameter, before[name]) for name, parameter in parent.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parent.parameters())


@pytest.mark.slow
def test_cohesion_of_fifty_thousand_samples_stays_below_two_gigabytes():
    code = """
import resource, time, torch
from nemo_hf import NeuronStatistics
torch.manual_seed(0)
statistics = NeuronStatistics([str(i) for i in range(10)], {"layer": 40_000}, reservoir_samples=None)
probability = torch.rand(10, 40_000).square_()
for _ in range(500):
    labels = torch.randint(0, 10, (100,))
    statistics.update({"layer": (torch.rand(100, 40_000) < probability[labels]).float()}, labels)
start = time.perf_counter()
print(statistics.cohesion(0.9), time.perf_counter() - start, statistics.module_masks(0.9).retention())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) < 2e9, result.stdout


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
