# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Learn masks for a classifier that is trained already. Compare the modules that are cut with them, without fine-tuning,
with the classifier restricted to the same labels, and with modules of the same size whose neurons have the largest
weights or are random. Without a checkpoint a small model is trained on the 8x8 digits of scikit-learn.
"""

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.pytorch_utils import Conv1D

from nemo_hf import ModuleMasks, NeuronMask, demo, extract_module, learn_masks, task_data, tasks
from nemo_hf.labels import ids_by_name
from nemo_hf.metrics import count_parameters


NUM_SELECTIONS = 15  # of each number of labels


@dataclass
class Arguments:
    """The model, and how its masks are learnt."""

    checkpoint: str | None = field(default=None, metadata={"help": "A trained classifier: a repository or a folder."})
    digits_model: Literal["vit", "resnet"] = field(
        default="vit", metadata={"help": "Without a checkpoint: what is trained on the digits."}
    )
    target_retention: float = field(default=0.2, metadata={"help": "Share of neurons that a label may keep."})
    num_epochs: int = field(default=10, metadata={"help": "Passes over the training data to learn masks."})
    batch_size: int = field(default=64, metadata={"help": "Samples per batch."})
    seed: int = field(default=0, metadata={"help": "Of the masks, the selections and the model for the digits."})


@dataclass
class Data(task_data.DataArguments):
    """Where the data are; for the digits nothing."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or a local folder."})


def train_on_digits(args: Arguments) -> tuple[PreTrainedModel, Dataset, Dataset, Callable]:
    """A plain model, both splits of its data, and what makes a batch of samples."""
    train, test, _ = demo.load_digits_splits()
    model = demo.new_model(args.seed)
    if args.digits_model == "resnet":
        labels = {"id2label": model.config.id2label, "label2id": model.config.label2id}
        sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(**sizes, **labels, downsample_in_first_stage=False))
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(model, TrainingArguments(scratch, seed=args.seed, **demo.TRAINING), train_dataset=train).train()
    return model, train, test, default_data_collator


def load(args: Arguments, data: task_data.DataArguments) -> tuple[PreTrainedModel, Dataset, Dataset, Callable]:
    """The same for a checkpoint and a dataset."""
    train, test, columns = task_data.load_splits(data, args.seed, group_column=None)
    model = tasks.load_checkpoint(args.checkpoint, columns.is_image)
    processor = tasks.processor_of(args.checkpoint, model, columns.is_image)
    label2id = ids_by_name(model.config)
    encoded = [task_data.encode(split, columns, processor, label2id, data.max_length) for split in (train, test)]
    return model, *encoded, task_data.collator(processor, columns.is_image)


def of_same_size(model: PreTrainedModel, mask: NeuronMask, score: Callable) -> dict[str, torch.Tensor]:
    """A selection of as many neurons in every layer, those with the highest score."""
    selection = {}
    for name, of_layer in mask.items():
        layer = model.get_submodule(name)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight.flatten(1)
        top = score(weight.cpu()).topk(int(of_layer.sum())).indices
        selection[name] = torch.zeros_like(of_layer).scatter(0, top, True)
    return selection


@torch.no_grad()
def predict(model: PreTrainedModel, batches: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels."""
    logits, labels = [], []
    for batch in batches:
        labels.append(batch.pop("labels"))
        logits.append(model(**{name: value.to(model.device) for name, value in batch.items()}).logits.cpu())
    return torch.cat(logits), torch.cat(labels)


def main() -> None:
    parser = HfArgumentParser((Arguments, Data), description=__doc__)
    args, data = parser.parse_args_into_dataclasses()
    model, train, test, collator = load(args, data) if args.checkpoint else train_on_digits(args)
    model.eval()

    torch.manual_seed(args.seed)
    batches = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collator)
    learnt = learn_masks(
        model, batches, target_retention=args.target_retention, num_epochs=args.num_epochs, seed=args.seed
    )
    scores = {"large weights": lambda weight: weight.norm(dim=1), "random": lambda weight: torch.rand(len(weight))}
    print(f"\nNeurons kept for one label: {learnt.retention():.1%}")
    print(f"{'labels':>6}{'parameters':>12}{'model':>9}" + "".join(f"{kind:>15}" for kind in ("learnt", *scores)))

    logits, labels = predict(model, DataLoader(test, args.batch_size, collate_fn=collator))
    rng, num_labels = random.Random(args.seed), model.config.num_labels
    for count in sorted({2, min(5, num_labels), num_labels}):
        selections = {tuple(sorted(rng.sample(range(num_labels), count))) for _ in range(NUM_SELECTIONS)}
        figures = []
        for selection in map(list, sorted(selections)):
            chosen = torch.isin(labels, torch.tensor(selection)).nonzero().flatten()
            samples = DataLoader(Subset(test, chosen.tolist()), args.batch_size, collate_fn=collator)
            union = learnt.union(model.config.id2label[i] for i in selection)
            masks = [union, *(of_same_size(model, union, score) for score in scores.values())]
            modules = [extract_module(model, ModuleMasks(dict.fromkeys(selection, mask)), selection) for mask in masks]
            found = [logits[chosen][:, selection], *(predict(module, samples)[0] for module in modules)]
            hits = [torch.tensor(selection)[each.argmax(-1)] == labels[chosen] for each in found]
            size = count_parameters(modules[0]) / count_parameters(model)
            figures.append([size, *(hit.float().mean().item() for hit in hits)])
        size, plain, *others = torch.tensor(figures).mean(0).tolist()
        print(f"{count:>6}{size:>12.1%}{plain:>9.1%}" + "".join(f"{value:>15.1%}" for value in others))


if __name__ == "__main__":
    main()
