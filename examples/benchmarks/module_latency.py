# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
How fast modules are: latency and operations of a module as ratios to its plain parent, measured in turn in one
process. Without --checkpoints the weights are random and so is the choice of neurons, the same share of every layer:
only sizes count. With it, modules are cut out of modular checkpoints (with statistics beside them, as `nemo-hf train`
writes them) for random sets of labels.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import step_cost
import torch
from suite_data import draw_subsets
from transformers import PreTrainedModel

from nemo_hf import (
    AutoModularModel,
    ModuleMasks,
    NeuronStatistics,
    extract_module,
    list_maskable_layers,
    metrics,
    remove_masks,
)
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


def random_modules(args: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel, PreTrainedModel]]:
    """What to call it, the module and its parent."""
    for name in args.models:
        torch.manual_seed(0)
        model = step_cost.MODELS[name]().eval()
        for share in args.shares:
            module = extract_module(model, random_masks(model, share), labels=[0], layout=args.layout)
            yield f"{name}, {share:.0%} of the neurons", module, model


def trained_modules(args: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel, PreTrainedModel]]:
    """The same for checkpoints: for every size the module of one set of labels."""
    for folder in args.checkpoints:
        model = AutoModularModel.from_pretrained(folder).eval()
        masks = NeuronStatistics.from_pretrained(folder).module_masks()
        plain = remove_masks(copy.deepcopy(model))
        for size in args.num_labels:
            labels = draw_subsets(model.config.num_labels, size, 1)[0]
            names = ", ".join(model.config.id2label[label] for label in labels)
            yield f"{Path(folder).name}, {names}", extract_module(model, masks, labels, layout=args.layout), plain


def inputs_of(model: PreTrainedModel, batch_size: int) -> dict[str, torch.Tensor]:
    """Random images of the size of the configuration, or texts of 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        return {"pixel_values": torch.randn(batch_size, config.num_channels, size, size, generator=generator)}
    return {"input_ids": torch.randint(5, config.vocab_size, (batch_size, 128), generator=generator)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=step_cost.MODELS, default=["vit", "resnet18"])
    add("--shares", nargs="+", type=float, default=[0.1, 0.15, 0.3], help="neurons kept")
    add("--checkpoints", nargs="+", help="folders of modular models: their modules instead of random ones")
    add("--num_labels", nargs="+", type=int, default=[1, 2, 5], help="labels of these modules")
    add("--layout", choices=("ragged", "stock"), default="ragged")
    add("--batch_size", type=int, default=32)
    add("--pairs", type=int, default=15, help="measured pairs")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, module, parent in (trained_modules if args.checkpoints else random_modules)(args):
        module, parent = module.to(device), parent.to(device)
        inputs = {key: value.to(device) for key, value in inputs_of(parent, args.batch_size).items()}
        latency = metrics.latency_ratio(module, parent, inputs, pairs=args.pairs)
        flops = metrics.count_flops(module, inputs) / metrics.count_flops(parent, inputs)
        parameters = metrics.count_parameters(module) / metrics.count_parameters(parent)
        rows.append({"module": name, "parameters": parameters, "flops": flops, "latency": latency})
        print(
            f"{name}: parameters {parameters:.1%}, operations {flops:.3f}, latency {latency:.3f}: "
            f"{latency / flops:.2f} times the operations' ratio",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
