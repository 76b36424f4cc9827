# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
How fast modules are: latency and operations of a module as ratios to its parent, measured in turn in one process. The
weights are random and so is the choice of neurons, the same share of every layer: only sizes count.
"""

import argparse
import json
from pathlib import Path

import step_cost
import torch

from nemo_hf import ModuleMasks, extract_module, list_maskable_layers, metrics
from nemo_hf.slim import layer_sizes


def random_masks(model: torch.nn.Module, share: float) -> ModuleMasks:
    """A mask that keeps so many random neurons of every maskable layer."""
    generator = torch.Generator().manual_seed(0)
    mask = {}
    for name in list_maskable_layers(model):
        neurons = layer_sizes(model.get_submodule(name))[1]
        kept = torch.randperm(neurons, generator=generator)[: max(1, round(share * neurons))]
        mask[name] = torch.zeros(neurons, dtype=torch.bool).index_fill_(0, kept, True)
    return ModuleMasks({0: mask})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=step_cost.MODELS, default=["vit", "resnet18"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.15, 0.3], help="neurons kept")
    parser.add_argument("--layout", choices=("ragged", "stock"), default="ragged")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=15, help="measured pairs")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in args.models:
        torch.manual_seed(0)
        model = step_cost.MODELS[name]().eval().to(device)
        batch = step_cost.batch_for(name, args.batch_size, device)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        for share in args.shares:
            module = extract_module(model, random_masks(model, share), labels=[0], layout=args.layout)
            latency = metrics.latency_ratio(module, model, inputs, pairs=args.pairs)
            flops = metrics.count_flops(module, inputs) / metrics.count_flops(model, inputs)
            parameters = metrics.count_parameters(module) / metrics.count_parameters(model)
            figures = {"parameters": parameters, "flops": flops, "latency": latency}
            rows.append({"model": name, "neurons": share, **figures})
            print(
                f"{name:9} neurons {share:.0%}, parameters {parameters:.1%}, operations {flops:.3f}, "
                f"latency {latency:.3f}: {latency / flops:.2f} times the operations' ratio",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
