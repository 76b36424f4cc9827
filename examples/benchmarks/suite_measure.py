# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The figures of modules: accuracy as they are cut, size, operations, latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from suite_data import Task, all_logits, draw_subsets, restricted_accuracy, stratified
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from nemo_hf.metrics import count_flops, count_parameters, latency_ratio


Cut = Callable[[Sequence[int], str], PreTrainedModel]  # labels, gates → module

EVAL_BATCH = 250
FLOPS_BATCH = 8
LATENCY_BATCH = 32
FINETUNED_SUBSETS = 3  # of the sizes that are fine-tuned


class Modules:
    """
    Measures modules of one kind of model, always for the same labels and on the same samples.

    Args:
        task ([`Task`]): the data.
        plain (`PreTrainedModel`): the model without generators, for comparison; its weights do not matter.
        num_subsets (`int`): label subsets of a size, where there are as many.
        max_eval_samples (`int`, *optional*): test samples, all by default.
    """

    def __init__(self, task: Task, plain: PreTrainedModel, num_subsets: int, max_eval_samples: int | None):
        self.task, self.plain = task, plain
        self.num_labels = len(task.columns.names)
        self.num_subsets = num_subsets
        chosen = stratified(task.labels, max_eval_samples)
        self.samples = [task.test[i] for i in chosen.tolist()]
        self.labels = task.labels[chosen]
        self._inputs = {size: self._first(size) for size in (FLOPS_BATCH, LATENCY_BATCH)}
        self._plain = self._costs(plain)

    def _first(self, count: int) -> dict[str, torch.Tensor]:
        batch = next(iter(self.task.batches(self.samples, count)))
        return {name: value.to(self.plain.device) for name, value in batch.items() if name != "labels"}

    def _costs(self, model: PreTrainedModel) -> dict[str, int]:
        return {
            "parameters": count_parameters(model),
            "linear_parameters": count_parameters(model, linear_only=True),
            "flops": count_flops(model, self._inputs[FLOPS_BATCH]),
        }

    def subsets(self) -> list[list[int]]:
        """The label subsets that are measured: all single labels, then those of every size."""
        sizes = range(2, self.num_labels + 1)
        singles = [[label] for label in range(self.num_labels)]
        return singles + [s for size in sizes for s in draw_subsets(self.num_labels, size, self.num_subsets)]

    def restricted(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        """The whole model as the module of every label subset."""
        logits = all_logits(model, self.task.batches(self.samples, EVAL_BATCH))
        ratios = dict.fromkeys(("parameter_retention", "linear_retention", "flops_ratio", "neuron_retention"), 1.0)
        figures = []
        for labels in self.subsets():
            chosen = torch.isin(self.labels, torch.tensor(labels))
            accuracy = restricted_accuracy(logits[chosen][:, labels], self.labels[chosen], labels)
            figures.append({"labels": labels, "gates": None, "accuracy": accuracy, **ratios})
        return figures

    def cut(self, cut: Cut, gates: Sequence[str]) -> list[dict[str, Any]]:
        """
        The module of every label subset, with each kind of gates.

        Returns:
            `list[dict[str, Any]]`: `labels`, `gates`, `accuracy` without fine-tuning, and sizes as a share of the
            plain model's. The accuracy of a module for a single label is 1 by definition.
        """
        figures = []
        for labels in self.subsets():
            modules = {kind: cut(labels, kind) for kind in gates}
            sizes = self._sizes(modules[gates[0]])  # the same for all gates, which are of the same neurons
            for kind, module in modules.items():
                accuracy = self._accuracy(module, labels)
                figures.append({"labels": labels, "gates": kind, "accuracy": accuracy, **sizes})
        return figures

    def _sizes(self, module: PreTrainedModel) -> dict[str, float]:
        costs = self._costs(module)
        return {
            "parameter_retention": costs["parameters"] / self._plain["parameters"],
            "linear_retention": costs["linear_parameters"] / self._plain["linear_parameters"],
            "flops_ratio": costs["flops"] / self._plain["flops"],
            "neuron_retention": module.config.nemo["neuron_retention"],
        }

    def _accuracy(self, module: PreTrainedModel, labels: Sequence[int]) -> float:
        chosen = torch.isin(self.labels, torch.tensor(labels))
        samples = [self.samples[i] for i in chosen.nonzero().flatten().tolist()]
        logits = all_logits(module, self.task.batches(samples, EVAL_BATCH))
        return restricted_accuracy(logits, self.labels[chosen], labels)

    def _some_sizes(self) -> list[int]:
        return sorted({2, max(2, self.num_labels // 2)})

    def latencies(self, cut: Cut, gates: str) -> list[dict[str, Any]]:
        """Latency of a few modules, in turn with the plain model, beside their operations."""
        first = [draw_subsets(self.num_labels, size, self.num_subsets)[0] for size in (1, *self._some_sizes())]
        figures = []
        for labels in first:
            module = cut(labels, gates)
            ratio = latency_ratio(module, self.plain.eval(), self._inputs[LATENCY_BATCH])
            figures.append({"labels": labels, "gates": gates, "latency_ratio": ratio, **self._sizes(module)})
        return figures

    def finetuned(self, cut: Cut, gates: str, arguments: TrainingArguments, optimizer: Any) -> list[dict[str, Any]]:
        """A few modules before and after training on the samples of their labels by the `Trainer` of transformers."""
        figures = []
        for size in self._some_sizes():
            for labels in draw_subsets(self.num_labels, size, self.num_subsets)[:FINETUNED_SUBSETS]:
                module = cut(labels, gates)
                before = self._accuracy(module, labels)
                train = [s | {"labels": labels.index(s["labels"])} for s in self.task.train if s["labels"] in labels]
                Trainer(
                    module,
                    arguments,
                    train_dataset=train,
                    data_collator=self.task.collator,
                    compute_loss_func=_cross_entropy,
                    optimizer_cls_and_kwargs=optimizer,
                ).train()
                accuracies = {"accuracy": before, "finetuned_accuracy": self._accuracy(module, labels)}
                figures.append({"labels": labels, "gates": gates, **accuracies})
        return figures


def _cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Of any classifier, also of one that takes no labels."""
    return nn.functional.cross_entropy(outputs.logits.float(), labels)
