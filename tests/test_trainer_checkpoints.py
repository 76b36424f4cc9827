# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""ModularTrainer: resume, best model, model_init, saving, the card, the Hub."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from models import (
    BERT,
    VIT,
    Samples,
    arguments,
    assert_same_state,
    close,
    logits_of,
    over_models,
    over_two_models,
    state_copy,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from nemo_hf import (
    AutoModularModel,
    ModularConfig,
    ModularTrainer,
    NemoValueError,
    NeuronStatistics,
    constant_gates,
    extract_module,
    hold_gates,
    list_maskable_layers,
    record_masks,
)
from nemo_hf.masking import is_masked


PAPER = ModularConfig(generator_init="paper")


def train(case, output_dir, seed=0, resume=None, callbacks=None, compute_metrics=None, **options):
    trainer = ModularTrainer(
        case.model(seed),
        arguments(output_dir, **{"learning_rate": 1e-2, **options}),
        train_dataset=Samples(case),
        eval_dataset=Samples(case, 10, seed=1),
        modular_config=PAPER,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options", [{}, {"mask_learning_rate": 5e-2, "weight_decay": 0.1}], ids=["one rate", "two rates"]
)
@over_two_models
def test_a_resumed_training_is_bit_identical_to_an_uninterrupted_one(case, options, tmp_path):
    options |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}  # BERT has dropout: random states count
    whole = train(case, tmp_path / "whole", **options)
    resumed = train(case, tmp_path / "resumed", seed=7, resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert resumed.state.global_step == 6
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    logs = [[entry for entry in t.state.log_history if "loss" in entry][-1] for t in (whole, resumed)]
    for name in ("loss", "loss_task", "loss_contrastive", "loss_compactness", "neuron_retention"):
        assert logs[0][name] == logs[1][name]


class Snapshots(TrainerCallback):
    """Keeps the weights of every evaluation."""

    def __init__(self):
        self.states = []

    def on_evaluate(self, _args, _state, _control, model=None, **_):
        self.states.append(state_copy(model))


@over_two_models
def test_the_best_model_is_restored_at_the_end(case, tmp_path):
    scores, snapshots = iter([0.2, 0.9, 0.1]), Snapshots()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    metric = {"compute_metrics": lambda _: {"score": next(scores)}}
    trainer = train(case, tmp_path, callbacks=[snapshots], **metric, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert any(not torch.equal(snapshots.states[1][name], value) for name, value in snapshots.states[2].items())
    assert_same_state(trainer.model.state_dict(), snapshots.states[1])
    assert type(trainer.model) is case.model_class


@over_two_models
def test_model_init_is_masked_and_trained_afresh(case, tmp_path):
    made = []

    def model_init():
        made.append(case.model())
        return made[-1]

    states = []
    trainer = ModularTrainer(
        args=arguments(tmp_path, learning_rate=1e-2),
        model_init=model_init,
        train_dataset=Samples(case),
        modular_config=PAPER,
    )
    assert is_masked(trainer.model)
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        assert is_masked(trainer.model)
        states.append(state_copy(trainer.model))
    assert len(made) >= 2
    assert_same_state(states[0], states[1])
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in trainer.model.parameters()} == held


@over_models
@torch.no_grad()
def test_a_saved_model_and_its_statistics_are_enough_to_cut_modules_later(case, tmp_path):
    teacher = {"teacher_model": case.model(5)} if case.has_two_heads else {}
    config = ModularConfig(generator_init="paper", skip_first_blocks=0)
    data = Samples(case)
    trainer = ModularTrainer(case.model(), arguments(tmp_path), train_dataset=data, modular_config=config, **teacher)
    with torch.enable_grad():
        trainer.train()
    trainer.save_model(tmp_path / "parent")
    statistics = trainer.collect_statistics()
    statistics.save_pretrained(tmp_path / "parent")

    model = AutoModularModel.from_pretrained(tmp_path / "parent")
    assert type(model) is case.model_class
    inputs = case.inputs()
    with record_masks(model) as loaded, record_masks(trainer.model.eval()) as live:
        assert torch.equal(model(**inputs).logits, trainer.model(**inputs).logits)
    assert all(torch.equal(loaded[name], live[name]) for name in live)
    masks = NeuronStatistics.from_pretrained(tmp_path / "parent").module_masks()
    module = extract_module(model, masks, ["cat", "dog"])
    expected = extract_module(trainer.model, statistics.module_masks(), ["cat", "dog"])
    assert torch.equal(module(**inputs).logits, expected(**inputs).logits)
    held = constant_gates(model, masks, ["cat", "dog"], "mean")
    assert list(held) == list_maskable_layers(model)
    with hold_gates(model, held):
        close(logits_of(module(**inputs)), logits_of(model(**inputs))[..., [2, 3]])
    assert module.config.nemo["parent"]["name_or_path"] == str(tmp_path / "parent")


@over_two_models
def test_the_card_can_be_parsed_and_says_how_to_load(case, tmp_path):
    trainer = train(case, tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.create_model_card(tags="mine", dataset="some/data", model_name="Small one")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"nemo_hf", "mine"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert "AutoModularModel.from_pretrained" in card.text
    assert "eval_neuron_retention" in card.text
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").text.count("## Modular model") == 1


def test_push_to_hub_uploads_weights_config_and_card(tmp_path, monkeypatch):
    uploads, created = [], []

    def create_repo(_api, repo_id, **_options):
        created.append(repo_id)
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(_api, *, repo_id, folder_path, **_options):
        files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir() if file.is_file()}
        uploads.append((repo_id, files))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    trainer = train(
        BERT, tmp_path / "modular-bert", push_to_hub=True, hub_token="none", save_strategy="steps", save_steps=2
    )
    trainer.push_to_hub(tags="mine")
    assert created == ["modular-bert"]
    assert len(uploads) >= 2
    repo_id, files = uploads[-1]
    assert repo_id == "someone/modular-bert"
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)
    assert b'"kind": "modular"' in files["config.json"]
    assert "nemo_hf" in ModelCard(files["README.md"].decode()).data.tags
    AutoModularModel.from_pretrained(tmp_path / "modular-bert")


def test_early_stopping_works_on_modular_metrics(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    options |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "neuron_retention",
        "greater_is_better": False,
    }
    trainer = train(VIT, tmp_path, callbacks=[EarlyStoppingCallback(1)], learning_rate=0.0, **options)
    assert trainer.state.global_step == 2  # nothing changes, so the second evaluation is no better


def test_a_checkpoint_with_other_masks_is_refused(tmp_path):
    train(VIT, tmp_path, save_strategy="steps", save_steps=3)
    config = ModularConfig(generator_init="paper", gate="hard")
    fitting = ModularConfig(generator_init="open", target_modules=list_maskable_layers(VIT.model(), PAPER))
    other_start = {"train_dataset": Samples(VIT), "modular_config": fitting}
    ModularTrainer(VIT.model(), arguments(tmp_path), **other_start).train(resume_from_checkpoint=True)
    trainer = ModularTrainer(VIT.model(), arguments(tmp_path), train_dataset=Samples(VIT), modular_config=config)
    with pytest.raises(NemoValueError, match="checkpoint-3 has other masks, .*gate='soft'.* than the model, .*'hard'"):
        trainer.train(resume_from_checkpoint=True)
