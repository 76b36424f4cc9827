# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The metric of `evaluate` in examples/, offline: against plain Python, and in a Trainer."""

import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import evaluate
import numpy as np
import pytest
import yaml
from models import VIT, Samples, module_masks
from transformers import Trainer, TrainingArguments

from nemo_hf import extract_module


FOLDER = Path(__file__).parents[1] / "examples" / "metrics" / "module_accuracy"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def expected(predictions, references, label_ids):
    counted = [(label_ids[p], r) for p, r in zip(predictions, references, strict=True) if r in label_ids]
    result = {"accuracy": np.mean([p == r for p, r in counted]), "num_samples": len(counted)}
    for label in label_ids:
        of_label = [p == r for p, r in counted if r == label]
        if of_label:
            result[f"accuracy_{label}"] = np.mean(of_label)
    return result


@pytest.mark.parametrize("label_ids", [[7, 3], [0, 1, 2], [4], [8, 11]], ids=str)
def test_ids_and_logits_give_the_accuracy_on_the_samples_of_the_labels(metric, label_ids):
    generator = np.random.default_rng(0)
    logits, references = generator.normal(size=(60, len(label_ids))), generator.integers(0, 9, 60)
    predictions = logits.argmax(1)
    wanted = expected(predictions.tolist(), references.tolist(), label_ids)
    for given in (logits, predictions):
        result = metric.compute(predictions=given, references=references, label_ids=label_ids)
        assert result == pytest.approx(wanted)
        assert result["num_samples"] < 60


def test_batches_give_what_all_samples_give(metric):
    metric.add_batch(predictions=[0, 1], references=[7, 3])
    metric.add_batch(predictions=[1, 0], references=[7, 5])
    result = metric.compute(label_ids=[7, 3])
    assert result == {"accuracy": 2 / 3, "num_samples": 3, "accuracy_7": 0.5, "accuracy_3": 1.0}


@pytest.mark.parametrize(
    ("predictions", "references", "label_ids", "text"),
    [
        ([7, 3], [7, 3], [7, 3], r"label ids of the module, from 0 to 1; got \[3, 7\]"),
        ([-1], [7], [7, 3], r"from 0 to 1; got \[-1\]"),
        ([0, 1], [5, 6], [7, 3], r"No sample has one of the module's labels: references are \[5, 6\]"),
        ([0], [7], [7, 7], r"different label ids of the parent, got \[7, 7\]"),
        ([0], [7], [], "different label ids of the parent"),
        ([[0.1, 0.2, 0.7]], [7], [7, 3], "2 labels have as many columns; got 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(metric, predictions, references, label_ids, text):
    with pytest.raises(ValueError, match=text):
        metric.compute(predictions=predictions, references=references, label_ids=label_ids)


def test_a_trainer_logs_it(metric, tmp_path):
    module = extract_module(VIT.model(), module_masks(VIT.model()), ["dog", "bee"])
    label_ids = module.config.nemo["label_ids"]
    samples = [sample for sample in Samples(VIT) if int(sample["labels"]) in label_ids]
    dataset = [{**sample, "labels": label_ids.index(int(sample["labels"]))} for sample in samples]

    def compute_metrics(prediction):
        references = np.take(label_ids, prediction.label_ids)
        return metric.compute(predictions=prediction.predictions, references=references, label_ids=label_ids)

    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(module, args, eval_dataset=dataset, compute_metrics=compute_metrics)
    result = trainer.evaluate()
    answers = trainer.predict(dataset).predictions.argmax(1)
    right = [answer == sample["labels"] for answer, sample in zip(answers, dataset, strict=True)]
    assert result["eval_accuracy"] == pytest.approx(np.mean(right))
    assert result["eval_num_samples"] == len(dataset)
    assert {"eval_accuracy_3", "eval_accuracy_1"} < set(result)


def test_the_card_is_that_of_a_space():
    _, header, text = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert {"title", "sdk", "app_file", "tags"} <= set(card)
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert (FOLDER / card["app_file"]).is_file()
    assert "evaluate" in (FOLDER / "requirements.txt").read_text()
    assert "2508.11348" in text


def test_the_page_of_the_space_computes_it(tmp_path, monkeypatch):
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    compute = runpy.run_path("app.py")["compute"]
    examples = [call.args[0] for call in gradio.Textbox.call_args_list]
    assert compute(*examples) == {"accuracy": 2 / 3, "num_samples": 3, "accuracy_7": 0.5, "accuracy_3": 1.0}
    assert gradio.Interface.return_value.launch.called
