# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line: `nemo-hf demo | train | learn-masks | extract | evaluate | report | push | info`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from .cli_output import print_demo, print_modules, print_report, print_values, write_json


# What only some commands need (datasets, training, the demo) is imported inside them.


def demo(arguments: list[str]) -> dict[str, Any]:
    """Train a small ViT on digits, cut modules out of it and compare them with a plain model."""
    parser = _parser("demo", demo.__doc__)
    parser.add_argument("--output", default="nemo-demo", help="folder for the models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--gates", choices=("mean", "binary"), default="mean", help="constant gates of the modules")
    args = parser.parse_args(arguments)
    from .demo import run_demo

    start = time.time()
    report = run_demo(args.output, args.seed, args.gates)
    report["seconds"] = time.time() - start
    print_demo(report, args.output)
    return report


def train(arguments: list[str]) -> dict[str, Any]:
    """Train a modular image or text classifier, collect its statistics and save both."""
    from transformers import HfArgumentParser, set_seed
    from transformers.utils import logging

    from . import task_data, tasks
    from .trainer import ModularTrainer
    from .training_args import ModularTrainingArguments

    parser = HfArgumentParser(
        (tasks.ModelArguments, task_data.DataArguments, ModularTrainingArguments),
        prog="nemo-hf train",
        description=train.__doc__,
        parents=[_common()],
        conflict_handler="resolve",  # TrainingArguments has a `debug` of its own; the command line's goes first
    )
    model_args, data_args, training_args, *_ = parser.parse_args_into_dataclasses(args=arguments)
    logging.set_verbosity_warning()
    training_args.remove_unused_columns = False  # images are transformed when they are read
    group_column = training_args.group_column
    train_split, eval_split, columns = task_data.load_splits(data_args, training_args.seed, group_column)
    processor = tasks.load_processor(model_args, columns, train_split, data_args.max_length)
    set_seed(training_args.seed)
    model = tasks.load_model(model_args, columns, processor)
    label2id = {name: i for i, name in enumerate(columns.names)}
    train_dataset, eval_dataset = (
        task_data.encode(split, columns, processor, label2id, data_args.max_length, group_column)
        for split in (train_split, eval_split)
    )
    trainer = ModularTrainer(
        model,
        training_args,
        data_collator=task_data.collator(processor, columns.is_image),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        compute_metrics=tasks.accuracy,
        modular_config=model_args.modular_config(training_args.objective),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    report: dict[str, Any] = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()  # the curves for `nemo-hf report`
    statistics = trainer.collect_statistics(train_dataset)
    if trainer.is_world_process_zero():
        statistics.save_pretrained(training_args.output_dir)
    masks = statistics.module_masks()
    single = "single_label_retention" if group_column is None else "single_group_retention"
    report.update({single: masks.retention()}, cohesion=statistics.cohesion(), coupling=masks.coupling())
    if training_args.push_to_hub:
        trainer.push_to_hub()
    print_values(report)
    option = "--labels" if group_column is None else "--groups"
    print(f"Saved to {training_args.output_dir}. Next: nemo-hf extract {training_args.output_dir} {option} …")
    return report


def learn_masks(arguments: list[str]) -> dict[str, Any]:
    """Learn masks for a plain classifier that is trained already; its weights stay as they are."""
    from . import task_data, tasks

    parser = _data_parser("learn-masks", learn_masks.__doc__, task_data.TrainDataArguments)
    parser.add_argument("checkpoint", help="a trained classifier: a folder or a repository on the Hub")
    parser.add_argument("--output", help="folder for the classifier and its masks; by default the checkpoint's own")
    parser.add_argument("--target_retention", type=float, default=0.2, help="share of neurons that a label may keep")
    parser.add_argument("--compactness", type=float, default=10.0, help="weight of what a mask has above the target")
    parser.add_argument("--learning_rate", type=float, default=0.1, help="of the gates (default: %(default)s)")
    parser.add_argument("--num_epochs", type=int, default=10, help="passes over the data (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="samples per batch (default: %(default)s)")
    parser.add_argument("--target_modules", default="all", help="all, ffn, attention, or a regular expression")
    parser.add_argument("--skip_first_blocks", type=int, default=1, help="blocks that keep all neurons")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    data_args, args = parser.parse_args_into_dataclasses(args=arguments)
    from torch.utils.data import DataLoader
    from transformers import set_seed

    from . import mask_learning
    from .errors import NemoValueError
    from .labels import ids_by_name
    from .replacing import check_folder

    output = Path(args.output or args.checkpoint)
    if args.output is not None:
        check_folder(output, kind=None)
    elif not output.is_dir():
        raise NemoValueError(f"{args.checkpoint} is no folder: name one for the masks with --output.")
    hub = {"revision": args.revision, "token": args.token}
    split, columns = task_data.load_train_split(data_args, args.seed)
    model = tasks.load_checkpoint(args.checkpoint, columns.is_image, **hub)
    processor = tasks.processor_of(args.checkpoint, model, columns.is_image, **hub)
    dataset = task_data.encode(split, columns, processor, ids_by_name(model.config), data_args.max_length)
    set_seed(args.seed)  # the order of the samples
    batches = DataLoader(
        dataset, args.batch_size, shuffle=True, collate_fn=task_data.collator(processor, columns.is_image)
    )
    own = ("target_modules", "skip_first_blocks", "seed")
    own += ("target_retention", "compactness", "learning_rate", "num_epochs")
    masks = mask_learning.learn_masks(model, batches, **{name: getattr(args, name) for name in own})
    if args.output is not None:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    masks.save_pretrained(output)
    report = {"single_label_retention": masks.retention(), "coupling": masks.coupling()}
    print_values(report)
    print(f"Saved to {output}. Next: nemo-hf extract {output} --labels …")
    return report


def extract(arguments: list[str]) -> dict[str, Any]:
    """Cut the module for some labels out of a checkpoint; needs the statistics, or masks, beside it, but no data."""
    parser = _parser("extract", extract.__doc__, _hub())
    parser.add_argument("checkpoint", help="a modular checkpoint or one with learnt masks: a folder or a repository")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--labels", nargs="+", help="names or ids of the labels, in the order wanted")
    chosen.add_argument("--groups", nargs="+", help="groups of samples, of a model trained with --group_column")
    parser.add_argument("--output", required=True, help="folder for the module")
    parser.add_argument(
        "--threshold",
        type=float,
        help="share of a label's samples that open a neuron (default: 0.9); not for learnt masks",
    )
    parser.add_argument(
        "--gates",
        choices=("mean", "binary"),
        help="what multiplies a kept neuron (default: mean; of learnt masks: binary)",
    )
    parser.add_argument(
        "--layout", choices=("ragged", "stock", "auto"), default="ragged", help="stock: the plain class can load it"
    )
    parser.add_argument("--uniform", action="store_true", help="keep the same number of neurons in all blocks")
    args = parser.parse_args(arguments)
    from . import ModuleMasks, NeuronStatistics, extract_module, metrics, save_module
    from .auto import load_parent, saved_processor
    from .errors import NemoValueError
    from .labels import ids_by_name
    from .masking import is_masked
    from .replacing import check_folder

    check_folder(args.output)  # before the work
    hub = {"revision": args.revision, "token": args.token}
    model = load_parent(args.checkpoint, **hub)
    if is_masked(model):
        statistics = NeuronStatistics.from_pretrained(args.checkpoint, **hub)
        masks = statistics.module_masks(0.9 if args.threshold is None else args.threshold, args.uniform)
    elif args.threshold is not None or args.uniform:
        raise NemoValueError(f"{args.checkpoint} is a plain model: learnt masks have no --threshold and no --uniform.")
    else:
        masks = ModuleMasks.from_pretrained(args.checkpoint, **hub)
    labels = args.labels and [_name_or_number(label, ids_by_name(model.config)) for label in args.labels]
    groups = args.groups and [_name_or_number(group, masks) for group in args.groups]
    module = extract_module(model, masks, labels, gates=args.gates, layout=args.layout, groups=groups)
    save_module(module, args.output, processing_class=saved_processor(args.checkpoint, module, **hub))
    names = ("labels", "layout", "neuron_retention", "parameter_retention")
    report = {
        **{name: module.config.nemo[name] for name in names},
        "parameters": metrics.count_parameters(module),
        "bytes": (Path(args.output) / "model.safetensors").stat().st_size,
    }
    print_values(report)
    print(f"Saved to {args.output}.")
    return report


def evaluate(arguments: list[str]) -> dict[str, Any]:
    """Accuracy of a module, a modular or a plain checkpoint on the samples of its labels."""
    from . import task_data, tasks

    parser = _data_parser("evaluate", evaluate.__doc__, task_data.EvalDataArguments)
    parser.add_argument("checkpoint", help="a folder or a repository on the Hub")
    parser.add_argument("--batch_size", type=int, default=128, help="samples per batch (default: %(default)s)")
    data_args, args = parser.parse_args_into_dataclasses(args=arguments)
    from . import collect_statistics, metrics
    from .config import MODULE_KIND, checkpoint_kind
    from .labels import ids_by_name
    from .masking import is_masked

    hub = {"revision": args.revision, "token": args.token}
    split, columns = task_data.load_eval_split(data_args)
    model = tasks.load_checkpoint(args.checkpoint, columns.is_image, **hub)
    processor = tasks.processor_of(args.checkpoint, model, columns.is_image, **hub)
    kind, label2id = checkpoint_kind(model.config), ids_by_name(model.config)
    dataset = task_data.encode(
        split, columns, processor, label2id, data_args.max_length, for_module=kind == MODULE_KIND
    )
    batches = task_data.dataloader(dataset, processor, columns.is_image, args.batch_size)
    report = {
        "kind": kind or "plain",
        "labels": list(model.config.id2label.values()),
        "num_samples": len(dataset),
        "accuracy": tasks.model_accuracy(model, batches),
        "parameters": metrics.count_parameters(model, generators=False),
    }
    if is_masked(model):
        statistics = collect_statistics(model, batches)
        masks = statistics.module_masks()
        report.update(
            single_label_retention=masks.retention(), cohesion=statistics.cohesion(), coupling=masks.coupling()
        )
    print_values(report)
    return report


def report(arguments: list[str]) -> dict[str, Any]:
    """Table, plots and a page about the modules in a modular checkpoint; with a dataset also their accuracies."""
    from . import task_data, tasks

    parser = _data_parser("report", report.__doc__, task_data.OptionalEvalDataArguments)
    parser.add_argument("checkpoint", help="a modular checkpoint: a folder or a repository on the Hub")
    parser.add_argument("--output", default="nemo-report", help="folder for the report (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="share of a label's samples that open a neuron")
    parser.add_argument(
        "--max_pair_labels", type=int, default=20, help="no pairs with more labels than these (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="samples per batch (default: %(default)s)")
    data_args, args = parser.parse_args_into_dataclasses(args=arguments)
    from . import AutoModularModel, NeuronStatistics
    from .groups import group_names
    from .labels import ids_by_name
    from .report import write_report

    hub = {"revision": args.revision, "token": args.token}
    model = AutoModularModel.from_pretrained(args.checkpoint, **hub)
    batches = groups = None
    if data_args.dataset_name is not None:
        column = NeuronStatistics.from_pretrained(args.checkpoint, **hub).grouped_by
        split, columns = task_data.load_eval_split(data_args, column)
        processor = tasks.processor_of(args.checkpoint, model, columns.is_image, **hub)
        encoded = task_data.encode(split, columns, processor, ids_by_name(model.config), data_args.max_length, column)
        batches = task_data.dataloader(encoded, processor, columns.is_image, args.batch_size)
        groups = None if column is None else group_names(encoded, column)
    figures = write_report(
        args.checkpoint, args.output, batches, args.threshold, groups, args.max_pair_labels, model=model, **hub
    )
    print_report(figures)
    print(f"Written to {args.output}. Open {Path(args.output) / 'report.html'} in a browser.")
    return figures


def push(arguments: list[str]) -> dict[str, Any]:
    """Push modules from their folders to one repository on the Hub, in one commit."""
    parser = _parser("push", push.__doc__)
    parser.add_argument("folders", nargs="+", help="of `nemo-hf extract`; several make a collection of subfolders")
    parser.add_argument("--repo_id", required=True, help="repository on the Hub, made if it is missing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--base_model", help="the modular parent on the Hub, for the cards")
    parser.add_argument("--dataset", help="the data set on the Hub that the results are of, for the cards")
    parser.add_argument("--revision", help="branch to push to, made if it is missing")
    parser.add_argument("--token", help="access token for the Hub")
    parser.add_argument("--commit_message", help="first line of the commit")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    args = parser.parse_args(arguments)
    from . import push_modules

    options = {
        name: value for name, value in vars(args).items() if name not in ("folders", "repo_id", "json", "debug")
    }
    modules = args.folders[0] if len(args.folders) == 1 else args.folders
    commit = push_modules(args.repo_id, modules, **options)
    report = {"commit": commit.oid, "commit_url": commit.commit_url, "pull_request": commit.pr_url}
    print_values(report)
    return report


def info(arguments: list[str]) -> dict[str, Any]:
    """What is in a checkpoint: a plain or modular model, a module or a collection; downloads no weights."""
    parser = _parser("info", info.__doc__)
    parser.add_argument("checkpoint", help="a folder or a repository on the Hub")
    parser.add_argument("--subfolder", default="", help="of the checkpoint in it, for a module of a collection")
    parser.add_argument("--revision", help="revision on the Hub")
    parser.add_argument("--token", help="access token for the Hub")
    args = parser.parse_args(arguments)
    from .inspection import describe_checkpoint

    report = describe_checkpoint(args.checkpoint, args.revision, args.token, args.subfolder)
    shown = {name: value for name, value in report.items() if name not in ("modules", "neurons_per_layer")}
    print_values(
        {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in shown.items()}
    )
    print_modules(report.get("modules", ()))
    return report


COMMANDS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "demo": demo,
    "train": train,
    "learn-masks": learn_masks,
    "extract": extract,
    "evaluate": evaluate,
    "report": report,
    "push": push,
    "info": info,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `nemo-hf`: runs one command; 0 on success, 1 on an error, 2 on wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="nemo-hf",
        description="Train modular classifiers and cut out small modules.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:13}{command.__doc__}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, help="what to do; `nemo-hf COMMAND --help` lists its options")
    name = parser.parse_args(arguments[:1]).command
    common, own_arguments = _common().parse_known_args(arguments[1:])
    from transformers.utils import logging

    from .errors import NemoError

    logging.disable_progress_bar()  # of reading and writing single files; training and statistics keep theirs
    try:
        report = COMMANDS[name](own_arguments)
        if common.json:
            write_json(common.json, report)
    except Exception as error:  # transformers and datasets raise errors of any kind for what does not fit
        if common.debug:
            raise
        text = str(error)
        if not isinstance(error, NemoError | OSError | ValueError):
            text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
        print(f"nemo-hf {name}: error: {' '.join(text.split())}", file=sys.stderr)
        return 1
    return 0


def _common() -> argparse.ArgumentParser:
    """The options of all commands: listed by each of them, handled in one place."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _hub() -> argparse.ArgumentParser:
    """The options of the commands that load a checkpoint."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision", default="main", help="revision on the Hub")
    parser.add_argument("--token", help="access token for the Hub")
    return parser


def _parser(name: str, description: str | None, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"nemo-hf {name}", description=description, parents=[_common(), *parents])


def _data_parser(name: str, description: str | None, data: type) -> Any:
    """Of a command that takes a checkpoint and a dataset."""
    from transformers import HfArgumentParser

    return HfArgumentParser(data, prog=f"nemo-hf {name}", description=description, parents=[_common(), _hub()])


def _name_or_number(text: str, known: Container[str | int]) -> str | int:
    return int(text) if text.isdigit() and text not in known else text


if __name__ == "__main__":
    sys.exit(main())
