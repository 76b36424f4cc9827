# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
What modular training costs: one step of `ModularTrainer` as a ratio to one of the plain `Trainer`, on the same model.
Both train in turn in one process, so that a drifting machine hits both. Peak memory is that of two fresh processes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cnns
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, ViTConfig, ViTForImageClassification

from nemo_hf import ModularConfig, ModularTrainer, ModularTrainingArguments, collect_statistics
from nemo_hf.masking import masked_layers


def vit() -> torch.nn.Module:
    """ViT-S/4 for images of 32x32 pixels."""
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
        image_size=32,
        patch_size=4,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def bert() -> torch.nn.Module:
    """BERT-small."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
    return BertForSequenceClassification(BertConfig(num_labels=10, **sizes))


def resnet18() -> torch.nn.Module:
    """ResNet18 for images of 32x32 pixels."""
    return cnns.CifarResNetForImageClassification(cnns.CifarResNetConfig(num_labels=10))


def vit_base() -> torch.nn.Module:
    """ViT-B/16 for images of 224x224 pixels."""
    return ViTForImageClassification(ViTConfig(num_labels=10))


def bert_base() -> torch.nn.Module:
    """BERT-base."""
    return BertForSequenceClassification(BertConfig(num_labels=10))


MODELS = {"vit": vit, "bert": bert, "resnet18": resnet18, "vit_base": vit_base, "bert_base": bert_base}


def batch_for(name: str, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random inputs and labels: images, or 128 tokens, the last quarter of every second text padding."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 10
    if name.startswith("bert"):
        mask = torch.ones(size, 128, dtype=torch.long)
        mask[::2, 96:] = 0
        tokens = torch.randint(5, 30000, (size, 128), generator=generator)
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    else:
        width = 224 if name == "vit_base" else 32
        batch = {"pixel_values": torch.randn(size, 3, width, width, generator=generator), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def make_trainer(name: str, kind: str, args: argparse.Namespace, folder: str) -> Trainer:
    """`kind`: `"plain"`, `"modular"` (the defaults) or `"paper"` (generators as wide as the paper's)."""
    torch.manual_seed(0)
    model = MODELS[name]()
    options = {"bf16": args.bf16, "torch_compile": args.compile, "report_to": "none", "disable_tqdm": True}
    training_args = ModularTrainingArguments(folder, use_cpu=not torch.cuda.is_available(), max_steps=1000, **options)
    if kind == "plain":
        trainer = Trainer(model, training_args)
    else:
        paper = {"generator_hidden_size": None, "detach_generator_inputs": False}
        config = ModularConfig(**paper if kind == "paper" else {})
        trainer = ModularTrainer(model, training_args, modular_config=config)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(1000)
    trainer.model_wrapped = trainer._wrap_model(trainer.model)
    trainer.model_wrapped.train()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model_wrapped, trainer.optimizer)
    return trainer


def step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one training step: forward, backward, clipping, optimizer."""
    synchronize(batch)
    start = time.perf_counter()
    trainer.training_step(trainer.model_wrapped, dict(batch))
    trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    synchronize(batch)
    return time.perf_counter() - start


def synchronize(batch: dict[str, torch.Tensor]) -> None:
    """Wait for the device."""
    if batch["labels"].is_cuda:
        torch.cuda.synchronize()


def quartiles(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def time_ratios(name: str, kinds: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of every kind, step by step in turn with the plain trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: make_trainer(name, kind, args, folder) for kind in ["plain", *kinds]}
        batch = batch_for(name, args.batch_size, trainers["plain"].args.device)
        ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(args.steps + args.warmup):
            seconds = {kind: step(trainer, batch) for kind, trainer in trainers.items()}
            if i >= args.warmup:
                for kind in kinds:
                    ratios[kind].append(seconds[kind] / seconds["plain"])
    return {kind: quartiles(values) for kind, values in ratios.items()}


def peak_memory(name: str, kind: str, args: argparse.Namespace) -> int:
    """Bytes that weights, gradients, optimizer and activations of three steps need, in a fresh process."""
    command = [sys.executable, __file__, "--memory_of", name, kind, "--batch_size", str(args.batch_size)]
    command += ["--bf16"] * args.bf16 + ["--compile"] * args.compile
    # Freed memory goes back to the system at once, so that the peak is what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def measure_memory(name: str, kind: str, args: argparse.Namespace) -> int:
    """What the fresh process does."""
    with tempfile.TemporaryDirectory() as folder:
        # Whatever is allocated once is there before the measurement starts.
        layer = torch.nn.Conv2d(3, 4, 3)
        layer(torch.zeros(2, 3, 8, 8)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer = make_trainer(name, kind, args, folder)
        batch = batch_for(name, args.batch_size, trainer.args.device)
        for _ in range(3):
            step(trainer, batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@torch.no_grad()
def statistics_ratio(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Collecting statistics ÷ the plain model's inference over the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        modular = make_trainer(name, "modular", args, folder).model
        plain = make_trainer(name, "plain", args, folder).model.eval()
    batch = batch_for(name, args.batch_size, next(plain.parameters()).device)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    ratios = []
    for i in range(args.steps + args.warmup):
        synchronize(batch)
        start = time.perf_counter()
        for _ in range(4):
            plain(**inputs)
        synchronize(batch)
        middle = time.perf_counter()
        collect_statistics(modular, [batch] * 4, disable_tqdm=True)
        synchronize(batch)
        if i >= args.warmup:
            ratios.append((time.perf_counter() - middle) / (middle - start))
    return quartiles(ratios)


def extra_parameters(name: str, kind: str) -> float:
    """Parameters of the generators ÷ those of the model."""
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(bf16=False, compile=False)
        model = make_trainer(name, kind, options, folder).model
    generators = sum(p.numel() for layer in masked_layers(model).values() for p in layer.mask_generator.parameters())
    return generators / (sum(p.numel() for p in model.parameters()) - generators)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit", "bert", "resnet18"])
    parser.add_argument("--kinds", nargs="+", choices=("modular", "paper"), default=["modular", "paper"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each trainer")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(measure_memory(*args.memory_of, args))
        return
    report: dict[str, dict] = {}
    # First of all, as on Linux the peak of a process starts at that of the one which started it.
    memory = {(name, kind): peak_memory(name, kind, args) for name in args.models for kind in ["plain", *args.kinds]}
    for name in args.models:
        times = time_ratios(name, args.kinds, args)
        for kind in args.kinds:
            report[f"{name} {kind}"] = {
                "step_time": times[kind],
                "peak_memory": memory[name, kind] / memory[name, "plain"],
                "extra_parameters": extra_parameters(name, kind),
            }
            row = report[f"{name} {kind}"]
            print(
                f"{name:9} {kind:8} step time {row['step_time']['median']:.2f} "
                f"({row['step_time']['lower_quartile']:.2f} to {row['step_time']['upper_quartile']:.2f}), "
                f"peak memory {row['peak_memory']:.2f}, parameters +{row['extra_parameters']:.1%}",
                flush=True,
            )
        report[f"{name} statistics"] = statistics_ratio(name, args)
        print(f"{name:9} statistics ÷ plain inference {report[f'{name} statistics']['median']:.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
