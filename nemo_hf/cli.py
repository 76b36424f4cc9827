# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line: `nemo-hf demo | train | extract | evaluate | report | push | info`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any


# What only some commands need (datasets, training, the demo) is imported inside them.


def demo(arguments: list[str]) -> dict[str, Any]:
    """Train a small ViT on digits, cut modules out of it and compare them with a plain model."""
    parser = _parser("demo", demo.__doc__)
    parser.add_argument("--output", default="nemo-demo", help="folder for the models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--gates", choices=("mean", "binary"), default="mean", help="constant gates of the modules")
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {}
    from .demo import run_demo

    start = time.time()
    report.update(run_demo(args.output, args.seed, args.gates))
    report["seconds"] = time.time() - start
    _print_demo(report, args.output)
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
    report: dict[str, Any] = {}
    training_args.remove_unused_columns = False  # images are transformed when they are read
    group_column = training_args.group_column
    train_split, eval_split = task_data.load_splits(data_args, training_args.seed, group_column)
    columns = task_data.find_columns(train_split, data_args)
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
    report.update(trainer.evaluate())
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
    _print_values(report)
    option = "--labels" if group_column is None else "--groups"
    print(f"Saved to {training_args.output_dir}. Next: nemo-hf extract {training_args.output_dir} {option} …")
    return report


def extract(arguments: list[str]) -> dict[str, Any]:
    """Cut the module for some labels out of a modular checkpoint; needs the statistics beside it, but no data."""
    parser = _parser("extract", extract.__doc__)
    parser.add_argument("checkpoint", help="a modular checkpoint: a folder or a repository on the Hub")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--labels", nargs="+", help="names or ids of the labels, in the order wanted")
    chosen.add_argument("--groups", nargs="+", help="groups of samples, of a model trained with --group_column")
    parser.add_argument("--output", required=True, help="folder for the module")
    parser.add_argument("--threshold", type=float, default=0.9, help="share of a label's samples that open a neuron")
    parser.add_argument("--gates", choices=("mean", "binary"), default="mean", help="what multiplies a kept neuron")
    parser.add_argument(
        "--layout", choices=("ragged", "stock", "auto"), default="ragged", help="stock: the plain class can load it"
    )
    parser.add_argument("--uniform", action="store_true", help="keep the same number of neurons in all blocks")
    parser.add_argument("--revision", default="main", help="revision on the Hub")
    parser.add_argument("--token", help="access token for the Hub")
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {}
    from . import AutoModularModel, NeuronStatistics, extract_module, metrics, save_module
    from .labels import ids_by_name
    from .tasks import processor_of

    hub = {"revision": args.revision, "token": args.token}
    model = AutoModularModel.from_pretrained(args.checkpoint, **hub)
    masks = NeuronStatistics.from_pretrained(args.checkpoint, **hub).module_masks(args.threshold, args.uniform)
    labels = args.labels and [_name_or_number(label, ids_by_name(model.config)) for label in args.labels]
    groups = args.groups and [_name_or_number(group, masks) for group in args.groups]
    module = extract_module(model, masks, labels, gates=args.gates, layout=args.layout, groups=groups)
    save_module(module, args.output, processing_class=processor_of(args.checkpoint, module, **hub))
    report.update(
        labels=module.config.nemo["labels"],
        layout=module.config.nemo["layout"],
        neuron_retention=module.config.nemo["neuron_retention"],
        parameter_retention=module.config.nemo["parameter_retention"],
        parameters=metrics.count_parameters(module),
        bytes=(Path(args.output) / "model.safetensors").stat().st_size,
    )
    _print_values(report)
    print(f"Saved to {args.output}.")
    return report


def evaluate(arguments: list[str]) -> dict[str, Any]:
    """Accuracy of a module, a modular or a plain checkpoint on the samples of its labels."""
    from transformers import HfArgumentParser

    from . import task_data, tasks

    parser = HfArgumentParser(
        task_data.DataArguments, prog="nemo-hf evaluate", description=evaluate.__doc__, parents=[_common()]
    )
    parser.add_argument("checkpoint", help="a folder or a repository on the Hub")
    parser.add_argument("--batch_size", type=int, default=128, help="samples per batch (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="revision on the Hub")
    parser.add_argument("--token", help="access token for the Hub")
    data_args, args = parser.parse_args_into_dataclasses(args=arguments)
    report: dict[str, Any] = {}
    from . import collect_statistics, metrics
    from .config import checkpoint_kind
    from .labels import ids_by_name
    from .masking import is_masked

    hub = {"revision": args.revision, "token": args.token}
    split = task_data.load_eval_split(data_args)
    columns = task_data.find_columns(split, data_args)
    model = tasks.load_checkpoint(args.checkpoint, columns.is_image, **hub)
    processor = tasks.processor_of(args.checkpoint, model, **hub)
    dataset = task_data.encode(split, columns, processor, ids_by_name(model.config), data_args.max_length)
    batches = task_data.dataloader(dataset, processor, columns.is_image, args.batch_size)
    report.update(
        kind=checkpoint_kind(model.config) or "plain",
        labels=list(model.config.id2label.values()),
        num_samples=len(dataset),
        accuracy=tasks.model_accuracy(model, batches),
        parameters=metrics.count_parameters(model, generators=False),
    )
    if is_masked(model):
        statistics = collect_statistics(model, batches)
        masks = statistics.module_masks()
        report.update(
            single_label_retention=masks.retention(), cohesion=statistics.cohesion(), coupling=masks.coupling()
        )
    _print_values(report)
    return report


def report(arguments: list[str]) -> dict[str, Any]:
    """Table, plots and a page about the modules in a modular checkpoint; with a dataset also their accuracies."""
    from transformers import HfArgumentParser

    from . import task_data, tasks

    parser = HfArgumentParser(
        task_data.OptionalDataArguments, prog="nemo-hf report", description=report.__doc__, parents=[_common()]
    )
    parser.add_argument("checkpoint", help="a modular checkpoint: a folder or a repository on the Hub")
    parser.add_argument("--output", default="nemo-report", help="folder for the report (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="share of a label's samples that open a neuron")
    parser.add_argument(
        "--max_pair_labels", type=int, default=20, help="no pairs with more labels than these (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="samples per batch (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="revision on the Hub")
    parser.add_argument("--token", help="access token for the Hub")
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
        split = task_data.load_eval_split(data_args, column)
        columns = task_data.find_columns(split, data_args)
        processor = tasks.processor_of(args.checkpoint, model, **hub)
        encoded = task_data.encode(split, columns, processor, ids_by_name(model.config), data_args.max_length, column)
        batches = task_data.dataloader(encoded, processor, columns.is_image, args.batch_size)
        groups = None if column is None else group_names(encoded, column)
    figures = write_report(
        args.checkpoint, args.output, batches, args.threshold, groups, args.max_pair_labels, model=model, **hub
    )
    _print_report(figures)
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
    _print_values(report)
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
    _print_values(
        {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in shown.items()}
    )
    for module in report.get("modules", ()):
        accuracy = f"  accuracy {module['accuracy']:.4g}" if "accuracy" in module else ""
        sizes = f"{module['neuron_retention']:.1%} of the neurons, {module['parameters']:,} parameters"
        print(f"  {module['name']:30}  --subfolder {module['folder']:30}  {sizes}{accuracy}")
    return report


COMMANDS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "demo": demo,
    "train": train,
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
        epilog="\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items()),
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
            _write_json(common.json, report)
    except (NemoError, OSError, ValueError) as error:
        if common.debug:
            raise
        print(f"nemo-hf {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _common() -> argparse.ArgumentParser:
    """The options of all commands: listed by each of them, handled in one place."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"nemo-hf {name}", description=description, parents=[_common()])


def _write_json(path: str, report: dict[str, Any]) -> None:
    from .files import atomic_path, finite

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite(report), indent=2) + "\n")


def _name_or_number(text: str, known: Container[str | int]) -> str | int:
    return int(text) if text.isdigit() and text not in known else text


def _print_values(report: dict[str, Any]) -> None:
    for name, value in report.items():
        print(f"{name:32}{f'{value:.4g}' if isinstance(value, float) else value}")


def _print_report(figures: dict[str, Any]) -> None:
    owner = "labels" if figures["grouped_by"] is None else "groups"
    values = {
        owner: len(figures[owner]),
        "modules in the table": len(figures["modules"]),
        f"neurons kept for one {owner[:-1]}": figures["neuron_retention"],
        "coupling": figures["coupling"],
    }
    if "evaluation" in figures:
        values["accuracy before cutting"] = figures["evaluation"]["modular_accuracy"]
    _print_values(values)


def _print_demo(report: dict[str, Any], output: str) -> None:
    other = {"mean": "binary", "binary": "mean"}[report["gates"]]
    header = ("labels", f"acc. {report['gates']}", f"acc. {other}", "acc. plain", "neurons", "parameters", "bytes")
    print("  ".join(f"{name:>11}" for name in (*header, "latency", "difference")))
    for module in report["modules"]:
        several = len(module["labels"]) > 1  # with one label there is nothing to choose between
        accuracies = (module["accuracy"], module["other_gates_accuracy"], module["plain_accuracy"])
        cells = [",".join(map(str, module["labels"])), *(f"{value:.1%}" if several else "-" for value in accuracies)]
        cells += [f"{module['neuron_retention']:.1%}", f"{module['parameter_retention']:.1%}", f"{module['bytes']:,}"]
        cells += [f"{module['latency_ratio']:.2f} x", f"{module['logit_difference']:.1e}"]
        print("  ".join(f"{cell:>11}" for cell in cells))
    summary = {
        "plain model, all labels": f"{report['plain_accuracy']:.1%}",
        "modular model, all labels": f"{report['modular_accuracy']:.1%}",
        f"modules of label pairs, {report['gates']} gates": f"{report['pair_accuracy']:.1%}",
        f"modules of label pairs, {other} gates": f"{report['pair_other_gates_accuracy']:.1%}",
        "plain model, label pairs": f"{report['pair_plain_accuracy']:.1%}",
        "neurons kept for one label": f"{report['neuron_retention']:.1%}",
        "cohesion, coupling": f"{report['cohesion']:.2f}, {report['coupling']:.2f}",
        "largest logit difference to the parent": f"{report['max_logit_difference']:.1e}",
        "after reloading in a fresh process": f"{report['reload_difference']:.1e}",
    }
    print("\nModules are measured as cut, without fine-tuning.")
    for name, value in summary.items():
        print(f"{name:42}{value}")
    print(f"Saved to {output} in {report['seconds']:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
