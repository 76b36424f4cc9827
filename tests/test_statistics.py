# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Statistics: exact counts whatever the batches, bounded memory, files written whole or not at all."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import LABELS, VIT, Samples, over_models, over_two_models

from nemo_hf import (
    CheckpointError,
    NemoValueError,
    NeuronStatistics,
    collect_statistics,
    extract_module,
    files,
    metrics,
    record_masks,
)


LAYERS = {"first": 5, "second": 12}


def batches(gates, labels, size):
    for start in range(0, len(labels), size):
        yield {name: gate[start : start + size] for name, gate in gates.items()}, labels[start : start + size]


def collected(gates, labels, size=16, **options):
    statistics = NeuronStatistics(LABELS, LAYERS, **options)
    for batch in batches(gates, labels, size):
        statistics.update(*batch)
    return statistics


@pytest.fixture
def data():
    labels = torch.randint(0, 4, (50,))  # no sample of the last label
    return {name: (torch.rand(50, size) - 0.5).relu() for name, size in LAYERS.items()}, labels


def naive(gates, labels):
    """Counts in plain Python."""
    rows = torch.cat(list(gates.values()), 1).tolist()
    counts, sums = ([[0.0] * 17 for _ in LABELS] for _ in range(2))
    for row, label in zip(rows, labels.tolist(), strict=True):
        for neuron, gate in enumerate(row):
            counts[label][neuron] += gate > 0
            sums[label][neuron] += gate
    return torch.tensor(counts, dtype=torch.int32), torch.tensor(sums)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_counts_equal_a_naive_loop_for_every_batch_size(data, size):
    statistics = collected(*data, size=size)
    counts, sums = naive(*data)
    assert torch.equal(statistics.open_counts, counts)
    torch.testing.assert_close(statistics.gate_sums, sums, atol=1e-5, rtol=1e-5)
    assert statistics.num_samples.tolist() == [int((data[1] == label).sum()) for label in range(5)]
    torch.testing.assert_close(
        statistics.frequency(), counts / statistics.num_samples.clamp(min=1)[:, None], atol=1e-6, rtol=0
    )
    expected = metrics.cohesion(torch.cat(list(data[0].values()), 1) > 0, data[1], 0.5).item()
    assert statistics.cohesion(0.5) == pytest.approx(expected, abs=1e-6)  # the reservoir holds all samples


def kept_samples(statistics):
    """Label, key and bits of every sample in the reservoir."""
    reservoir = statistics._reservoir
    rows = zip(reservoir.labels.tolist(), reservoir.keys.tolist(), map(bytes, reservoir.bits), strict=True)
    return sorted(rows)


def test_reservoir_does_not_depend_on_batch_sizes_and_memory_not_on_samples():
    labels = torch.randint(0, 5, (400,))
    gates = {name: (torch.rand(400, size) - 0.5).relu() for name, size in LAYERS.items()}
    every = [collected(gates, labels, size, reservoir_samples=20) for size in (1, 33, 400)]
    for statistics in every:
        assert kept_samples(statistics) == kept_samples(every[0])
        assert np.bincount(statistics._reservoir.labels).tolist() == [20] * 5
        assert len(statistics._reservoir._keys) == 100
        assert statistics.open_counts.shape == statistics.gate_sums.shape == (5, 17)
    full = metrics.cohesion(torch.cat(list(gates.values()), 1) > 0, labels, 0.3).item()
    assert every[0].cohesion(0.3) == pytest.approx(full, abs=0.1)


def test_reservoir_keeps_the_samples_with_the_smallest_keys():
    keys = np.random.default_rng(0).random(400)
    labels = torch.randint(0, 5, (400,))
    gates = {name: (torch.rand(400, size) - 0.5).relu() for name, size in LAYERS.items()}
    bits = np.packbits(torch.cat(list(gates.values()), 1).numpy() > 0, axis=1)
    expected = []
    for label in range(5):
        mine = sorted((key, i) for i, key in enumerate(keys.tolist()) if labels[i] == label)[:7]
        expected += [(label, key, bytes(bits[i])) for key, i in mine]
    assert kept_samples(collected(gates, labels, 23, reservoir_samples=7)) == expected


def test_reservoir_of_all_samples_makes_cohesion_exact():
    labels = (torch.rand(3000) ** 3 * 5).long()  # some labels have many more samples than others
    gates = {name: (torch.rand(3000, size) - 0.5).relu() for name, size in LAYERS.items()}
    statistics = collected(gates, labels, 100, reservoir_samples=None)
    assert len(statistics._reservoir.labels) == 3000
    full = metrics.cohesion(torch.cat(list(gates.values()), 1) > 0, labels, 0.5).item()
    assert statistics.cohesion(0.5) == pytest.approx(full, abs=1e-6)
    assert collected(gates, labels, 100).cohesion(0.5) == pytest.approx(full, abs=0.05)
    assert collected(gates, labels, 100).cohesion(0.5) != statistics.cohesion(0.5)


@pytest.mark.parametrize("number", [0, 1, -5, 2.5, "all"])
def test_reservoirs_that_hold_no_pairs_are_refused(number):
    with pytest.raises(NemoValueError, match=f"from 2 up .cohesion needs pairs., or None.*got {number!r}"):
        NeuronStatistics(LABELS, LAYERS, reservoir_samples=number)


def test_memory_for_a_thousand_labels_and_forty_thousand_neurons_is_below_400_mb():
    code = """
import resource, torch
from nemo_hf import NeuronStatistics
layers = {str(i): 1000 for i in range(40)}
warm = NeuronStatistics(["a", "b"], {"0": 8})
warm.update({"0": torch.rand(2, 8)}, torch.tensor([0, 1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
statistics = NeuronStatistics([str(i) for i in range(1000)], layers)
gates = {name: torch.rand(64, 1000).sub_(0.5).relu_() for name in layers}
for step in range(90):
    statistics.update(gates, (torch.arange(64) + 64 * step) % 1000)
assert len(statistics._reservoir.labels) == 5000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 400e6


@pytest.mark.parametrize(
    ("samples", "opened", "threshold", "kept"),
    [
        (10, 9, 0.9, True),
        (10, 8, 0.9, False),
        (10, 7, 0.7, True),
        (100, 29, 0.29, True),
        (100, 7, 0.07, True),
        (100, 6, 0.07, False),
        (3, 3, 1.0, True),
        (3, 2, 1, False),
    ],
)
def test_threshold_is_met_exactly_at_the_boundary(samples, opened, threshold, kept):
    gates = torch.zeros(samples, 2)
    gates[:, 0] = 1  # so that the layer is not empty
    gates[:opened, 1] = 0.5
    statistics = NeuronStatistics(["only"], {"layer": 2})
    statistics.update({"layer": gates}, torch.zeros(samples, dtype=torch.long))
    assert statistics.module_masks(threshold)["only"]["layer"].tolist() == [True, kept]


def test_module_masks_equal_a_naive_loop(data):
    masks = collected(*data).module_masks(0.5)
    assert masks.labels == LABELS[:4]  # a label without samples has no mask
    assert (masks.threshold, masks.origin) == (0.5, "statistics")
    for label, (layer, gate) in itertools.product(range(4), data[0].items()):
        of_label = gate[data[1] == label]
        share = (of_label > 0).double().mean(0)
        expected = share >= 0.5 if (share >= 0.5).any() else torch.arange(len(share)) == share.argmax()
        assert torch.equal(masks[LABELS[label]][layer], expected)
        mean = masks.mean_gates([LABELS[label]])[layer]
        torch.testing.assert_close(mean, of_label.mean(0), atol=1e-6, rtol=1e-6)


def test_an_empty_layer_keeps_its_most_frequent_neuron():
    gates = {"first": torch.zeros(10, 5), "second": torch.zeros(10, 12)}
    gates["first"][:4, 3] = 1
    gates["first"][:3, 1] = 1
    masks = collected(gates, torch.zeros(10, dtype=torch.long)).module_masks(0.9)
    assert masks["ant"]["first"].tolist() == [False, False, False, True, False]
    assert masks["ant"]["second"].sum() == 1


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan"), "0.9", None])
def test_threshold_outside_its_range_is_refused(data, threshold):
    with pytest.raises(NemoValueError, match=rf"must be in \(0, 1\], got {threshold!r}"):
        collected(*data).module_masks(threshold)


def test_without_samples_there_are_no_masks():
    with pytest.raises(NemoValueError, match="count no samples"):
        NeuronStatistics(LABELS, LAYERS).module_masks()


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.zeros(2, 2, dtype=torch.long)],
)
def test_labels_out_of_range_are_refused(labels):
    statistics = NeuronStatistics(LABELS, LAYERS)
    with pytest.raises(NemoValueError, match="one integer label from 0 to 4 per sample"):
        statistics.update({name: torch.rand(2, size) for name, size in LAYERS.items()}, labels)
    assert statistics.num_samples.sum() == 0


def test_save_and_load_are_inverse(data, tmp_path):
    statistics = collected(*data)
    statistics.save_pretrained(tmp_path)
    loaded = NeuronStatistics.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.layers) == (statistics.labels, statistics.layers)
    for name in ("open_counts", "gate_sums", "num_samples"):
        assert torch.equal(getattr(loaded, name), getattr(statistics, name))
    assert loaded.cohesion() == statistics.cohesion()
    for layer in LAYERS:
        for label in LABELS[:4]:
            assert torch.equal(loaded.module_masks()[label][layer], statistics.module_masks()[label][layer])
    assert [file.name for file in tmp_path.iterdir()] == ["neuron_statistics.safetensors"]


def test_files_with_a_row_of_slots_for_every_label_are_read(data, tmp_path):
    statistics = collected(*data)
    statistics.save_pretrained(tmp_path)
    path = tmp_path / "neuron_statistics.safetensors"
    tensors, description = files.read_tensors(tmp_path, path.name)
    del description["reservoir_samples"]
    labels = tensors.pop("reservoir_labels").long()
    slots = torch.arange(50)  # more than any label has samples
    keys, bits = torch.full((5, 50), float("inf"), dtype=torch.float64), torch.zeros(5, 50, 3, dtype=torch.uint8)
    keys[labels, slots], bits[labels, slots] = tensors["reservoir_keys"], tensors["reservoir_bits"]
    files.write_tensors(path, {**tensors, "reservoir_keys": keys, "reservoir_bits": bits}, description)
    assert kept_samples(NeuronStatistics.from_pretrained(tmp_path)) == kept_samples(statistics)


def test_damaged_files_are_refused(data, tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no neuron_statistics.safetensors in .*collect_statistics"):
        NeuronStatistics.from_pretrained(tmp_path)
    statistics = collected(*data)
    statistics.save_pretrained(tmp_path)
    path = tmp_path / "neuron_statistics.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"not a file of tensors"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="neuron_statistics.safetensors is damaged or was not written by"):
            NeuronStatistics.from_pretrained(tmp_path)
    tensors = {"num_samples": torch.zeros(3, dtype=torch.int64), "open_counts": statistics.open_counts}
    files.write_tensors(path, tensors, {"labels": LABELS, "layers": dict.fromkeys(LAYERS, 10**12)})
    with pytest.raises(CheckpointError, match=r"is damaged \(.*counts and layers do not fit"):
        NeuronStatistics.from_pretrained(tmp_path)
    files.write_tensors(path, tensors, {"labels": LABELS, "layers": LAYERS})
    with pytest.raises(CheckpointError, match=r"is damaged \(.*num_samples has shape \(3,\)"):
        NeuronStatistics.from_pretrained(tmp_path)
    statistics.save_pretrained(tmp_path)
    good, description = files.read_tensors(tmp_path, path.name)
    for name, value in (
        ("reservoir_bits", good["reservoir_bits"][:, :1]),
        ("reservoir_keys", good["reservoir_keys"][1:]),
        ("reservoir_labels", good["reservoir_labels"] + 3),
    ):
        files.write_tensors(path, {**good, name: value.clone()}, description)
        with pytest.raises(CheckpointError, match="is damaged .*the reservoir has"):
            NeuronStatistics.from_pretrained(tmp_path)
    files.write_tensors(path, tensors, {"labels": LABELS})
    with pytest.raises(CheckpointError, match=r"is damaged \(KeyError\('layers'\)"):
        NeuronStatistics.from_pretrained(tmp_path)
    files.write_tensors(path, tensors, {"format": 99})
    with pytest.raises(CheckpointError, match="format 99, newer than this nemo_hf reads. Upgrade"):
        NeuronStatistics.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(data, tmp_path, monkeypatch):
    statistics = collected(*data)
    statistics.save_pretrained(tmp_path)
    before = (tmp_path / "neuron_statistics.safetensors").read_bytes()

    def fail(_tensors, path, **_options):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("nemo_hf.files.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        NeuronStatistics(LABELS, LAYERS).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["neuron_statistics.safetensors"]
    assert (tmp_path / "neuron_statistics.safetensors").read_bytes() == before


@over_models
def test_collect_statistics_streams_over_a_model(case):
    model, data = case.masked(), Samples(case, size=12)
    model.train()
    statistics = collect_statistics(model, [data.batch(*range(5)), data.batch(*range(5, 12))], disable_tqdm=True)
    assert model.training
    assert statistics.labels == LABELS
    model.eval()
    with torch.no_grad(), record_masks(model) as gates:
        model(**{name: value for name, value in data.columns.items() if name != "labels"})
    assert statistics.layers == {name: gate.shape[1] for name, gate in gates.items()}
    joined = torch.cat(list(gates.values()), 1)
    for label in range(5):
        of_label = joined[data.columns["labels"] == label]
        assert statistics.num_samples[label] == len(of_label)
        # Rounding may differ between batches of other sizes: gates at the very edge may flip.
        clear = (of_label == 0).logical_or(of_label > 1e-5).all(0)
        assert torch.equal(statistics.open_counts[label][clear], (of_label > 0).sum(0).int()[clear])
        torch.testing.assert_close(statistics.gate_sums[label], of_label.sum(0), atol=1e-4, rtol=1e-4)


@over_two_models
def test_collect_statistics_refuses_what_it_cannot_count(case):
    batch = Samples(case).batch(0, 1, 2)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    model = case.masked()
    model.train()
    with pytest.raises(NemoValueError, match=rf"no 'labels', only {', '.join(unlabelled)}. Neurons are chosen"):
        collect_statistics(model, [unlabelled], disable_tqdm=True)
    assert model.training
    with pytest.raises(NemoValueError, match="one integer label from 0 to 4.*values from . to 9"):
        collect_statistics(model, [{**batch, "labels": torch.tensor([0, 1, 9])}], disable_tqdm=True)
    with pytest.raises(NemoValueError, match="Batches must be dictionaries of tensors with 'labels', got tuple"):
        collect_statistics(model, [tuple(batch.values())], disable_tqdm=True)
    with pytest.raises(NemoValueError, match="must be a tensor, got int. Pass a `DataLoader`, not a dataset"):
        collect_statistics(model, [{**batch, "labels": 1}], disable_tqdm=True)
    with pytest.raises(NemoValueError, match="needs ModuleMasks, got NeuronStatistics.*module_masks"):
        extract_module(model, collect_statistics(model, [batch], disable_tqdm=True), ["cat"])
    with pytest.raises(NemoValueError, match="has no masks. Train it with .ModularTrainer"):
        collect_statistics(case.model(), [batch], disable_tqdm=True)


def test_labels_may_have_another_name():
    batch = Samples(VIT).batch(0, 1, 2)
    batch["fine_label"] = batch.pop("labels")
    statistics = collect_statistics(VIT.masked(), [batch], labels_name="fine_label", disable_tqdm=True)
    assert statistics.num_samples.tolist() == [1, 1, 1, 0, 0]
    assert "5 labels" in repr(statistics)
