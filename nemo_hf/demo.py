# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The whole path on the 8×8 digits that ship with scikit-learn: train, cut, save, reload, compare. No network."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from .extraction import constant_gates, extract_module
from .hub import save_module
from .masking import hold_gates
from .metrics import latency_ratio
from .module_masks import ModuleMasks
from .trainer import ModularTrainer
from .training_args import ModularTrainingArguments


NUM_PAIRS, NUM_TRIPLES = 10, 5
LATENCY_BATCH = 128
TRAINING = {
    "num_train_epochs": 30,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 512,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
}
COMPACTNESS = 1.0  # half of the default: these trainings are short (docs/results.md)
OTHER_GATES: dict[str, Literal["mean", "binary"]] = {"mean": "binary", "binary": "mean"}
RELOAD_SCRIPT = """
import sys
import nemo_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
save_file({"logits": model(**load_file(sys.argv[2])).logits.detach().contiguous()}, sys.argv[3])
"""


@dataclass
class Digits(Dataset):
    """Images as `pixel_values` of shape `(num_samples, 3, 8, 8)` with labels 0 to 9."""

    pixel_values: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def of_labels(self, labels: Sequence[int]) -> Digits:
        """The samples of some labels, whose ids become positions in `labels`."""
        chosen = torch.isin(self.labels, torch.tensor(labels))
        ids = torch.tensor([labels.index(int(label)) for label in self.labels[chosen]])
        return Digits(self.pixel_values[chosen], ids)


def load_digits_splits() -> tuple[Digits, Digits, ViTImageProcessorPil]:
    """Three quarters of the digits to train, one to test (the same for every seed), and their image processor."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = [np.repeat((image * (255 / 16)).astype(np.uint8)[:, :, None], 3, axis=2) for image in digits.images]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    labels = torch.tensor(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    return Digits(pixel_values[train], labels[train]), Digits(pixel_values[test], labels[test]), processor


def new_model(seed: int) -> ViTForImageClassification:
    """The small ViT of the demo; the same weights for the same seed."""
    torch.manual_seed(seed)
    names = [str(digit) for digit in range(10)]
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=2,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )


def run_demo(output: str | os.PathLike, seed: int = 0, gates: Literal["mean", "binary"] = "mean") -> dict[str, Any]:
    """
    Train a plain and a modular ViT with the same budget, cut modules for single labels, pairs and triples, save and
    reload.

    Args:
        output (`str` or `os.PathLike`): folder for the modular model and the modules.
        seed (`int`, *optional*, defaults to 0): of the weights, the order of samples and the choice of labels.
        gates (`"mean"` or `"binary"`, *optional*, defaults to `"mean"`): see [`~nemo_hf.extract_module`].

    Returns:
        `dict`: the measured figures, ready for JSON.
    """
    train, test, processor = load_digits_splits()
    output = Path(output)
    with tempfile.TemporaryDirectory() as scratch:
        plain = new_model(seed)
        Trainer(plain, TrainingArguments(scratch, seed=seed, **TRAINING), train_dataset=train).train()
        trainer = ModularTrainer(
            new_model(seed),
            ModularTrainingArguments(scratch, seed=seed, compactness=COMPACTNESS, **TRAINING),
            train_dataset=train,
            eval_dataset=test,
            processing_class=processor,
        )
        trainer.train()
    modular = trainer.model.eval()
    statistics = trainer.collect_statistics(train)
    trainer.save_model(str(output / "modular"))
    statistics.save_pretrained(output / "modular")

    masks = statistics.module_masks()
    rng = random.Random(seed)
    pairs = rng.sample(list(itertools.combinations(range(10), 2)), NUM_PAIRS)
    triples = rng.sample(list(itertools.combinations(range(10), 3)), NUM_TRIPLES)
    report = {
        "seed": seed,
        "gates": gates,
        "plain_accuracy": _accuracy(plain, test),
        "modular_accuracy": _accuracy(modular, test),
        "plain_parameters": plain.num_parameters(),
        "neuron_retention": masks.retention(),
        "cohesion": statistics.cohesion(),
        "coupling": masks.coupling(),
        "modules": [],
    }
    for labels in [[label] for label in range(10)] + sorted(map(list, pairs)) + sorted(map(list, triples)):
        module = extract_module(modular, masks, labels, gates=gates)
        other = extract_module(modular, masks, labels, gates=OTHER_GATES[gates])
        folder = output / "modules" / "-".join(map(str, labels))
        entry = _measure(module, other, plain, modular, masks, test, labels, gates)
        results = {} if entry["accuracy"] is None else {"accuracy": entry["accuracy"]}
        save_module(module, folder, processing_class=processor, metrics=results)
        report["modules"].append({**entry, "bytes": (folder / "model.safetensors").stat().st_size})
    two = [entry for entry in report["modules"] if len(entry["labels"]) == 2]
    for name in ("accuracy", "other_gates_accuracy", "plain_accuracy"):
        report[f"pair_{name}"] = sum(entry[name] for entry in two) / len(two)
    report["max_logit_difference"] = max(entry["logit_difference"] for entry in report["modules"])
    report["reload_difference"] = _reload_difference(module, folder, test)
    return report


@torch.no_grad()
def _logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.eval()(pixel_values=pixel_values).logits


def _accuracy(model: PreTrainedModel, data: Digits, columns: Sequence[int] | None = None) -> float | None:
    """`None` where there is one label: nothing to choose between."""
    logits = _logits(model, data.pixel_values)
    logits = logits if columns is None else logits[:, list(columns)]
    if logits.shape[1] == 1:
        return None
    return (logits.argmax(-1) == data.labels).float().mean().item()


def _measure(
    module: PreTrainedModel,
    other: PreTrainedModel,
    plain: PreTrainedModel,
    modular: PreTrainedModel,
    masks: ModuleMasks,
    test: Digits,
    labels: list[int],
    gates: Literal["mean", "binary"],
) -> dict[str, Any]:
    """One line of the table: the module without fine-tuning beside the plain model restricted to the same labels."""
    samples = test.of_labels(labels)
    held = constant_gates(modular, masks, [str(label) for label in labels], gates)
    with hold_gates(modular, held):
        expected = _logits(modular, test.pixel_values)[:, labels]
    difference = (_logits(module, test.pixel_values) - expected).abs().max().item()
    return {
        "labels": labels,
        "accuracy": _accuracy(module, samples),
        "other_gates_accuracy": _accuracy(other, samples),
        "plain_accuracy": _accuracy(plain, samples, labels),
        "neuron_retention": module.config.nemo["neuron_retention"],
        "parameter_retention": module.num_parameters() / plain.num_parameters(),
        "latency_ratio": latency_ratio(module, plain, {"pixel_values": test.pixel_values[:LATENCY_BATCH]}),
        "logit_difference": difference,
    }


def _reload_difference(module: PreTrainedModel, folder: Path, test: Digits) -> float:
    """Largest difference between the logits here and those of the saved module in a fresh process."""
    scratch = Path(tempfile.mkdtemp())
    try:
        inputs, outputs = scratch / "inputs.safetensors", scratch / "outputs.safetensors"
        save_file({"pixel_values": test.pixel_values.contiguous()}, inputs)
        command = [sys.executable, "-c", RELOAD_SCRIPT, str(folder), str(inputs), str(outputs)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        return (load_file(outputs)["logits"] - _logits(module, test.pixel_values)).abs().max().item()
    finally:
        shutil.rmtree(scratch)
