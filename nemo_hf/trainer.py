# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`ModularTrainer`]: the Trainer of transformers with the terms that make a model modular."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from . import distributed
from .auto import AutoModularModel
from .checkpoints import resumable_checkpoint, writing_checkpoint
from .config import ModularConfig
from .errors import NemoRuntimeError, NemoValueError
from .groups import check_group_column, check_groups, group_names
from .labels import as_membership, check_labels
from .layers import MaskedConv2d
from .masking import ensure_masks, is_masked, masked_layers, mix_gates, modular_config, record_masks, same_masks
from .model_card import check_card, shown_source, write_modular_card
from .objectives import CompactnessLoss, distilled_outputs, make_objective, of_micro_batch
from .sampler import balanced_sampler, check_sampling
from .schedules import ModularSchedule
from .statistics import NeuronStatistics, collect_statistics, warn_of_left_statistics
from .term_averages import TermAverages
from .training_args import ModularTrainingArguments


logger = logging.get_logger(__name__)

TEACHER_CLASS_SUFFIX = "WithTeacher"
MOST_MIXED = 10  # samples that share their gates in training
# Gates of convolutions need larger steps than those of linear layers: see docs/benchmarks.md.
CONVOLUTION_RATE = 5.0


class ModularTrainer(Trainer):
    """
    Trains a classifier so that every class ends up with its own few neurons.

    A `transformers.Trainer` in every other respect; the model gets its masks when the trainer is made, unless it has
    them.

    Args:
        model (`PreTrainedModel`, *optional*): the classifier, plain or modular.
        args ([`ModularTrainingArguments`], *optional*): the arguments.
        trainer_args, trainer_kwargs: the other arguments of `transformers.Trainer`, in its order.
        modular_config ([`ModularConfig`], *optional*): which layers are masked, and how. Defaults to that of a model
            that has masks, or else to what the arguments need ([`~ModularTrainingArguments.complete`]).
        teacher_model (`nn.Module`, *optional*): for `DeiTForImageClassificationWithTeacher`: a classifier of the same
            inputs whose `logits` are distilled.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for arguments that do not go together.

    Example:

    ```python
    >>> args = ModularTrainingArguments("modular-vit", num_train_epochs=8)
    >>> trainer = ModularTrainer(model, args, train_dataset=train, eval_dataset=test, modular_config=ModularConfig())
    >>> trainer.train()
    >>> masks = trainer.collect_statistics(train).module_masks()
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: ModularTrainingArguments | None = None,
        *trainer_args: Any,
        modular_config: ModularConfig | None = None,
        teacher_model: nn.Module | None = None,
        **trainer_kwargs: Any,
    ):
        args = ModularTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, ModularTrainingArguments):
            raise NemoValueError(f"ModularTrainer needs ModularTrainingArguments, got {type(args).__name__}.")
        if args.n_gpu > 1:
            raise NemoValueError(
                "nn.DataParallel would silently train no masks. Start one process per GPU with `accelerate launch` "
                "or `torchrun`, or show a single GPU (`CUDA_VISIBLE_DEVICES=0`)."
            )
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise NemoValueError(
                "Reentrant checkpointing runs the forward pass without gradients, so that masks would silently not be "
                'trained. Set activation_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if not isinstance(modular_config, ModularConfig | None):
            raise NemoValueError(f"modular_config must be a ModularConfig, got {type(modular_config).__name__}.")
        has_masks = model is not None and is_masked(model)
        self.modular_config = modular_config if has_masks else args.complete(modular_config)
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        check_sampling(self.train_dataset, args)
        if args.group_column is not None:
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for dataset in (self.train_dataset, *several.values()):
                if dataset is not None:
                    check_group_column(dataset, args.group_column)
        # A per-batch mean: the Trainer divides by the number of accumulation steps.
        self.loss_is_scaled_for_ga = False
        if self.compute_loss_func is not None:
            self.compute_loss_func = of_micro_batch(self.compute_loss_func)
        if self.model_init is None:  # after the Trainer has set the seed, so that the generators are reproducible
            ensure_masks(self.model, self.modular_config)
        self._set_up_objective()
        self._set_up_teacher(teacher_model)
        if not any(isinstance(callback, ModularSchedule) for callback in self.callback_handler.callbacks):
            self.add_callback(ModularSchedule())
        self._averages = {"train": TermAverages(), "eval": TermAverages()}
        self._trained_since_statistics = False

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        return ensure_masks(super().call_model_init(trial), self.modular_config)

    def _set_up_objective(self) -> None:
        args, config = self.args, modular_config(self.model)
        args.check_masks(config)
        self.modular_objective = make_objective(args.objective, args.alpha, args.beta, args.temperature)
        self.compactness = CompactnessLoss(args.compactness, args.target_retention, config.gate == "activation")

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._set_up_objective()  # a trial may have changed their weights

    def _set_up_teacher(self, teacher: nn.Module | None) -> None:
        """`DeiT…WithTeacher` takes no labels and returns no loss: the trainer computes it."""
        self.teacher_model = teacher
        self._has_distillation_head = type(self.model).__name__.endswith(TEACHER_CLASS_SUFFIX)
        if teacher is not None:
            if not self._has_distillation_head:
                raise NemoValueError(
                    "teacher_model is for models with a distillation head (DeiTForImageClassificationWithTeacher), "
                    f"not for {type(self.model).__name__}."
                )
            self.teacher_model = teacher.requires_grad_(False).eval().to(self.args.device)
        if self._has_distillation_head and self.args.label_names is None:
            self.label_names = ["labels"]

    # ---- Batches, labels and groups ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.samples_per_label is None:
            return super()._get_train_sampler(train_dataset)
        data = self.train_dataset if train_dataset is None else train_dataset
        return balanced_sampler(data, self.args, self._train_batch_size, epoch=lambda: int(self.state.epoch or 0))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.group_column is not None and self.args.group_column not in self._signature_columns:
            self._signature_columns.append(self.args.group_column)

    def _organised_by(self, inputs: Mapping[str, Any], phase: str) -> torch.Tensor:
        """What the modular terms compare: groups, or else labels. Ids, or booleans where samples have several."""
        if self.args.group_column is not None:
            return check_groups(inputs, self.args.group_column)
        labels = inputs.get("labels")
        if labels is None:
            raise NemoValueError(
                f"A modular objective compares the gates of samples by label, but the batch has no labels, only "
                f"{', '.join(inputs)}. Name the column `labels` (or `label`, with the default collator)."
            )
        # Reading values waits for the device: there only after a log, which waits anyway.
        if labels.device.type == "cpu" or not self._averages[phase]:
            check_labels(labels, self.model.config)
        return as_membership(labels)

    def _without_groups(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name != self.args.group_column}

    # ---- Loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The task loss of transformers, in training plus the modular terms; in evaluation these are only measured."""
        phase = "train" if model.training else "eval"
        classes = self._organised_by(inputs, phase)
        inputs = self._without_groups(inputs)
        multi_label = classes.dim() > 1 or self.model.config.problem_type == "multi_label_classification"
        if multi_label and "labels" in inputs and self.compute_loss_func is None:
            inputs["labels"] = inputs["labels"].float()  # the multi-label loss of transformers takes no integers
        masked = self._unwrapped(model)
        mixing_ratio = self.args.gate_mixing_ratio if model.training else 0.0
        most = MOST_MIXED if self.args.group_column is not None else min(MOST_MIXED, masked.config.num_labels)
        with record_masks(masked) as masks, mix_gates(masked, mixing_ratio, most):
            # Without the number of items the task loss is a mean over this batch, like the other terms.
            if self._has_distillation_head and self.compute_loss_func is None and self.label_smoother is None:
                task_loss, outputs = distilled_outputs(model, inputs, self.teacher_model)
            else:
                task_loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        self._check_gradient(model, masks)
        terms = self._modular_terms(model, masks, classes)
        weight = len(classes) if model.training else distributed.real_samples(self.accelerator, len(classes))
        shown = None if model.training else classes
        self._averages[phase].add({"loss_task": task_loss, **terms}, masks, weight, shown)
        loss = task_loss
        if model.training:
            loss = distributed.of_own_samples(self.accelerator, task_loss, len(classes)) + sum(terms.values())
        return (loss, outputs) if return_outputs else loss

    def _modular_terms(
        self, model: nn.Module, masks: Mapping[str, torch.Tensor], classes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """In training over the samples of all processes, and warming up."""
        several = model.training and self.accelerator.num_processes > 1
        if several:
            masks, classes = distributed.global_batch(self.accelerator, masks, classes)
        terms = {**self.modular_objective(masks, classes), **self.compactness(masks, classes)}
        if several:
            terms = {name: distributed.of_all_processes(self.accelerator, term) for name, term in terms.items()}
        if not model.training:
            return terms
        schedules = [ModularSchedule(), *self.callback_handler.callbacks]  # the last one counts
        schedule = next(callback for callback in reversed(schedules) if isinstance(callback, ModularSchedule))
        return {name: schedule.factor(name) * term for name, term in terms.items()}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Without labels there is no loss: the model is called with all of the batch, but for the groups."""
        if any(inputs.get(name) is None for name in self.label_names):
            inputs = self._without_groups(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _check_gradient(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        if not model.training or any(gates.requires_grad for gates in masks.values()):
            return
        recorded = masked_layers(model).values() if self.compactness.activations else ()
        if self._generator_rates(model) or any(p.requires_grad for layer in recorded for p in layer.parameters()):
            raise NemoRuntimeError(
                "The recorded gates carry no gradient, so the masks would silently not be trained. This is what "
                "reentrant checkpointing does: enable it with use_reentrant=False."
            )

    # ---- Logging ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the terms to a training log; those of an evaluation are among its metrics already."""
        if "loss" in logs:
            if not self._averages["train"]:
                logger.warning(
                    "No modular term was computed since the last log: masks are not trained. A `compute_loss` of your "
                    "own must call `super().compute_loss`; for another task loss pass `compute_loss_func`."
                )
            logs = {**logs, **self._averages["train"].drain()}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the modular terms, `neuron_retention` and the mean batch cohesion and coupling to the metrics."""
        self._averages["eval"] = TermAverages()
        output = super().evaluation_loop(distributed.fill_up_last_batches(dataloader), description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update(self._averages["eval"].drain(f"{prefix}_"))
        return output

    # ---- Optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of transformers, with groups for the generators that have another learning rate."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        opt_model = self.model if model is None else model
        rates = self._generator_rates(opt_model)
        if given:
            if set(rates) - {p for group in optimizer.param_groups for p in group["params"]}:
                raise NemoValueError(
                    "The given optimizer does not hold the mask generators, which would stay untrained. Call "
                    "`apply_masks(model, config)` before making the optimizer."
                )
            return optimizer
        for group in list(optimizer.param_groups):
            options = {name: value for name, value in group.items() if name != "params"}
            for rate in sorted({rates.get(p, group["lr"]) for p in group["params"]} - {group["lr"]}):
                ours = [p for p in group["params"] if rates.get(p) == rate]
                group["params"] = [p for p in group["params"] if rates.get(p) != rate]
                optimizer.add_param_group({**options, "params": ours, "lr": rate})
        return optimizer

    def _generator_rates(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """The learning rate of every parameter of the generators."""
        rates = {}
        for layer in masked_layers(model).values():
            if layer.mask_generator is None:
                continue
            factor = CONVOLUTION_RATE if isinstance(layer, MaskedConv2d) else 1.0
            rate = self.args.mask_learning_rate
            rate = factor * self.args.learning_rate if rate is None else rate
            rates.update((p, rate) for p in layer.mask_generator.parameters() if p.requires_grad)
        return rates

    # ---- Statistics ----

    def collect_statistics(
        self, dataset: Dataset | None = None, reservoir_samples: int | None = 200
    ) -> NeuronStatistics:
        """
        Count the open gates per label and neuron, in one pass in evaluation mode; per group if `args.group_column` is
        given. Groups have the names of the dataset's `ClassLabel` feature, or else are the integers found.

        Args:
            dataset (`Dataset`, *optional*): samples with labels, or groups, without augmentation. Defaults to the
                training set.
            reservoir_samples (`int`, *optional*, defaults to 200): samples per label that the cohesion is computed
                over; `None` keeps all.

        Returns:
            [`NeuronStatistics`]: the counts; `save_pretrained(folder)` keeps them beside the checkpoint.
        """
        dataset = self.train_dataset if dataset is None else dataset
        if dataset is None:
            raise NemoValueError("collect_statistics needs a dataset: there is no training set to default to.")
        column = self.args.group_column
        args, self.args = self.args, copy.copy(self.args)
        self.args.dataloader_drop_last = False  # every sample counts
        try:
            dataloader = self.get_test_dataloader(dataset)  # not a cached one of evaluation
        finally:
            self.args = args
        self._trained_since_statistics = False
        return collect_statistics(
            self._unwrapped(self.model),
            distributed.fill_up_last_batches(dataloader),
            labels_name="labels" if column is None else column,
            names=None if column is None else group_names(dataset, column),
            gather=self.accelerator.gather_for_metrics if self.accelerator.num_processes > 1 else None,
            seed=self.args.seed,
            disable_tqdm=self.args.disable_tqdm,
            reservoir_samples=reservoir_samples,
        )

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """That of transformers; `resume_from_checkpoint=True` takes the last checkpoint that was written whole."""
        self._trained_since_statistics = True
        return super().train(resumable_checkpoint(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """That of transformers. Warns of statistics in the folder that were collected before the training."""
        super().save_model(output_dir, *args, **kwargs)
        if self._trained_since_statistics and self.is_world_process_zero():
            warn_of_left_statistics(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing_checkpoint(self, trial):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Checkpoints of ViT and others carry other names than the live parameters, which the `Trainer` reads the file
        # by, not strictly: it restores almost nothing (transformers 5.23).
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            logger.info(f"Loading the best model from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, checkpoint: str) -> None:
        model = self._unwrapped(self.model)
        saved = AutoModularModel.from_pretrained(checkpoint, dtype=model.dtype)
        if not same_masks(saved, model):
            own = modular_config(model)
            raise NemoValueError(f"{checkpoint} has other masks, {modular_config(saved)}, than the model, {own}.")
        model.load_state_dict(saved.state_dict(), strict=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of transformers with what a modular model is, how it loads and what it measured."""
        check_card(self.args.output_dir)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            model, folder = self._unwrapped(self.model), self.args.output_dir
            source = self.hub_model_id or shown_source(folder)
            write_modular_card(folder, model, self.state.log_history, self.args.modular_arguments(), source)
