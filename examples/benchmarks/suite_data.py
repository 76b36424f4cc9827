# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: a data set that is decoded once, new models for it, logits of all samples."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import cnns  # noqa: F401 (registers the CNNs of the papers: model_type="simcnn")
import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed

from nemo_hf import task_data, tasks


CROP_PADDING = 4


class Task:
    """
    A data set ready for one model: encoded once, in memory.

    Args:
        model ([`tasks.ModelArguments`]): the model.
        data ([`task_data.DataArguments`]): columns and lengths.
        train, test (`Dataset`): the samples to train on and to evaluate on.

    Attributes:
        train, test (`list[dict[str, Any]]`): inputs of the model with `labels`, sample by sample.
        labels (`torch.Tensor` of shape `(num_test_samples,)`): those of the test samples.
    """

    def __init__(self, model: tasks.ModelArguments, data: task_data.DataArguments, train: Dataset, test: Dataset):
        self.model_arguments = model
        self.columns = task_data.find_columns(train, data)
        self.processor = tasks.load_processor(model, self.columns, train, data.max_length)
        label2id = {name: i for i, name in enumerate(self.columns.names)}
        self.train, self.test = (
            in_memory(task_data.encode(split, self.columns, self.processor, label2id, data.max_length))
            for split in (train, test)
        )
        self.labels = torch.tensor([sample["labels"] for sample in self.test])
        self.collator = task_data.collator(self.processor, self.columns.is_image)

    def new_model(self, seed: int) -> PreTrainedModel:
        """A model with the initial weights of a seed."""
        set_seed(seed)
        return tasks.load_model(self.model_arguments, self.columns, self.processor)

    def batches(self, samples: Sequence[dict[str, Any]], batch_size: int) -> DataLoader:
        """Batches of encoded samples in their order."""
        return task_data.dataloader(samples, self.processor, self.columns.is_image, batch_size)


def in_memory(encoded: Dataset) -> list[dict[str, Any]]:
    """The samples of an encoded data set. Images are decoded here, not in every epoch."""
    samples: list[dict[str, Any]] = []
    for batch in encoded.iter(batch_size=1000):
        values = [batch[name] for name in batch]
        samples += [dict(zip(batch, row, strict=True)) for row in zip(*values, strict=True)]
    return samples


@torch.no_grad()
def all_logits(model: PreTrainedModel, batches: Iterable[Any]) -> torch.Tensor:
    """Logits of all samples, of shape `(num_samples, num_labels)`, on the CPU."""
    model.eval()
    logits = []
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        logits.append(model(**inputs).logits.float().cpu())
    return torch.cat(logits)


def restricted_accuracy(logits: torch.Tensor, labels: torch.Tensor, ids: Sequence[int]) -> float:
    """
    Share of samples whose largest logit is that of their label.

    Args:
        logits (`torch.Tensor` of shape `(num_samples, len(ids))`): one column for each label.
        labels (`torch.Tensor` of shape `(num_samples,)`): the right ones, all in `ids`.
        ids (`Sequence[int]`): the labels that the columns stand for.
    """
    return (torch.tensor(ids)[logits.argmax(-1)] == labels).float().mean().item()


def crop_and_flip(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every image of a batch shifted by up to four pixels, black where nothing was, and mirrored or not."""
    images = batch["pixel_values"]
    count, _, height, width = images.shape
    black = images.amin()  # of normalised images
    padded = pad(images - black, 4 * (CROP_PADDING,)) + black
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    samples = torch.arange(count)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
    return {**batch, "pixel_values": shifted.permute(0, 3, 1, 2).contiguous()}


def draw_subsets(num_labels: int, size: int, count: int) -> list[list[int]]:
    """
    Random label subsets of one size, always the same; all of them where there are no more than `count`.

    Args:
        num_labels (`int`): number of labels.
        size (`int`): labels in a subset.
        count (`int`): number of subsets.

    Returns:
        `list[list[int]]`: different subsets, each ascending.
    """
    if math.comb(num_labels, size) <= count:
        return [list(subset) for subset in itertools.combinations(range(num_labels), size)]
    generator = random.Random(f"{num_labels} {size}")
    found: set[tuple[int, ...]] = set()
    while len(found) < count:
        found.add(tuple(sorted(generator.sample(range(num_labels), size))))
    return sorted(map(list, found))


def stratified(labels: torch.Tensor, count: int | None) -> torch.Tensor:
    """
    Random samples, always the same, in which every label has its share.

    Args:
        labels (`torch.Tensor` of shape `(num_samples,)`): the label of each.
        count (`int`, *optional*): how many samples; all by default.

    Returns:
        `torch.Tensor`: ascending positions; of a label the nearest whole number to its share, and at least one.
    """
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label in labels.unique():
        of_label = (labels == label).nonzero().flatten()
        share = max(1, round(count * len(of_label) / len(labels)))
        chosen.append(of_label[torch.randperm(len(of_label), generator=generator)[:share]])
    return torch.cat(chosen).sort().values
