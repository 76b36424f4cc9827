# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches that hold several samples of each of their labels."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from models import VIT, Samples, arguments, assert_same_state

from nemo_hf import ModularTrainer, NemoValueError
from nemo_hf.sampler import LabelBalancedSampler


def order_of(labels, samples_per_label, batch_size, seed=0, epoch=0):
    sampler = LabelBalancedSampler(labels, samples_per_label, batch_size, seed, lambda: epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert len(order) % batch_size == 0
    return np.array(order)


HUNDRED = np.repeat(np.arange(100), 10)
SKEWED = np.random.default_rng(0).zipf(1.5, 3000) % 200


@pytest.mark.parametrize(
    ("labels", "samples_per_label", "batch_size", "longest"),
    [(HUNDRED, 2, 16, 1008), (HUNDRED, 4, 16, 1200), (HUNDRED + 7, 5, 20, 1000), (SKEWED, 4, 32, 1.1 * len(SKEWED))],
    ids=["pairs", "fours", "fives", "skewed"],
)
def test_every_batch_holds_several_samples_of_its_labels_and_every_epoch_all_samples(
    labels, samples_per_label, batch_size, longest
):
    order = order_of(labels, samples_per_label, batch_size)
    assert set(order) == set(range(len(labels)))
    assert len(order) <= longest
    for batch in order.reshape(-1, batch_size):
        found, counts = np.unique(labels[batch], return_counts=True)
        assert (counts >= samples_per_label).all()
        assert len(found) > 1
    if labels is not SKEWED:
        for batch in order.reshape(-1, batch_size):  # no label is frequent, so none needs two sets in a batch
            assert len(np.unique(labels[batch])) == batch_size // samples_per_label
            assert len(np.unique(batch)) == batch_size


def test_the_order_depends_on_seed_and_epoch_only():
    first = order_of(HUNDRED, 2, 16)
    assert (order_of(HUNDRED.tolist(), 2, 16) == first).all()
    assert (order_of(HUNDRED, 2, 16, epoch=1) != first).any()
    assert (order_of(HUNDRED, 2, 16, seed=1) != first).any()


def test_labels_meet_all_others():
    """The labels of a batch change within an epoch: no fixed groups of labels are compared again and again."""
    together = np.zeros((20, 20), dtype=bool)
    labels = np.repeat(np.arange(20), 40)
    for batch in labels[order_of(labels, 2, 16)].reshape(-1, 16):
        together[np.ix_(batch, batch)] = True
    assert together.mean() > 0.95


def test_a_label_with_few_samples_repeats_them():
    order = order_of([0] * 7 + [1] * 7 + [2], 4, 8)
    assert set(order) == set(range(15))
    assert (order == 14).sum() % 4 == 0


@pytest.mark.parametrize(
    ("labels", "samples_per_label", "batch_size", "text"),
    [
        (HUNDRED, 3, 16, "samples_per_label=3 must divide the batch size of 16 and leave room for two labels"),
        (HUNDRED, 16, 16, "samples_per_label=16 must divide the batch size of 16"),
        ([5, 5, 5, 5], 2, 4, r"needs samples of several labels, got those of \[5\]"),
    ],
    ids=["no divisor", "one label fits", "one label"],
)
def test_sets_that_do_not_fit_are_refused(labels, samples_per_label, batch_size, text):
    with pytest.raises(NemoValueError, match=text):
        order_of(labels, samples_per_label, batch_size)


class Batches:
    """A collator that keeps the labels, or groups, of the batches."""

    def __init__(self, column="labels"):
        self.column = column
        self.seen = []

    def __call__(self, rows):
        self.seen.append([int(row[self.column]) for row in rows])
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def trainer_of(folder, dataset, collator=None, **options):
    options = {"samples_per_label": 4, "per_device_train_batch_size": 16, "num_train_epochs": 2, **options}
    labels = {i: str(i) for i in range(20)}
    model = VIT.model(id2label=labels, label2id={name: i for i, name in labels.items()})
    return ModularTrainer(model, arguments(folder, **options), train_dataset=dataset, data_collator=collator)


def many_labels():
    data = Samples(VIT, 80)
    data.columns["labels"] = torch.arange(80) % 20
    return data


def test_training_has_partners_in_every_batch(tmp_path):
    batches = Batches()
    trainer = trainer_of(tmp_path, many_labels(), batches, max_steps=-1)
    trainer.train()
    assert len(batches.seen) == 10
    assert all(sorted(np.unique(batch, return_counts=True)[1]) == [4] * 4 for batch in batches.seen)
    assert batches.seen[:5] != batches.seen[5:]
    assert all(entry["loss_contrastive"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_a_training_resumed_in_the_second_epoch_is_bit_identical(tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 7}
    whole = trainer_of(tmp_path / "whole", many_labels(), **options)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", many_labels(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())


def test_columns_of_a_table_and_groups(tmp_path):
    columns = {name: values.numpy() for name, values in many_labels().columns.items()}
    table = Dataset.from_dict({**columns, "domain": [i // 8 for i in range(80)]}).with_format("torch")
    for column, options in (("labels", {}), ("domain", {"group_column": "domain"})):
        batches = Batches(column)
        trainer_of(tmp_path, table, batches, **options).train()
        assert len(batches.seen) >= 3
        assert all(min(np.unique(batch, return_counts=True)[1]) >= 4 for batch in batches.seen)


def test_what_has_no_single_label_is_refused(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(many_labels()))
    with pytest.raises(NemoValueError, match=r"samples_per_label=4 chooses the samples of a batch, which a stream"):
        trainer_of(tmp_path, stream, max_steps=2)
    data = many_labels()
    for values in (torch.rand(80), torch.ones(80, 20)):
        data.columns["labels"] = values
        with pytest.raises(NemoValueError, match="needs one integer per sample in the column 'labels', got"):
            trainer_of(tmp_path, data).get_train_dataloader()
    del data.columns["labels"]
    with pytest.raises(NemoValueError, match="needs a column 'labels', the samples have pixel_values"):
        trainer_of(tmp_path, data).get_train_dataloader()
