# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
One run of a suite: trains one model by one method with one seed and measures its modules. `suite.py` starts it in a
process of its own, with a folder that holds `spec.json`; `result.json` appears there when all is done.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from magnitude import magnitude_masks
from recipes import LABEL_COLUMNS, Row
from suite_data import Task, all_logits, crop_and_flip
from suite_measure import EVAL_BATCH, Modules
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from nemo_hf import (
    ModularConfig,
    ModularTrainer,
    ModularTrainingArguments,
    ModuleMasks,
    collect_statistics,
    extract_module,
    learn_masks,
    task_data,
    tasks,
)
from nemo_hf.extraction import module_overlap
from nemo_hf.metrics import count_parameters
from nemo_hf.objectives import distillation_loss


UNFINISHED = 75  # exit code: stopped by the time limit, with a checkpoint
SAVE_SHARE = 0.1  # of the steps between checkpoints of a long training


class Unfinished(Exception):
    """The time is up; the next call goes on."""


class Pieces(TrainerCallback):
    """
    Adds up the seconds of a training over its pieces, and stops in time with a checkpoint.

    Args:
        file (`Path`): keeps the seconds until the last checkpoint.
        deadline (`float`): on the clock of `time.monotonic`.
    """

    def __init__(self, file: Path, deadline: float):
        self.file, self.deadline = file, deadline
        nothing = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory": 0}
        self.before = json.loads(file.read_text()) if file.exists() else nothing

    def progress(self) -> dict[str, float]:
        """Seconds and bytes until now. Where other programs run as well, the time of the processor says more."""
        return {
            "seconds": self.before["seconds"] + time.monotonic() - self.start,
            "cpu_seconds": self.before["cpu_seconds"] + time.process_time() - self.cpu_start,
            "peak_memory": max(self.before["peak_memory"], peak_memory()),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.cpu_start = time.monotonic(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_json(self.file, self.progress())


class PlainTrainer(Trainer):
    """
    The `Trainer` of transformers. A model with a distillation head learns from a teacher as in [`ModularTrainer`], and
    checkpoints are loaded by `from_pretrained`, since those of ViT carry other names than its parameters.
    """

    teacher_model: nn.Module | None = None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.teacher_model is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            teacher_logits = self.teacher_model(pixel_values=inputs["pixel_values"]).logits
        heads = (outputs.cls_logits, outputs.distillation_logits)
        loss = distillation_loss(*heads, teacher_logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict(), strict=True)


class Run:
    """
    What `spec.json` asks for.

    Args:
        folder (`Path`): of the run.
        dataset (`str`): name or folder of the data set.
        deadline (`float`): on the clock of `time.monotonic`.
    """

    def __init__(self, folder: Path, dataset: str, deadline: float):
        self.folder, self.deadline = folder, deadline
        self.spec = json.loads((folder / "spec.json").read_text())
        self.row = Row(**self.spec["recipe"])
        self.task = self._load_task(dataset)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        names = {field.name for field in fields(ModularConfig)}
        settings = dict(self.spec["settings"])
        self.threshold = settings.pop("threshold", 0.9)
        self.modular_config = {name: settings.pop(name) for name in list(settings) if name in names}
        self.arguments = settings

    def _load_task(self, dataset: str) -> Task:
        data = task_data.DataArguments(dataset, label_column=LABEL_COLUMNS.get(dataset))
        model = tasks.ModelArguments(
            model_type=self.row.model_type, config_overrides=json.dumps(dict(self.row.config)), train_tokenizer=True
        )
        train = task_data.load_split(data, "train")
        if self.spec["validation"]:
            parts = train.train_test_split(self.row.held_out, seed=0)
            train, test = parts["train"], parts["test"]
        else:
            test = task_data.load_split(data)
        if self.row.max_train_samples and self.row.max_train_samples < len(train):
            train = train.shuffle(seed=0).select(range(self.row.max_train_samples))  # the same for every seed
        if self.spec["scale"] < 1 and self.row.max_eval_samples < len(test):
            test = test.shuffle(seed=0).select(range(self.row.max_eval_samples))
        return Task(model, data, train, test)

    # ---- Training ----

    def train(self) -> dict[str, Any]:
        """Train to the end, or raise [`Unfinished`]; what it took, from memory if it is done already."""
        done = self.folder / "training.json"
        if done.exists():
            return json.loads(done.read_text())
        trainer = self._trainer()
        pieces = Pieces(self.folder / "progress.json", self.deadline)
        trainer.add_callback(pieces)
        checkpoints = self.folder / "checkpoints"
        last = get_last_checkpoint(checkpoints) if checkpoints.exists() else None
        trainer.train(resume_from_checkpoint=last)
        if trainer.state.global_step < trainer.state.max_steps:
            raise Unfinished
        trainer.save_model(str(self.folder / "model"))
        write_json(done, pieces.progress())
        return json.loads(done.read_text())

    def _trainer(self) -> Trainer:
        model = self.task.new_model(self.spec["seed"])
        options: dict[str, Any] = {"train_dataset": self.task.train, "data_collator": self._training_collator()}
        options["optimizer_cls_and_kwargs"] = self._optimizer(self.row.learning_rate)
        teacher = self._teacher()
        if self.spec["kind"] == "modular":
            arguments = ModularTrainingArguments(**self._training_arguments(), **self.arguments)
            return ModularTrainer(model, arguments, modular_config=self._config(), teacher_model=teacher, **options)
        trainer = PlainTrainer(model, TrainingArguments(**self._training_arguments(), **self.arguments), **options)
        trainer.teacher_model = teacher
        return trainer

    def _config(self) -> ModularConfig:
        return ModularConfig(**self.modular_config)

    def _optimizer(self, rate: float) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """`None` for AdamW, which the Trainer makes."""
        return (
            (torch.optim.SGD, {"lr": rate, "momentum": 0.9, "nesterov": True}) if self.row.published_recipe else None
        )

    def _training_collator(self) -> Callable[[list[Any]], Any]:
        if not self.row.published_recipe:
            return self.task.collator
        return lambda samples: crop_and_flip(self.task.collator(samples))

    def _training_arguments(self) -> dict[str, Any]:
        published = self.row.published_recipe
        on_gpu = torch.cuda.is_available()
        return {
            "output_dir": str(self.folder / "checkpoints"),
            "num_train_epochs": self.row.epochs,
            "per_device_train_batch_size": self.row.batch_size,
            "learning_rate": self.row.learning_rate,
            "lr_scheduler_type": "cosine" if published else "linear",
            "bf16": published and on_gpu,
            "dataloader_pin_memory": on_gpu,
            "dataloader_num_workers": 4 if published and on_gpu else 0,
            "seed": self.spec["seed"],
            "save_strategy": "steps" if published else "no",
            "save_steps": SAVE_SHARE,
            "save_total_limit": 1,
            "logging_strategy": "epoch",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }

    def _teacher(self) -> PreTrainedModel | None:
        return None if self.row.teacher is None else self._trained(self._needed("teacher")).to(self.device).eval()

    def _needed(self, name: str) -> Path:
        return self.folder / self.spec["needs"][name]

    def _trained(self, folder: Path) -> PreTrainedModel:
        return tasks.load_checkpoint(str(folder / "model"), self.task.columns.is_image)

    # ---- Figures ----

    def measure(self) -> dict[str, Any]:
        """The figures of the trained model and of its modules."""
        modules = Modules(
            self.task,
            self.task.new_model(self.spec["seed"]).to(self.device),
            self.spec["num_subsets"],
            self.row.max_eval_samples,
        )
        if self.spec["kind"] == "pruned":
            return self._measure_pruned(modules)
        if self.spec["kind"] == "learned":
            return self._measure_learned(modules)
        model = self._trained(self.folder).to(self.device).eval()
        if self.spec["kind"] == "plain":
            return {"accuracy": self._accuracy(model), "modules": modules.restricted(model)}
        training_samples = self.task.batches(self.task.train, EVAL_BATCH)
        statistics = collect_statistics(model, training_samples, disable_tqdm=True)
        masks = statistics.module_masks(self.threshold)
        figures = {"accuracy": self._accuracy(model), "cohesion": statistics.cohesion(self.threshold)}
        return {**figures, **mask_figures(model, masks), **self._modules(modules, model, lambda size: masks)}

    def _measure_learned(self, modules: Modules) -> dict[str, Any]:
        """Time and memory are those of learning the masks, on top of the training of the plain model."""
        model = self._trained(self._needed("standard")).to(self.device).eval()
        start, cpu_start = time.monotonic(), time.process_time()
        samples = random.Random(self.spec["seed"]).sample(self.task.train, len(self.task.train))
        batches = self.task.batches(samples, self.row.batch_size)
        options = {"seed": self.spec["seed"], "disable_tqdm": True, **self.modular_config, **self.arguments}
        masks = learn_masks(model, batches, **options)
        training = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu_start}
        return {
            "training": {**training, "peak_memory": peak_memory()},
            "accuracy": self._accuracy(model),
            **mask_figures(model, masks),
            **self._modules(modules, model, lambda size: masks),
        }

    def _measure_pruned(self, modules: Modules) -> dict[str, Any]:
        """For every subset size one pruned model, as large as the modules of nemo_hf are on average."""
        model = self._trained(self._needed("standard")).to(self.device).eval()
        reference = json.loads((self._needed("nemo_hf") / "result.json").read_text())
        own = [module for module in reference["modules"] if module["gates"] == reference["spec"]["gates"][0]]
        config = ModularConfig.from_dict(reference["modular_config"])
        parameters = count_parameters(model)
        masks = {}
        for size in {len(module["labels"]) for module in own}:
            asked = [module["parameter_retention"] for module in own if len(module["labels"]) == size]
            masks[size], _ = magnitude_masks(model, config, size, parameters * sum(asked) / len(asked))
        return {
            "accuracy": self._accuracy(model),
            **mask_figures(model, masks[1]),
            **self._modules(modules, model, masks.__getitem__),
        }

    def _modules(
        self, modules: Modules, model: PreTrainedModel, masks_of_size: Callable[[int], ModuleMasks]
    ) -> dict[str, Any]:
        """Everything about the modules of a model, whose masks may depend on the number of labels."""
        gates = self.spec["gates"]

        def cut(labels: Sequence[int], kind: str) -> PreTrainedModel:
            return extract_module(model, masks_of_size(len(labels)), labels, kind)

        figures = {"modules": modules.cut(cut, gates), "latencies": modules.latencies(cut, gates[0])}
        if self.spec["finetune_epochs"]:
            rate = self.row.learning_rate / 10
            changed = {"num_train_epochs": self.spec["finetune_epochs"], "learning_rate": rate, "save_strategy": "no"}
            arguments = TrainingArguments(**{**self._training_arguments(), **changed})
            figures["finetuned"] = modules.finetuned(cut, gates[0], arguments, self._optimizer(rate))
        return figures

    def _accuracy(self, model: PreTrainedModel) -> float:
        logits = all_logits(model, self.task.batches(self.task.test, EVAL_BATCH))
        return (logits.argmax(-1) == self.task.labels).float().mean().item()


def mask_figures(model: PreTrainedModel, masks: ModuleMasks) -> dict[str, float]:
    """Size and likeness of the masks of single labels; overlap is the mean over pairs of their modules."""
    overlap = module_overlap(model, masks, [[label] for label in masks.labels])
    pairs = torch.ones_like(overlap, dtype=torch.bool).triu(1)
    return {
        "neuron_retention": masks.retention(),
        "coupling": masks.coupling(),
        "overlap": overlap[pairs].mean().item(),
    }


def peak_memory() -> int:
    """Bytes: the most that this process has held, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_json(file: Path, value: Any) -> None:
    """Written whole or not at all."""
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    scratch.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds spec.json; the results go there")
    parser.add_argument("--dataset", required=True, help="name of the data set, or a folder")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="stop after so many seconds")
    args = parser.parse_args()
    deadline = time.monotonic() + args.time_limit
    lock = (args.folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
    except BlockingIOError:
        print("Another process is at this run.")
        sys.exit(UNFINISHED)
    run = Run(args.folder, args.dataset, deadline)
    training: dict[str, Any] = {}
    try:
        if run.spec["kind"] in ("plain", "modular"):
            training = run.train()
        if time.monotonic() > run.deadline:
            raise Unfinished
    except Unfinished:
        sys.exit(UNFINISHED)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"processor, {torch.get_num_threads()} thread(s)"
    result = {
        "spec": run.spec,
        "modular_config": run._config().to_dict() if run.spec["kind"] == "modular" else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": device,
        "training": training,
        **run.measure(),
    }
    write_json(args.folder / "result.json", result)


if __name__ == "__main__":
    main()
