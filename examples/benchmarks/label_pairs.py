# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a plain and a modular classifier with the same budget and compare, for every pair of labels, the module as it is
cut (no fine-tuning) with the plain model restricted to the two labels. Takes the options of `nemo-hf train`.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from suite_data import Task, all_logits, restricted_accuracy
from transformers import HfArgumentParser, Trainer

from nemo_hf import ModularTrainer, ModularTrainingArguments, extract_module, task_data, tasks
from nemo_hf.metrics import count_parameters


@dataclass
class BenchmarkArguments:
    """What the benchmark does beyond training."""

    json: str | None = field(default=None, metadata={"help": "Write the figures to this file."})


def main() -> None:
    parser = HfArgumentParser(
        (BenchmarkArguments, tasks.ModelArguments, task_data.DataArguments, ModularTrainingArguments),
        description=__doc__,
    )
    benchmark, model_args, data, args = parser.parse_args_into_dataclasses()
    args.remove_unused_columns = False
    train, test = task_data.load_split(data, data.train_split), task_data.load_split(data, data.eval_split)
    if data.max_train_samples:
        train = train.shuffle(seed=0).select(range(data.max_train_samples))  # the same samples for every seed
    task = Task(model_args, data, train, test)
    shared = {
        "train_dataset": task.train,
        "eval_dataset": task.test,
        "data_collator": task.collator,
        "processing_class": task.processor,
    }

    plain = task.new_model(args.seed)
    Trainer(plain, args, **shared).train()
    modular = task.new_model(args.seed)
    trainer = ModularTrainer(modular, args, modular_config=model_args.modular_config(args.objective), **shared)
    trainer.train()
    trainer.save_model()
    statistics = trainer.collect_statistics(task.train)
    statistics.save_pretrained(args.output_dir)
    masks = statistics.module_masks()

    batches = task.batches(task.test, args.per_device_eval_batch_size)
    plain_logits, modular_logits, labels = all_logits(plain, batches), all_logits(modular, batches), task.labels
    report = {
        "seed": args.seed,
        "plain_accuracy": (plain_logits.argmax(-1) == labels).float().mean().item(),
        "modular_accuracy": (modular_logits.argmax(-1) == labels).float().mean().item(),
        "neuron_retention": masks.retention(),
        "cohesion": statistics.cohesion(),
        "coupling": masks.coupling(),
        "pairs": [],
    }
    for pair in itertools.combinations(range(len(task.columns.names)), 2):
        chosen = torch.isin(labels, torch.tensor(pair))
        targets = labels[chosen]
        entry = {"labels": [task.columns.names[i] for i in pair]}
        for name, logits in (("plain", plain_logits), ("gated", modular_logits)):
            entry[name] = restricted_accuracy(logits[chosen][:, list(pair)], targets, pair)
        samples = task.batches(
            [task.test[i] for i in chosen.nonzero().flatten().tolist()], args.per_device_eval_batch_size
        )
        for gates in ("mean", "binary"):
            module = extract_module(modular, masks, pair, gates=gates)
            entry[gates] = restricted_accuracy(all_logits(module, samples), targets, pair)
        entry["parameter_retention"] = count_parameters(module) / count_parameters(plain)
        report["pairs"].append(entry)
    for name in ("plain", "gated", "mean", "binary", "parameter_retention"):
        report[f"pair_{name}"] = float(np.mean([entry[name] for entry in report["pairs"]]))
    for name, value in report.items():
        if name != "pairs":
            print(f"{name:28}{value:.4f}" if isinstance(value, float) else f"{name:28}{value}")
    if benchmark.json:
        Path(benchmark.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
