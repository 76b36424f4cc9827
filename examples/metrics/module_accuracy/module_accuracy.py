# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of a module on the samples of its labels, as a metric of `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
A module of a modular classifier knows some of its parent's labels, under ids of its own: 0, 1, … in the order of
`label_ids`. This metric is its accuracy on the samples of these labels, as NeMo reports it for modules that are
reused. Samples of other labels are left out: a module cannot be right about them.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[int]` or `list[list[float]]`): what the module predicts: its own label ids, or its logits.
    references (`list[int]`): label ids of the parent, as in the parent's data set.
    label_ids (`list[int]`): the parent's id of each of the module's labels, `module.config.nemo["label_ids"]`.

Returns:
    `dict[str, float]`: `accuracy`; `num_samples`, on how many samples; and for each label of the module that has
    samples `accuracy_<the parent's id>`.

Raises:
    `ValueError`: if a prediction is no label of the module, or no sample has one of its labels.

Example:

>>> metric = evaluate.load("examples/metrics/module_accuracy")
>>> metric.compute(predictions=[0, 1, 1, 0], references=[7, 3, 7, 5], label_ids=[7, 3])
{'accuracy': 0.6666666666666666, 'num_samples': 3, 'accuracy_7': 0.5, 'accuracy_3': 1.0}
"""

_CITATION = """\
@article{nemo2025,
  title = {{NeMo}: A Neuron-Level Modularizing-While-Training Approach for Decomposing {DNN} Models},
  journal = {arXiv preprint arXiv:2508.11348},
  year = {2025}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ModuleAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        references, logits = datasets.Value("int64"), datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features(
                    {"predictions": logits, "references": references}
                ),  # first: one logit passes for an id
                datasets.Features({"predictions": datasets.Value("int64"), "references": references}),
            ],
            reference_urls=["https://arxiv.org/abs/2508.11348"],
        )

    def _compute(
        self,
        predictions: Sequence[int] | Sequence[Sequence[float]],
        references: Sequence[int],
        label_ids: Sequence[int],
    ) -> dict[str, float]:
        label_ids, references, predictions = map(np.asarray, (label_ids, references, predictions))
        if label_ids.ndim != 1 or len(label_ids) == 0 or len(np.unique(label_ids)) != len(label_ids):
            raise ValueError(
                f"label_ids must be a list of different label ids of the parent, got {label_ids.tolist()}."
            )
        if predictions.ndim == 2:
            if predictions.shape[1] != len(label_ids):
                raise ValueError(
                    f"Logits of a module with {len(label_ids)} labels have as many columns; got "
                    f"{predictions.shape[1]}."
                )
            predictions = predictions.argmax(axis=1)
        if ((predictions < 0) | (predictions >= len(label_ids))).any():
            raise ValueError(
                f"Predictions are label ids of the module, from 0 to {len(label_ids) - 1}; got "
                f"{np.unique(predictions).tolist()[:20]}. The parent's ids belong into references and label_ids."
            )
        known = np.isin(references, label_ids)
        if not known.any():
            raise ValueError(
                f"No sample has one of the module's labels: references are {np.unique(references).tolist()[:20]}, "
                f"label_ids {label_ids.tolist()}. Both are label ids of the parent."
            )
        references, right = references[known], (label_ids[predictions] == references)[known]
        per_label = {
            f"accuracy_{label}": float(right[references == label].mean())
            for label in label_ids.tolist()
            if (references == label).any()
        }
        return {"accuracy": float(right.mean()), "num_samples": len(right), **per_label}
