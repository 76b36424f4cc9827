# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Several labels per sample: losses, metrics and counts against plain Python; training; labels that are no classes."""

import itertools
import math

import datasets
import pytest
import torch
from models import DEIT_TEACHER, LABELS, VIT, Samples, arguments, close, over_two_models
from torch import nn

from nemo_hf import (
    ModularConfig,
    ModularTrainer,
    NemoValueError,
    NeuronStatistics,
    apply_masks,
    collect_statistics,
    constant_gates,
    extract_module,
    hold_gates,
    metrics,
    record_masks,
)
from nemo_hf.objectives import ZERO_NORM, ContrastiveLoss, NemoLoss


LAYERS = {"first": 5, "second": 12}
MULTI_HOT = [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]


def share(first, second):
    return any(a and b for a, b in zip(first, second, strict=True))


def naive_contrastive(gates, labels, temperature):
    unit = [row / math.sqrt(row.square().sum() + ZERO_NORM) for row in gates.double()]
    terms = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        partners = [j for j in others if share(labels[i], labels[j])]
        if partners:
            total = sum(math.exp(unit[i] @ unit[j] / temperature) for j in others)
            terms.append(-sum(math.log(math.exp(unit[i] @ unit[j] / temperature) / total) for j in partners))
            terms[-1] /= len(partners)
    return sum(terms) / len(terms)


def naive_nemo(gates, labels, temperature):
    unit = gates.double() / gates.double().norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(labels)):
        same = [float(share(labels[i], other)) for other in labels]
        positive = sum(math.exp(unit[i] @ unit[j] * same[j] / temperature) for j in range(len(labels)))
        negative = sum(math.exp(unit[i] @ unit[j] * (1 - same[j]) / temperature) for j in range(len(labels)))
        terms.append(-math.log((positive + 1e-8) / (positive + negative + 1e-8)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("loss_class", "naive"), [(ContrastiveLoss, naive_contrastive), (NemoLoss, naive_nemo)], ids=["corrected", "nemo"]
)
def test_losses_equal_a_naive_loop(loss_class, naive):
    gates = torch.rand(6, 9)
    (term,) = loss_class(1.0, 0.3)({"layer": gates}, torch.tensor(MULTI_HOT).bool()).values()
    torch.testing.assert_close(term, torch.tensor(naive(gates, MULTI_HOT, 0.3)).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss_class", [ContrastiveLoss, NemoLoss])
def test_losses_are_finite_without_any_label(loss_class):
    gates = torch.rand(4, 6).requires_grad_()
    (term,) = loss_class(1.0, 0.2)({"layer": gates}, torch.zeros(4, 5, dtype=torch.bool)).values()
    (gradient,) = torch.autograd.grad(term, gates)
    assert torch.isfinite(gradient).all()
    assert term == 0 if loss_class is ContrastiveLoss else torch.isfinite(term)


@pytest.mark.parametrize("loss_class", [ContrastiveLoss, NemoLoss])
def test_one_hot_labels_give_what_ids_give(loss_class):
    ids, gates = torch.arange(12) % 5, {"layer": torch.rand(12, 8)}
    one_hot = nn.functional.one_hot(ids, 5).bool()
    assert list(loss_class(1.0, 0.2)(gates, ids).values()) == list(loss_class(1.0, 0.2)(gates, one_hot).values())
    is_open = torch.rand(12, 8) < 0.5
    assert metrics.cohesion(is_open, ids, 0.5) == metrics.cohesion(is_open, one_hot, 0.5)
    statistics = [NeuronStatistics(LABELS, {"layer": 8}) for _ in range(2)]
    for counted, labels in zip(statistics, (ids, one_hot), strict=True):
        counted.update(gates, labels)
    for name in ("num_samples", "open_counts", "gate_sums"):
        assert torch.equal(getattr(statistics[0], name), getattr(statistics[1], name))
    assert (statistics[0]._reservoir.bits == statistics[1]._reservoir.bits).all()


def naive_jaccard(first, second):
    first, second = (set(mask.nonzero().flatten().tolist()) for mask in (first, second))
    return len(first & second) / len(first | second) if first | second else 0.0


def test_class_masks_and_cohesion_equal_a_naive_loop():
    is_open, labels = torch.rand(30, 20) < 0.6, torch.rand(30, 5) < 0.4
    labels[:, 3] = False  # a label that does not occur
    labels[:4] = False
    classes, masks = metrics.class_masks(is_open, labels, 0.5)
    assert classes.tolist() == [0, 1, 2, 4]
    scores = []
    for label, mask in zip(classes.tolist(), masks, strict=True):
        of_label = is_open[labels[:, label]]
        assert torch.equal(mask, of_label.double().mean(0) >= 0.5)
        pairs = list(itertools.combinations(of_label & mask, 2))
        scores.append(sum(naive_jaccard(*pair) for pair in pairs) / len(pairs))
    expected = sum(scores) / len(scores)
    assert metrics.cohesion(is_open, labels, 0.5).item() == pytest.approx(expected, abs=1e-6)
    nothing = metrics.class_masks(is_open, labels & False, 0.5)
    assert (len(nothing[0]), nothing[1].shape) == (0, (0, 20))
    assert math.isnan(metrics.coupling(nothing[1]))
    assert math.isnan(metrics.cohesion(is_open, labels & False))


@pytest.mark.parametrize("size", [1, 7, 40])
def test_statistics_count_a_sample_for_every_label_it_has(size):
    gates = {name: (torch.rand(40, width) - 0.5).relu() for name, width in LAYERS.items()}
    labels = torch.rand(40, 5) < 0.4
    labels[:, 4] = False
    labels[5:9] = False
    statistics = NeuronStatistics(LABELS, LAYERS)
    for start in range(0, 40, size):
        rows = slice(start, start + size)
        statistics.update({name: gate[rows] for name, gate in gates.items()}, labels[rows])
    joined = torch.cat(list(gates.values()), 1)
    for label in range(5):
        of_label = [row for row, has in zip(joined, labels[:, label].tolist(), strict=True) if has]
        assert statistics.num_samples[label] == len(of_label)
        total = sum(of_label, torch.zeros(17))
        torch.testing.assert_close(statistics.gate_sums[label], total, atol=1e-5, rtol=1e-5)
        count = sum((row > 0 for row in of_label), torch.zeros(17, dtype=torch.int32))
        assert torch.equal(statistics.open_counts[label], count.int())
    expected = metrics.cohesion(joined > 0, labels, 0.5).item()
    assert statistics.cohesion(0.5) == pytest.approx(expected, abs=1e-6)  # the reservoir holds all samples
    assert statistics.module_masks().labels == LABELS[:4]


def test_counting_copies_no_more_than_a_batch(monkeypatch):
    copied, add = [], torch.Tensor.index_add_
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda *args: (copied.append(len(args[3])), add(*args))[1])
    statistics = NeuronStatistics([str(i) for i in range(50)], {"layer": 3})
    statistics.update({"layer": torch.ones(8, 3)}, torch.ones(8, 50, dtype=torch.bool))
    assert max(copied) <= 8
    assert len(copied) == 2 * 50  # one step per label of a sample, not per sample
    assert (statistics.open_counts == 8).all()


class ManyLabels(Samples):
    """Two labels per sample, both visible; every tenth sample has none."""

    def __init__(self, case, size=40, seed=0, dtype=torch.float32):
        super().__init__(case, size, seed)
        ids = self.columns["labels"]
        labels = nn.functional.one_hot(ids, 5) | nn.functional.one_hot((ids + 1) % 5, 5)
        labels[::10] = 0
        self.columns["labels"] = labels.to(dtype)


def trainer_of(case, output_dir, dtype=torch.float32, **options):
    return ModularTrainer(
        case.model(),
        arguments(output_dir, **options),
        train_dataset=ManyLabels(case, dtype=dtype),
        eval_dataset=ManyLabels(case, 16, seed=1, dtype=dtype),
        modular_config=ModularConfig(generator_init="paper"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
@over_two_models
def test_training_evaluation_and_extraction(case, dtype, tmp_path):
    options = {"max_steps": 40, "learning_rate": 1e-2, "alpha": 1.0, "compactness": 0.0, "logging_steps": 20}
    trainer = trainer_of(case, tmp_path, dtype, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert trainer.model.config.problem_type == "multi_label_classification"
    for name in ("eval_loss_task", "eval_loss_contrastive"):
        assert after[name] < before[name]
    assert {"eval_cohesion", "eval_coupling"} <= set(after)
    assert trainer.predict(trainer.eval_dataset).label_ids.shape == (16, 5)

    statistics = trainer.collect_statistics()
    assert statistics.num_samples.tolist() == trainer.train_dataset.columns["labels"].sum(0).tolist()
    assert statistics.grouped_by is None
    masks = statistics.module_masks()
    module = extract_module(trainer.model, masks, ["dog", "bee"])
    inputs = case.inputs()
    held = constant_gates(trainer.model, masks, ["dog", "bee"], "mean")
    with torch.no_grad(), hold_gates(trainer.model.eval(), held):
        close(module(**inputs).logits, trainer.model(**inputs).logits[:, [3, 1]])
    assert module.config.problem_type == "multi_label_classification"


def test_the_loss_is_that_of_transformers_plus_the_terms(tmp_path):
    trainer = trainer_of(VIT, tmp_path, alpha=0.7, compactness=0.0, gate_mixing_ratio=0.0)
    batch = ManyLabels(VIT, dtype=torch.int64).batch(*range(12))
    with record_masks(trainer.model) as gates:
        logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    task = nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"].float())
    term = ContrastiveLoss(0.7, 0.2)(gates, batch["labels"].bool())["loss_contrastive"]
    trainer.model.train()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), task + term, atol=1e-5, rtol=1e-5)
    assert batch["labels"].dtype == torch.int64


REGRESSION = r"Regression targets have no classes to organise gates by.*group_column=.domain."
TOKENS = r"Token labels and soft labels give a sample no class.*group_column=.domain."
UNUSABLE = {
    "float": ({}, torch.rand(8), REGRESSION),
    "float column": ({}, torch.rand(8, 1), REGRESSION),
    "declared regression": ({"problem_type": "regression"}, torch.rand(8, 5), REGRESSION),
    "one output": ({"num_labels": 1}, torch.arange(8), REGRESSION),
    "soft labels": ({}, torch.rand(8, 5), rf"values from 0\..* to 0\.\d+\. {TOKENS}"),
    "padded tokens": ({}, torch.tensor([[1, 0, 0, 0, -100]] * 8), rf"values from -100 to 1\. {TOKENS}"),
    "token classes": ({}, torch.tensor([[4, 0, 0, 0, 0]] * 8), rf"values from 0 to 4\. {TOKENS}"),
    "another width": ({}, torch.ones(8, 7).long(), rf"of shape .batch_size, 5.; got .*shape \(8, 7\).*{TOKENS}"),
    "a column": ({}, torch.ones(8, 1).long(), rf"one integer label per sample.*shape \(8, 1\).*{TOKENS}"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_labels_that_are_no_classes_are_refused(kind, tmp_path):
    options, labels, text = UNUSABLE[kind]
    if "num_labels" in options:
        options = {"id2label": {0: "score"}, "label2id": {"score": 0}}
    samples = Samples(VIT, 8)
    samples.columns["labels"] = labels
    model = apply_masks(VIT.model(**options))
    trainer = ModularTrainer(model, arguments(tmp_path), train_dataset=samples, eval_dataset=samples)
    for call in (trainer.train, trainer.evaluate, trainer.collect_statistics):
        with pytest.raises(NemoValueError, match=text):
            call()
    with pytest.raises(NemoValueError, match=text):
        collect_statistics(model, [samples.batch(*range(8))], disable_tqdm=True)


def test_one_label_may_be_declared_multi_label(tmp_path):
    samples = Samples(VIT, 8)
    samples.columns["labels"] = torch.tensor([[1.0], [0.0]] * 4)
    names = {"id2label": {0: "cat"}, "label2id": {"cat": 0}}
    model = VIT.model(**names, problem_type="multi_label_classification")
    trainer = ModularTrainer(model, arguments(tmp_path), train_dataset=samples)
    trainer.train()
    assert trainer.collect_statistics().num_samples.tolist() == [4]


def test_distillation_refuses_several_labels(tmp_path):
    trainer = ModularTrainer(
        DEIT_TEACHER.model(), arguments(tmp_path), train_dataset=ManyLabels(VIT), teacher_model=VIT.model(5)
    )
    with pytest.raises(NemoValueError, match="Distillation needs one integer label per sample.*got torch.float32"):
        trainer.train()


def test_a_column_of_lists_of_a_dataset_works(tmp_path):
    columns = {name: column.tolist() for name, column in ManyLabels(VIT).columns.items()}
    table = datasets.Dataset.from_dict(columns).with_format("torch")
    trainer = ModularTrainer(VIT.model(), arguments(tmp_path), train_dataset=table)
    trainer.train()
    assert trainer.collect_statistics().num_samples.tolist() == ManyLabels(VIT).columns["labels"].sum(0).tolist()


def test_the_wrong_booleans_are_refused():
    statistics = NeuronStatistics(LABELS, {"layer": 3})
    for labels in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(NemoValueError, match=r"or booleans of shape \(batch_size, 5\); got torch"):
            statistics.update({"layer": torch.rand(2, 3)}, labels)
    with pytest.raises(NemoValueError, match=r"needs booleans of shape \(2, num_labels\).*got torch.float32"):
        ContrastiveLoss(1.0, 0.2)({"layer": torch.rand(2, 3)}, torch.ones(2, 5))
