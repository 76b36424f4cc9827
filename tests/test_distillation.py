# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""DeiT with a teacher: the loss of METHOD.md 3."""

import pytest
import torch
from models import DEIT_TEACHER, VIT, Samples, arguments
from torch import nn

from nemo_hf import ModularConfig, ModularTrainer, NemoValueError


TERMS = ("loss_task", "loss_contrastive", "loss_compactness")


def trainer_of(output_dir, teacher=None, **options):
    return ModularTrainer(
        DEIT_TEACHER.model(),
        arguments(output_dir, **options),
        train_dataset=Samples(DEIT_TEACHER),
        eval_dataset=Samples(DEIT_TEACHER, 12, seed=1),
        modular_config=ModularConfig(generator_init="paper"),
        teacher_model=teacher,
    )


def test_the_task_loss_is_that_of_the_method(tmp_path):
    teacher = VIT.model(seed=5).train()
    trainer = trainer_of(tmp_path, teacher)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    batch = Samples(DEIT_TEACHER).batch(*range(8))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    observed = trainer._averages["train"].drain()

    assert loss.requires_grad
    target = teacher(pixel_values=batch["pixel_values"]).logits.softmax(-1)
    task = 0.5 * nn.functional.cross_entropy(outputs.cls_logits, batch["labels"])
    for logits in (outputs.cls_logits, outputs.distillation_logits):
        divergence = (target * (target.log() - logits.log_softmax(-1))).sum(-1).mean()
        task = task + 0.25 * divergence
    assert observed["loss_task"] == pytest.approx(task.item(), abs=1e-5)
    assert loss.item() == pytest.approx(sum(observed[name] for name in TERMS), abs=1e-5)


def test_it_trains_both_heads_and_evaluates(tmp_path):
    trainer = trainer_of(tmp_path, VIT.model(seed=5), max_steps=4)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in TERMS), abs=1e-4)
    for name, parameter in trainer.model.named_parameters():
        if "classifier" in name or ".mask_generator." in name:
            assert not torch.equal(parameter, before[name]), name
    result = trainer.evaluate()
    data = trainer.eval_dataset.columns
    with torch.no_grad():
        logits = trainer.model(pixel_values=data["pixel_values"]).logits
    assert result["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, data["labels"]).item(), abs=1e-4)
    assert {"eval_neuron_retention", "eval_cohesion", "eval_coupling"} < set(result)


def test_without_a_teacher_it_evaluates_and_predicts_but_does_not_train(tmp_path):
    trainer = trainer_of(tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(Samples(DEIT_TEACHER, 6, labelled=False)).label_ids is None
    assert trainer.collect_statistics().num_samples.sum() == 24
    with pytest.raises(NemoValueError, match=r"learns from a teacher: pass ModularTrainer\(..., teacher_model="):
        trainer.train()


def test_predictions_can_be_measured(tmp_path):
    def accuracy(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}

    trainer = trainer_of(tmp_path)
    trainer.compute_metrics = accuracy
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
