# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains for a given time, with evaluation, statistics and checkpoints on the way, and reports whether memory grows.

    python examples/benchmarks/soak.py --minutes 30

The resident memory after every round is fitted by a line, without the rounds of the first fifth, in which caches and
allocators fill. Two figures: the growth over the rest of the run, and per thousand steps.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainerControl, TrainerState

from nemo_hf import ModularTrainer, ModularTrainingArguments, extract_module


STEPS_PER_ROUND = 50


def samples(size: int, num_labels: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random tokens; which ones occur depends on the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % num_labels
    tokens = 3 + 5 * labels[:, None] + torch.randint(0, 5, (size, 16), generator=generator)
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Round(TrainerCallback):
    """Calls a function after every checkpoint."""

    def __init__(self, function: Callable[[TrainerState, TrainerControl], None]):
        self.function = function

    def on_save(self, _args, state, control, **_):
        self.function(state, control)


def train_for(minutes: float, folder: str) -> list[tuple[int, float, int]]:
    """Steps so far, resident memory and number of Python objects, after every round."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=32,
        num_labels=10,
    )
    data = samples(STEPS_PER_ROUND * 16, config.num_labels)
    args = ModularTrainingArguments(
        folder,
        per_device_train_batch_size=16,
        num_train_epochs=10**6,
        max_steps=10**7,
        eval_strategy="steps",
        eval_steps=STEPS_PER_ROUND,
        save_strategy="steps",
        save_steps=STEPS_PER_ROUND,
        save_total_limit=1,
        logging_steps=STEPS_PER_ROUND,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ModularTrainer(BertForSequenceClassification(config), args, train_dataset=data, eval_dataset=data[:64])
    end, rounds = time.monotonic() + 60 * minutes, []

    def after_save(state: TrainerState, control: TrainerControl) -> None:
        masks = trainer.collect_statistics(data[:64]).module_masks()
        extract_module(trainer.model, masks, masks.labels[:1])
        state.log_history.clear()  # grows by design
        gc.collect()
        rounds.append((state.global_step, resident_megabytes(), len(gc.get_objects())))
        control.should_training_stop = time.monotonic() > end

    trainer.add_callback(Round(after_save))
    trainer.train()
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long to train")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = train_for(options.minutes, folder)
    kept = np.array(rounds[len(rounds) // 5 :], dtype=float)
    if len(kept) < 3:
        parser.error(f"--minutes {options.minutes:g} allowed {len(rounds)} rounds; at least 4 are needed.")
    slope, objects = (np.polyfit(kept[:, 0], kept[:, column], 1)[0] for column in (1, 2))
    steps = kept[-1, 0] - kept[0, 0]
    figures = {
        "steps": int(rounds[-1][0]),
        "rounds": len(rounds),
        "megabytes_after_warm_up": kept[0, 1],
        "megabytes_at_the_end": kept[-1, 1],
        "growth_megabytes": slope * steps,
        "growth_megabytes_per_1000_steps": slope * 1000,
        "growth_objects_per_1000_steps": objects * 1000,
    }
    for name, value in figures.items():
        print(f"{name.replace('_', ' ')}: {value:,.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
