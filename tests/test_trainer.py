# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""ModularTrainer: the loss, its terms in the log, evaluation, prediction, the optimizer, bad input."""

import logging

import pytest
import torch
from models import BERT, LABELS, RESNET, VIT, Samples, arguments, over_two_models
from torch import nn
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from nemo_hf import (
    ModularConfig,
    ModularSchedule,
    ModularTrainer,
    ModularTrainingArguments,
    NemoRuntimeError,
    NemoValueError,
    apply_masks,
    hold_gates,
    metrics,
    record_masks,
)
from nemo_hf.gating import draw_mixture
from nemo_hf.masking import mask_state, mix_gates
from nemo_hf.objectives import OBJECTIVE_DEFAULTS, CompactnessLoss, ContrastiveLoss


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TERMS = ("loss_task", "loss_contrastive", "loss_compactness")
PAIR_TERMS = ("loss_task", "loss_cohesion", "loss_coupling", "loss_compactness")


def trainer_of(case, output_dir, model=None, **options):
    names = ("modular_config", "teacher_model", "callbacks", "data_collator", "optimizers", "compute_loss_func")
    own = {name: options.pop(name) for name in names if name in options}
    data = {"train_dataset": Samples(case), "eval_dataset": Samples(case, 13, seed=1)}
    model = case.model(**NO_DROPOUT) if model is None else model
    return ModularTrainer(model, arguments(output_dir, **options), **data, **own)


def training_logs(trainer):
    return [logs for logs in trainer.state.log_history if "loss" in logs]


@over_two_models
@pytest.mark.parametrize(
    ("objective", "terms"),
    [("contrastive", TERMS), ("nemo", TERMS), ("mwt", PAIR_TERMS), ("moda", PAIR_TERMS)],
    ids=["contrastive", "nemo", "mwt", "moda"],
)
def test_terms_are_logged_and_add_up_to_the_loss(case, objective, terms, tmp_path):
    options = {"alpha": 0.7, "compactness": 0.5, "max_steps": 4, "logging_steps": 2}
    trainer = trainer_of(case, tmp_path, objective=objective, **options)
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 2
    for entry in logs:
        assert all(entry[name] > 0 for name in terms)
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in terms), abs=1e-4)
        assert 0 < entry["neuron_retention"] <= 1


@over_two_models
def test_the_loss_is_the_task_loss_plus_the_terms(case, tmp_path):
    options = {"alpha": 0.7, "compactness": 0.5, "target_retention": 0.2, "gate_mixing_ratio": 0.0}
    trainer = trainer_of(case, tmp_path, **options)
    batch = Samples(case).batch(*range(8))
    model = trainer.model.train()
    with record_masks(model) as gates:
        outputs = model(**batch)
    task = nn.functional.cross_entropy(outputs.logits, batch["labels"])
    terms = ContrastiveLoss(0.7, 0.2)(gates, batch["labels"]) | CompactnessLoss(0.5, 0.2)(gates, None)
    expected = task + sum(terms.values())
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected, atol=1e-6, rtol=1e-6)
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), task, atol=1e-6, rtol=1e-6)


def test_the_modular_terms_warm_up_with_the_steps(tmp_path):
    """Nothing is learnt, so that the terms of both runs are the same but for their weights."""
    logs = {}
    for ratio in (0.0, 0.75):
        model = VIT.model(**NO_DROPOUT)
        trainer = trainer_of(VIT, tmp_path, model, modular_warmup_ratio=ratio, max_steps=4, learning_rate=0.0)
        trainer.train()
        logs[ratio] = training_logs(trainer)
        evaluated = trainer.evaluate()
        logs[ratio].append({name: evaluated[f"eval_{name}"] for name in TERMS})  # of full weight
    for share, warm, full in zip((1 / 3, 2 / 3, 1, 1, 1), logs[0.75], logs[0.0], strict=True):
        assert warm["loss_task"] == pytest.approx(full["loss_task"], rel=1e-5)
        for name in ("loss_contrastive", "loss_compactness"):
            assert full[name] > 0
            assert warm[name] == pytest.approx(share * full[name], rel=1e-4)


def test_a_schedule_replaces_the_warm_up_of_its_weights(tmp_path):
    """Nothing is learnt, so that the terms of both runs are the same but for their weights."""
    logs = {}
    for schedule in (None, ModularSchedule(compactness=lambda progress: progress**2)):
        options = {"modular_warmup_ratio": 0.5, "max_steps": 4, "learning_rate": 0.0}
        trainer = trainer_of(VIT, tmp_path, VIT.model(**NO_DROPOUT), callbacks=schedule and [schedule], **options)
        trainer.train()
        logs[schedule is None] = training_logs(trainer)
    for step, (given, default) in enumerate(zip(logs[False], logs[True], strict=True), start=1):
        assert given["loss_contrastive"] == pytest.approx(default["loss_contrastive"], rel=1e-5)
        warmth = min(1, step / 2)
        assert given["loss_compactness"] * warmth == pytest.approx(
            default["loss_compactness"] * (step / 4) ** 2, rel=1e-4
        )
    with pytest.raises(NemoValueError, match=r"functions of the progress for alpha, beta, compactness; got gamma="):
        ModularSchedule(gamma=lambda progress: 1.0)
    with pytest.raises(NemoValueError, match=r"got alpha=0.5"):
        ModularSchedule(alpha=0.5)


def test_generators_of_convolutions_learn_faster(tmp_path):
    def rates(**options):
        model = RESNET.model()
        optimizer = trainer_of(RESNET, tmp_path, model, learning_rate=1e-3, **options).create_optimizer()
        rate_of = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rate_of) == len(list(model.parameters()))
        generators = {rate_of[p] for name, p in model.named_parameters() if ".mask_generator." in name}
        return generators, {rate_of[p] for name, p in model.named_parameters() if ".mask_generator." not in name}

    assert rates() == ({5e-3}, {1e-3})
    assert rates(mask_learning_rate=2e-3) == ({2e-3}, {1e-3})


def test_moda_needs_activations_as_gates(tmp_path):
    trainer = trainer_of(VIT, tmp_path, objective="moda")
    assert trainer.modular_config.gate == "activation"
    assert not [name for name, _ in trainer.model.named_parameters() if "mask_generator" in name]
    with pytest.raises(
        NemoValueError, match=r"have gate='soft'.*ModularConfig\(gate='activation'\), or objective='mwt'"
    ):
        trainer_of(VIT, tmp_path, objective="moda", modular_config=ModularConfig())
    with pytest.raises(NemoValueError, match="gate='soft'"):
        trainer_of(VIT, tmp_path, apply_masks(VIT.model()), objective="moda")


@pytest.mark.parametrize("case", [VIT, BERT, RESNET], ids=str)
def test_samples_that_share_their_gates_see_the_mean_of_them(case):
    """The same as holding constant, sample by sample, the mean gates of those that share."""
    model = apply_masks(case.model().eval(), ModularConfig(generator_init="paper"))
    batch = Samples(case, 6).batch(*range(6))
    with record_masks(model) as own:
        outputs = model(**batch)
    torch.manual_seed(0)
    with record_masks(model) as masks, mix_gates(model, ratio=0.7, largest=4):
        mixed = model(**batch)
    mixture = mask_state(model).mixture
    first = next(iter(own))
    torch.testing.assert_close(masks[first], own[first])  # what is recorded is not mixed
    torch.testing.assert_close(mixture.sum(1), torch.ones(6))
    numbers = (mixture > 0).sum(1)
    assert ((numbers >= 1) & (numbers <= 4)).all()
    assert sorted((numbers > 1).unique().tolist()) == [False, True]
    assert (mixture.diagonal() == 1 / numbers).all()
    shared = numbers > 1
    assert ((mixed.logits - outputs.logits).abs().amax(1) > 1e-5)[shared].all()
    with torch.no_grad():  # gates of later layers depend on mixed outputs: take those that the mixed pass recorded
        for i in range(6):
            held = {name: mixture[i] @ gates for name, gates in masks.items()}
            with hold_gates(model, held):
                torch.testing.assert_close(model(**batch).logits[i], mixed.logits[i], atol=1e-5, rtol=1e-4)
    with record_masks(model):
        torch.testing.assert_close(model(**batch).logits, outputs.logits)


def test_a_hyperparameter_search_and_removed_schedules_leave_the_objective_alone(tmp_path):
    """During a search transformers keeps its metric in `trainer.objective`."""
    trainer = trainer_of(VIT, tmp_path)
    trainer.objective = 0.5
    trainer.remove_callback(ModularSchedule)
    trainer.train()
    assert training_logs(trainer)[-1]["loss_contrastive"] > 0


def test_gates_are_shared_in_training_only(tmp_path):
    mixtures = []
    model = apply_masks(VIT.model())
    model.vit.layers[1].register_forward_hook(
        lambda layer, *_: mixtures.append((layer.training, mask_state(model).mixture))
    )
    trainer = trainer_of(VIT, tmp_path, model, gate_mixing_ratio=1.0, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.collect_statistics()
    assert {(training, mixture is None) for training, mixture in mixtures} == {(True, False), (False, True)}
    assert all((mixture > 0).sum(1).max() <= len(LABELS) for training, mixture in mixtures if training)
    assert mask_state(model).mixing is None
    assert draw_mixture(1, 1.0, 10, torch.device("cpu")).tolist() == [[1.0]]


@over_two_models
@torch.no_grad()
def test_evaluation_reports_the_task_loss_and_the_modular_metrics(case, tmp_path):
    trainer = trainer_of(case, tmp_path)
    result = trainer.evaluate()
    data = trainer.eval_dataset.columns
    expected, cohesions, couplings, opened = [], [], [], []
    for batch in (trainer.eval_dataset.batch(*range(8)), trainer.eval_dataset.batch(*range(8, 13))):
        with record_masks(trainer.model) as gates:
            expected.append(
                nn.functional.cross_entropy(trainer.model(**batch).logits, batch["labels"], reduction="sum")
            )
        is_open = torch.cat(list(gates.values()), 1) > 0
        opened.append(is_open.float().mean(1))
        if len(batch["labels"].unique()) < len(batch["labels"]):
            cohesions.append((metrics.cohesion(is_open, batch["labels"]).item(), len(is_open)))
        masks = metrics.class_masks(is_open, batch["labels"], 0.9)[1]
        couplings.append((metrics.coupling(masks).item(), len(is_open)))
    assert result["eval_loss"] == pytest.approx(sum(expected).item() / len(data["labels"]), abs=1e-4)
    assert result["eval_loss_task"] == pytest.approx(result["eval_loss"], abs=1e-4)
    assert result["eval_neuron_retention"] == pytest.approx(torch.cat(opened).mean().item(), abs=1e-5)
    for name, values in (("eval_cohesion", cohesions), ("eval_coupling", couplings)):
        mean = sum(value * size for value, size in values) / sum(size for _, size in values)
        assert result[name] == pytest.approx(mean, abs=1e-5)
    assert {f"eval_{name}" for name in TERMS} < set(result)


def test_an_evaluation_starts_from_nothing(tmp_path):
    trainer = trainer_of(VIT, tmp_path, modular_config=ModularConfig(generator_init="paper"))
    expected = trainer.evaluate()
    trainer.model.eval()
    trainer.compute_loss(trainer.model, Samples(VIT, seed=9).batch(0, 5, 10, 15))  # an evaluation that broke off
    again = trainer.evaluate()
    for name in ("eval_loss_task", "eval_loss_contrastive", "eval_cohesion", "eval_coupling"):
        assert again[name] == expected[name]


def test_evaluation_of_several_datasets_keeps_them_apart(tmp_path):
    trainer = trainer_of(VIT, tmp_path)
    first, second = Samples(VIT, 8, seed=2), Samples(VIT, 16, seed=3)
    trainer.evaluate(second)
    together = trainer.evaluate({"a": first, "b": second})
    for name, data in (("a", first), ("b", second)):
        alone = trainer.evaluate(data)
        for key in ("loss", "loss_contrastive", "neuron_retention", "cohesion", "coupling"):
            assert together[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], abs=1e-6)


def test_evaluations_during_training_reach_the_log_and_leave_its_terms_alone(tmp_path):
    trainer = trainer_of(
        VIT, tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=3, metric_for_best_model="coupling"
    )
    trainer.train()
    evaluations = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert len(evaluations) == 3
    assert all("eval_neuron_retention" in logs and "eval_cohesion" in logs for logs in evaluations)
    (logs,) = training_logs(trainer)
    assert logs["loss"] == pytest.approx(sum(logs[name] for name in TERMS), abs=1e-4)
    assert trainer.state.best_metric == min(logs["eval_coupling"] for logs in evaluations)


@over_two_models
@torch.no_grad()
def test_predict_with_and_without_labels(case, tmp_path):
    trainer = trainer_of(case, tmp_path)
    with_labels = trainer.predict(Samples(case, 13, seed=1))
    without = trainer.predict(Samples(case, 13, seed=1, labelled=False))
    assert (with_labels.predictions == without.predictions).all()
    assert with_labels.predictions.shape == (13, 5)
    assert without.label_ids is None
    assert {"test_loss", "test_neuron_retention", "test_cohesion"} < set(with_labels.metrics)
    assert "test_neuron_retention" not in without.metrics


@over_two_models
def test_generators_have_their_own_learning_rate(case, tmp_path):
    trainer = trainer_of(case, tmp_path, mask_learning_rate=0.5, learning_rate=0.25, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    of_groups = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in of_groups) == sorted(names.values())  # each once
    for name, group in of_groups:
        assert group["lr"] == (0.5 if ".mask_generator." in name else 0.25)
        is_free = name.endswith("bias") or "norm" in name.lower()
        assert group["weight_decay"] == (0.0 if is_free else 0.1)


def test_without_an_own_learning_rate_generators_share_the_groups(tmp_path):
    trainer = trainer_of(VIT, tmp_path)
    optimizer = trainer.create_optimizer()
    assert len(optimizer.param_groups) == 2
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.model.parameters()))


def test_a_given_optimizer_must_hold_the_generators(tmp_path):
    model = VIT.model()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NemoValueError, match="does not hold the mask generators.*Call .apply_masks"):
        trainer_of(VIT, tmp_path, model=model, optimizers=(early, None)).train()
    model = apply_masks(VIT.model())
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_of(VIT, tmp_path, model=model, optimizers=(late, None))
    trainer.train()
    assert training_logs(trainer)[-1]["learning_rate"] < 0.1


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.values = {}

    def on_pre_optimizer_step(self, _args, state, _control, model=None, **_):
        if state.global_step == 0:
            self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@over_two_models
def test_gradient_accumulation_averages_over_batches(case, tmp_path):
    batches, gradients = [], Gradients()

    def collate(rows):
        batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return batches[-1]

    objective = {"alpha": 0.7, "gate_mixing_ratio": 0.0}
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, **objective}
    model = apply_masks(case.model(**NO_DROPOUT), ModularConfig(generator_init="paper"))
    reference = trainer_of(case, tmp_path, model=apply_masks(case.model(**NO_DROPOUT), ModularConfig()), **objective)
    reference.model.load_state_dict(model.state_dict())
    trainer = trainer_of(case, tmp_path, model, max_steps=1, data_collator=collate, callbacks=[gradients], **options)
    trainer.train()

    reference.model.train()
    losses = [reference.compute_loss(reference.model, dict(batch)) for batch in batches[:2]]
    (sum(losses) / 2).backward()
    logs = training_logs(trainer)[0]
    assert logs["loss"] == pytest.approx(sum(losses).item() / 2, abs=1e-4)
    assert logs["loss"] == pytest.approx(sum(logs[name] for name in TERMS), abs=1e-4)
    expected = reference._averages["train"].drain()
    assert logs["loss_task"] == pytest.approx(expected["loss_task"], abs=1e-5)
    assert len(gradients.values) == len(list(model.parameters()))
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(gradients.values[name], parameter.grad, atol=1e-5, rtol=1e-4)


@over_two_models
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(case, tmp_path):
    results = []
    for checkpointing in (False, True):
        gradients = Gradients()
        options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
        model = case.masked()
        trainer = trainer_of(case, tmp_path, model, callbacks=[gradients], **(options if checkpointing else {}))
        trainer.train()
        assert model.is_activation_checkpointing is checkpointing
        results.append((training_logs(trainer), gradients.values))
    for plain, recomputed in zip(results[0][0], results[1][0], strict=True):
        for name in ("loss", *TERMS, "neuron_retention"):
            assert recomputed[name] == pytest.approx(plain[name], abs=1e-4)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kwargs_name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_reentrant_checkpointing_is_refused(kwargs_name, tmp_path):
    options = {"activation_checkpointing": True, kwargs_name: {"use_reentrant": True}}
    with pytest.raises(NemoValueError, match="Reentrant checkpointing runs the forward pass without gradients"):
        trainer_of(VIT, tmp_path, **options)
    trainer = trainer_of(VIT, tmp_path)
    trainer.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(NemoRuntimeError, match="gates carry no gradient.*use_reentrant=False"):
        trainer.train()


def test_frozen_generators_are_no_error(tmp_path):
    model = VIT.masked()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    trainer = trainer_of(VIT, tmp_path, model)
    trainer.train()
    assert len(training_logs(trainer)) == 3


@over_two_models
def test_label_smoothing_and_compute_loss_func_live_on(case, tmp_path):
    batch = Samples(case).batch(*range(8))
    model = case.masked().train()
    smoothed = trainer_of(case, tmp_path, model, label_smoothing_factor=0.2)
    model.eval()
    loss, outputs = smoothed.compute_loss(model, dict(batch), return_outputs=True)
    expected = nn.functional.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)

    def constant(outputs, labels, num_items_in_batch=None):
        assert torch.equal(labels, batch["labels"])
        assert num_items_in_batch == len(labels)
        return outputs["logits"].sum() * 0 + 7.0

    custom = trainer_of(case, tmp_path, model, compute_loss_func=constant)
    model.train()
    loss = custom.compute_loss(model, dict(batch))
    observed = custom._averages["train"].drain()
    assert observed["loss_task"] == 7.0
    assert loss.item() == pytest.approx(sum(observed[name] for name in TERMS), abs=1e-5)
    smoothed.train()
    assert all(logs["loss_contrastive"] > 0 for logs in training_logs(smoothed))


def test_a_compute_loss_that_leaves_out_the_modular_terms_is_noticed(tmp_path, caplog, monkeypatch):
    class Plain(ModularTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    Plain(VIT.model(), arguments(tmp_path, max_steps=1), train_dataset=Samples(VIT)).train()
    assert "masks are not trained" in caplog.text
    caplog.clear()
    trainer_of(VIT, tmp_path, max_steps=1).train()
    assert "masks are not trained" not in caplog.text


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("coupling", False),
        ("eval_neuron_retention", False),
        ("eval_test_loss_task", False),
        ("cohesion", True),
        ("accuracy", True),
    ],
)
def test_the_best_model_has_the_smallest_terms(metric, greater, tmp_path):
    args = arguments(tmp_path, metric_for_best_model=metric)
    assert args.greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better


@pytest.mark.parametrize("name", ["alpha", "temperature", "target_retention"])
def test_texts_are_no_weights(name, tmp_path):
    with pytest.raises(NemoValueError, match=f"{name} must be a number, got '0.1'"):
        arguments(tmp_path, **{name: "0.1"})


def test_statistics_count_every_sample(tmp_path):
    trainer = trainer_of(VIT, tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=30)
    statistics = trainer.collect_statistics()
    assert statistics.num_samples.sum() == len(trainer.train_dataset)
    assert len(trainer.train_dataset) % 30
    assert trainer.args.dataloader_drop_last


def test_statistics_of_other_weights_are_noticed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = trainer_of(VIT, tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.collect_statistics().save_pretrained(tmp_path)
    trainer.save_model()
    assert "was collected before" not in caplog.text
    trainer.train()
    trainer.save_model()
    assert "neuron_statistics.safetensors" in caplog.text
    assert "was collected before the weights beside it" in caplog.text


def test_samples_without_a_label_are_refused(tmp_path):
    data = [{**sample, "labels": torch.tensor(-100 if i == 3 else 1)} for i, sample in enumerate(Samples(VIT, 8))]
    args = arguments(tmp_path, per_device_train_batch_size=2, max_steps=4, logging_strategy="no")
    trainer = ModularTrainer(VIT.model(), args, train_dataset=data)
    with pytest.raises(NemoValueError, match="the batch has label -100, which stands for none"):
        trainer.train()


def test_a_batch_without_labels_is_refused_in_training(tmp_path):
    trainer = ModularTrainer(VIT.model(), arguments(tmp_path), train_dataset=Samples(VIT, labelled=False))
    with pytest.raises(ValueError, match="labels|did not return a loss"):
        trainer.train()


def test_other_arguments_and_other_configs_are_refused(tmp_path):
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(NemoValueError, match="needs ModularTrainingArguments, got TrainingArguments"):
        ModularTrainer(VIT.model(), plain)
    pattern = ModularConfig(target_modules=r".*fc1", generator_init="paper")
    assert trainer_of(VIT, tmp_path, VIT.masked(target_modules=r".*fc1"), modular_config=pattern)
    model = VIT.masked()
    with pytest.raises(NemoValueError, match="masked already, with another config: ModularConfig.*remove_masks"):
        trainer_of(VIT, tmp_path, model, modular_config=ModularConfig(target_modules="ffn"))
    with pytest.raises(NemoValueError, match="modular_config must be a ModularConfig, got dict"):
        trainer_of(VIT, tmp_path, modular_config={"gate": "hard"})
    trainer = trainer_of(VIT, tmp_path, model, modular_config=ModularConfig(generator_init="paper"))
    assert trainer.model is model
    with pytest.raises(NemoValueError, match="teacher_model is for models with a distillation head.*BertFor"):
        trainer_of(BERT, tmp_path, teacher_model=BERT.model())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"objective": "moe"}, "objective must be one of contrastive, nemo, mwt, moda, got 'moe'"),
        ({"beta": 1.0}, "beta=1.0 has no effect: objective='contrastive' has no such term"),
        ({"objective": "mwt", "beta": -1.0}, "beta must be a number from 0 up, got -1.0"),
        ({"alpha": -1.0}, "alpha must be a number from 0 up, got -1.0"),
        ({"compactness": float("nan")}, "compactness must be a number from 0 up, got nan"),
        ({"mask_learning_rate": -0.1}, "mask_learning_rate must be a number from 0 up"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"modular_warmup_ratio": 1.5}, r"must be in \[0, 1\], got 1.5"),
        ({"target_retention": -0.1}, r"must be in \[0, 1\], got -0.1"),
        ({"target_retention": 1.1}, r"must be in \[0, 1\], got 1.1"),
        ({"samples_per_label": 1}, "samples_per_label must be 2 or more, so that samples have partners, got 1"),
        (
            {"samples_per_label": 2, "train_sampling_strategy": "sequential"},
            "samples_per_label=2 and train_sampling_strategy='sequential' both choose the order",
        ),
        ({"samples_per_label": 2, "auto_find_batch_size": True}, "auto_find_batch_size tries batch sizes that"),
    ],
    ids=str,
)
def test_argument_values_are_checked(options, text, tmp_path):
    with pytest.raises(NemoValueError, match=text):
        arguments(tmp_path, **options)


def test_arguments_parse_from_the_command_line_and_have_help(tmp_path):
    own = {
        "objective": "mwt",
        "alpha": 0.25,
        "beta": 0.75,
        "temperature": 0.5,
        "compactness": 2.0,
        "target_retention": 0.3,
    }
    own |= {
        "mask_learning_rate": 0.01,
        "group_column": "domain",
        "modular_warmup_ratio": 0.75,
        "gate_mixing_ratio": 0.25,
        "samples_per_label": 4,
    }
    command = [part for name, value in own.items() for part in (f"--{name}", str(value))]
    parser = HfArgumentParser(ModularTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *command])
    assert {name: getattr(args, name) for name in own} == own
    fields = set(ModularTrainingArguments.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    assert fields == set(own)
    for name in fields:
        assert len(ModularTrainingArguments.__dataclass_fields__[name].metadata["help"]) > 10
    assert all(f"--{name}" in parser.format_help() for name in own)


@pytest.mark.parametrize("objective", OBJECTIVE_DEFAULTS)
def test_weights_default_to_those_of_the_objective(objective, tmp_path):
    args = arguments(tmp_path, objective=objective)
    found = {name: getattr(args, name) for name in OBJECTIVE_DEFAULTS[objective]}
    assert found == OBJECTIVE_DEFAULTS[objective]
    table = [line.split("|")[1:-1] for line in ModularTrainingArguments.__doc__.splitlines() if "|" in line]
    column = [cell.strip(' "`') for cell in table[0]].index(objective)
    documented = {cells[0].strip(" `"): cells[column].strip().replace("–", "0") for cells in table[3:]}
    assert {name: float(cell) for name, cell in documented.items() if name in found} == found


@over_two_models
def test_trainer_collects_statistics_over_the_training_set(case, tmp_path):
    trainer = trainer_of(case, tmp_path)
    trainer.train()
    statistics = trainer.collect_statistics()
    assert statistics.num_samples.tolist() == [5, 5, 5, 5, 4]
    assert trainer.collect_statistics(trainer.eval_dataset).num_samples.sum() == 13
    masks = statistics.module_masks(0.9)
    assert masks.labels == LABELS
    with pytest.raises(NemoValueError, match="needs a dataset: there is no training set"):
        ModularTrainer(case.model(), arguments(tmp_path)).collect_statistics()


@over_two_models
def test_bf16_training_keeps_terms_finite_and_weights_in_single_precision(case, tmp_path):
    trainer = trainer_of(case, tmp_path, bf16=True, mask_learning_rate=1e-2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if ".mask_generator." in name}
    trainer.train()
    for logs in training_logs(trainer):
        assert logs["loss"] == pytest.approx(sum(logs[name] for name in TERMS), abs=1e-3)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    changed = [
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert len(changed) == len(before)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(("case", "given", "ratio"), [(VIT, None, 0.75), (RESNET, None, 0.5), (RESNET, 0.25, 0.25)])
def test_the_share_of_mixed_gates_depends_on_the_kind_of_layers(case, given, ratio, tmp_path):
    trainer = trainer_of(case, tmp_path, gate_mixing_ratio=given, max_steps=1)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, _args: seen.append((model.training, mask_state(model).mixing))
    )
    trainer.train()
    trainer.evaluate()
    assert {mixing[0] for training, mixing in seen if training} == {ratio}
    assert {mixing for training, mixing in seen if not training} == {None}
