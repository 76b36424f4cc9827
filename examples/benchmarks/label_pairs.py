# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a plain and a modular classifier with the same budget and compare, for every pair of labels, the module as it is
cut (no fine-tuning) with the plain model restricted to the two labels. Takes the options of `nemo-hf train`.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import cnns  # noqa: F401 (registers the CNNs of the papers: --model_type simcnn)
import numpy as np
import torch
from transformers import HfArgumentParser, PreTrainedModel, Trainer, set_seed

from nemo_hf import ModularTrainer, ModularTrainingArguments, extract_module, tasks
from nemo_hf.metrics import count_parameters


@dataclass
class BenchmarkArguments:
    """What the benchmark does beyond training."""

    json: str | None = field(default=None, metadata={"help": "Write the figures to this file."})


@torch.no_grad()
def all_logits(model: PreTrainedModel, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all samples."""
    model.eval()
    logits, labels = [], []
    for batch in batches:
        labels.append(batch.pop("labels"))
        logits.append(model(**batch.to(model.device) if hasattr(batch, "to") else batch).logits.cpu())
    return torch.cat(logits), torch.cat(labels)


def main() -> None:
    parser = HfArgumentParser(
        (BenchmarkArguments, tasks.ModelArguments, tasks.DataArguments, ModularTrainingArguments), description=__doc__
    )
    benchmark, model_args, data, args = parser.parse_args_into_dataclasses()
    args.remove_unused_columns = False
    train, test = tasks.load_split(data, data.train_split), tasks.load_split(data, data.eval_split)
    if data.max_train_samples:
        train = train.shuffle(seed=0).select(range(data.max_train_samples))  # the same samples for every seed
    columns = tasks.find_columns(train, data)
    processor = tasks.load_processor(model_args, columns, train, data.max_length)
    label2id = {name: i for i, name in enumerate(columns.names)}
    train = tasks.encode(train, columns, processor, label2id, data.max_length)
    test = tasks.encode(test, columns, processor, label2id, data.max_length)
    collator = tasks.collator(processor, columns.is_image)
    shared = {"train_dataset": train, "eval_dataset": test, "data_collator": collator, "processing_class": processor}

    set_seed(args.seed)
    plain = tasks.load_model(model_args, columns, processor)
    Trainer(plain, args, **shared).train()
    set_seed(args.seed)
    modular = tasks.load_model(model_args, columns, processor)
    trainer = ModularTrainer(modular, args, modular_config=model_args.modular_config(), **shared)
    trainer.train()
    trainer.save_model()
    statistics = trainer.collect_statistics(train)
    statistics.save_pretrained(args.output_dir)
    masks = statistics.module_masks()

    batches = tasks.dataloader(test, processor, columns.is_image, args.per_device_eval_batch_size)
    plain_logits, labels = all_logits(plain, batches)
    modular_logits, _ = all_logits(modular, batches)
    report = {
        "seed": args.seed,
        "plain_accuracy": (plain_logits.argmax(-1) == labels).float().mean().item(),
        "modular_accuracy": (modular_logits.argmax(-1) == labels).float().mean().item(),
        "neuron_retention": masks.retention(),
        "cohesion": statistics.cohesion(),
        "coupling": masks.coupling(),
        "pairs": [],
    }
    for pair in itertools.combinations(range(len(columns.names)), 2):
        chosen = torch.isin(labels, torch.tensor(pair))
        targets = labels[chosen]
        entry = {"labels": [columns.names[i] for i in pair]}
        for name, logits in (("plain", plain_logits), ("gated", modular_logits)):
            restricted = torch.tensor(pair)[logits[chosen][:, list(pair)].argmax(-1)]
            entry[name] = (restricted == targets).float().mean().item()
        samples = tasks.dataloader(
            test.select(np.flatnonzero(chosen.numpy())), processor, columns.is_image, args.per_device_eval_batch_size
        )
        for gates in ("mean", "binary"):
            module = extract_module(modular, masks, pair, gates=gates)
            restricted = torch.tensor(pair)[all_logits(module, samples)[0].argmax(-1)]
            entry[gates] = (restricted == targets).float().mean().item()
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
