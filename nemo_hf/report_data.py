# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The figures of a report: sizes of modules, what labels share, measured accuracies, training curves."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import metrics
from .errors import NemoValueError
from .extraction import constant_gates, module_parameters, resolve_labels
from .masking import hold_gates
from .module_masks import Label, ModuleMasks
from .statistics import NeuronStatistics


NO_SCORES = ("_runtime", "_per_second", "_preparation_time")
NUM_ANCHORS = 12  # unions of more and more labels whose exact sizes guide what the page says about other unions


def describe(
    model: PreTrainedModel, statistics: NeuronStatistics, masks: ModuleMasks, max_pair_labels: int
) -> dict[str, Any]:
    """
    Sizes of modules and what they share, from masks alone.

    Args:
        model (`PreTrainedModel`): the modular model.
        statistics ([`NeuronStatistics`]): of it.
        masks ([`ModuleMasks`]): made from them.
        max_pair_labels (`int`): with more labels there are no pairs in the table.

    Returns:
        `dict`: ready for JSON. `"modules"` has one entry for every label, every pair, and all labels together.
    """
    owner = "labels" if masks.grouped_by is None else "groups"
    names = masks.labels
    num_samples = dict(zip(statistics.labels, statistics.num_samples.tolist(), strict=True))
    parent = metrics.count_parameters(model, generators=False)
    stacked = {layer: torch.stack([masks[name][layer] for name in names]) for layer in masks.layers}
    return {
        "model": type(model).__name__,
        "grouped_by": masks.grouped_by,
        owner: names,
        "num_samples": [num_samples[name] for name in names],
        "threshold": masks.threshold,
        "neurons": sum(mask.shape[1] for mask in stacked.values()),
        "parameters": parent,
        "neuron_retention": masks.retention(),
        "cohesion": statistics.cohesion(masks.threshold),
        "coupling": masks.coupling(),
        "layers": [{"name": layer, "neurons": mask.shape[1]} for layer, mask in stacked.items()],
        "kept_per_layer": torch.stack([mask.sum(1) for mask in stacked.values()], dim=1).tolist(),
        "overlap": metrics.pairwise_jaccard(torch.cat(list(stacked.values()), dim=1)).tolist(),
        "modules": module_table(model, masks, selections(names, max_pair_labels)),
    }


def selections(names: Sequence[Label], max_pair_labels: int) -> list[list[Label]]:
    """Every label, every pair unless there are too many labels, and all labels."""
    pairs = itertools.combinations(names, 2) if len(names) <= max_pair_labels else ()
    chosen = [[name] for name in names] + [list(pair) for pair in pairs]
    return chosen if list(names) in chosen else [*chosen, list(names)]


def module_table(
    model: PreTrainedModel, masks: ModuleMasks, chosen: Iterable[Sequence[Label]]
) -> list[dict[str, Any]]:
    """What extraction would say of the size of each module: exact, although nothing is cut."""
    chosen = [list(names) for names in chosen]
    owner = "labels" if masks.grouped_by is None else "groups"
    parent = metrics.count_parameters(model, generators=False)
    counts = module_parameters(model, masks, tqdm(chosen, desc="Sizes of modules"))
    table = []
    for names, parameters in zip(chosen, counts, strict=True):
        union = masks.union(names)
        table.append(
            {
                owner: names,
                "neurons": sum(int(mask.sum()) for mask in union.values()),
                "neuron_retention": union.retention,
                "parameters": parameters,
                "parameter_retention": parameters / parent,
            }
        )
    return table


def page_data(model: PreTrainedModel, masks: ModuleMasks) -> dict[str, Any]:
    """
    What only the page needs: the masks as bits (every layer starts with a whole byte), and neurons and parameters of
    unions of more and more labels.
    """
    names = masks.labels
    steps = sorted({round(k) for k in np.linspace(1, len(names), NUM_ANCHORS)})
    anchors = module_table(model, masks, [names[:k] for k in steps])
    packed = [b"".join(np.packbits(mask.cpu().numpy()).tobytes() for mask in masks[name].values()) for name in names]
    return {
        "bits": [base64.b64encode(row).decode("ascii") for row in packed],
        "anchors": [[module["neurons"], module["parameters"]] for module in anchors],
    }


class _Tally:
    """
    What one module answers to the samples of its members.

    Args:
        members (`torch.Tensor`): the positions of its labels, or groups, among those of the masks.
        gates (`dict[str, torch.Tensor]`): its constant gates.
        label_ids (`torch.Tensor`, *optional*): the model's ids of its labels, between which it decides. A module of
            groups decides between all labels.
    """

    def __init__(self, members: torch.Tensor, gates: dict[str, torch.Tensor], label_ids: torch.Tensor | None):
        self.members, self.gates, self.label_ids = members, gates, label_ids
        # By member; the columns are the label that was answered, or whether the answer was right.
        self.counts = torch.zeros(len(members), 2 if label_ids is None else len(members), dtype=torch.int64)

    def add(
        self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], owners: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Count a batch; `owners` has the position of each sample's label or group."""
        rows, members = (owners[:, None] == self.members).nonzero(as_tuple=True)
        if not len(rows):
            return
        with hold_gates(model, self.gates):
            logits = model(**{name: value[rows.to(value.device)] for name, value in inputs.items()}).logits.cpu()
        if self.label_ids is None:
            answers = (logits.argmax(1) == labels[rows]).long()
        else:
            answers = logits[:, self.label_ids].argmax(1)
        self.counts.index_put_((members, answers), torch.ones_like(answers), accumulate=True)

    @property
    def shares(self) -> torch.Tensor:
        """The counts as shares of the samples of each member; NaN without samples."""
        return self.counts / self.counts.sum(1, keepdim=True)

    @property
    def accuracy(self) -> float | None:
        """Share of samples that were answered rightly."""
        right = self.counts[:, 1] if self.label_ids is None else self.counts.diagonal()
        total = int(self.counts.sum())
        return int(right.sum()) / total if total else None


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    masks: ModuleMasks,
    table: Sequence[dict[str, Any]],
    batches: Iterable[Mapping[str, torch.Tensor]],
    groups: Mapping[int, Label] | None = None,
) -> dict[str, Any]:
    """
    Accuracies of modules, in one pass over the data: the model runs with their constant gates. A module of one label
    has nothing to choose between and gets no accuracy.

    Args:
        model (`PreTrainedModel`): the modular model.
        masks ([`ModuleMasks`]): of its labels, or of groups.
        table (`Sequence[dict]`): from [`module_table`], with a module of all; gets `accuracy` and `num_eval_samples`,
            or for a single label `recall`, the share of its samples that the module of all labels recognises.
        batches (`Iterable`): with the model's inputs, one integer label per sample and, for groups, their column.
        groups (`Mapping[int, str | int]`, *optional*): for masks by group: integer in the batch → group.

    Returns:
        `dict`: `num_samples`; `modular_accuracy`, of the model with its own gates; `samples` of each label or group;
        and what the estimates for other modules are made from, see [`_confusions`].
    """
    owner = "labels" if masks.grouped_by is None else "groups"
    names = masks.labels
    label_ids = torch.tensor(resolve_labels(model.config, names)) if masks.grouped_by is None else None
    found = dict(zip(label_ids.tolist(), names, strict=True)) if groups is None else groups
    position = {value: names.index(name) for value, name in found.items() if name in names}
    gates = "mean" if masks.has_gates else "binary"
    tallies: dict[int, _Tally] = {}
    for i, module in enumerate(table):
        members = torch.tensor([names.index(name) for name in module[owner]])
        if groups is not None or len(members) > 1 or len(names) == 1:
            ids = None if label_ids is None else label_ids[members]
            tallies[i] = _Tally(members, constant_gates(model, masks, module[owner], gates), ids)
    hits = total = 0
    for batch in tqdm(batches, desc="Accuracies of modules"):
        labels = _class_labels(batch)
        inputs = {
            name: value.to(model.device) for name, value in batch.items() if name not in ("labels", masks.grouped_by)
        }
        values = labels if groups is None else batch[masks.grouped_by]
        owners = torch.tensor([position.get(value, -1) for value in values.tolist()])
        hits += int((model(**inputs).logits.argmax(1).cpu() == labels).sum())
        total += len(labels)
        for tally in tallies.values():
            tally.add(model, inputs, owners, labels)
    if not total:
        raise NemoValueError("There are no samples to measure accuracies on. Give a split that has some.")
    for i, tally in tallies.items():
        if groups is None and len(tally.members) == 1:
            continue
        table[i].update(accuracy=tally.accuracy, num_eval_samples=int(tally.counts.sum()))
    confusions = _confusions(list(tallies.values()), len(names))
    for module in table:
        if groups is None and len(module[owner]) == 1:
            module["recall"] = confusions["recall"][names.index(module[owner][0])]
    return {"num_samples": total, "modular_accuracy": hits / total, **confusions}


def _class_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labels = batch.get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise NemoValueError(
            f"Accuracies need one integer label per sample, of shape (batch_size,); got {given}. Leave out the "
            "dataset for a report without accuracies."
        )
    return labels.cpu()


def _confusions(tallies: Sequence[_Tally], count: int) -> dict[str, Any]:
    """
    What the estimates for other modules are made from.

    Returns:
        `dict`: `samples` of each label or group. By label: `recall`; `errors_all`, row by row the share of a label's
        samples that the module of all labels takes for each other label; `errors_pairs`, the same in the module of
        the two, or `None` without pairs. By group: `accuracy_all` and `accuracy_alone` of each group's samples in the
        module of all groups and in its own.
    """
    everything = next(tally for tally in tallies if len(tally.members) == count)
    result: dict[str, Any] = {"samples": everything.counts.sum(1).tolist()}
    if everything.label_ids is None:
        alone = {int(tally.members): tally.accuracy for tally in tallies if len(tally.members) == 1}
        return {
            **result,
            "accuracy_all": everything.shares[:, 1].tolist(),
            "accuracy_alone": [alone[i] for i in range(count)],
        }
    pairs = torch.zeros(count, count)
    two = [tally for tally in tallies if len(tally.members) == 2]
    for tally in two:
        first, second = tally.members.tolist()
        pairs[first, second], pairs[second, first] = tally.shares[0, 1], tally.shares[1, 0]
    return {
        **result,
        "recall": everything.shares.diagonal().tolist(),
        "errors_all": everything.shares.fill_diagonal_(0).tolist(),
        "errors_pairs": pairs.tolist() if two else None,
    }


def training_panels(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    The curves of a training, by panel.

    Args:
        log_history (`Sequence[Mapping]`): of a trainer.

    Returns:
        `list[dict]`: `title`, `x_label`, `y_label` and `series`, each with `name` and `points` of x and y.
    """
    x_name = "epoch" if all("epoch" in logs for logs in log_history) else "step"
    kinds = {"Training loss": [], "Evaluation loss": [], "Shares and scores": []}
    for name in dict.fromkeys(name for logs in log_history for name in logs):
        if name.startswith("loss"):
            kinds["Training loss"].append(name)
        elif name.startswith("eval_loss"):
            kinds["Evaluation loss"].append(name)
        elif name == "neuron_retention" or (name.startswith("eval_") and not name.endswith(NO_SCORES)):
            kinds["Shares and scores"].append(name)
    panels = []
    for title, found in kinds.items():
        series = []
        for name in found:
            points = [[logs.get(x_name), logs[name]] for logs in log_history if name in logs]
            series.append({"name": name, "points": [point for point in points if all(map(_is_finite, point))]})
        series = [one for one in series if one["points"]]
        if series:
            y_label = "loss" if "loss" in title else "share or score"
            panels.append({"title": title, "x_label": x_name, "y_label": y_label, "series": series})
    return panels


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
