# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Gates organised by another column than the labels: training, evaluation, prediction, statistics, bad columns."""

import logging

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from models import (
    DEIT_TEACHER,
    LABELS,
    VIT,
    Samples,
    arguments,
    assert_same_state,
    over_two_models,
)
from torch import nn

from nemo_hf import (
    ModularConfig,
    ModularTrainer,
    ModularTrainingArguments,
    ModuleMasks,
    NemoValueError,
    NeuronStatistics,
    apply_masks,
    collect_statistics,
    files,
    metrics,
    record_masks,
)
from nemo_hf.masking import modular_config
from nemo_hf.objectives import ContrastiveLoss


DOMAINS = ["mail", "news", "web"]
PAPER = ModularConfig(generator_init="paper")


class GroupedSamples(Samples):
    """The group shows in the stripes, or in the first words; every label occurs in every group."""

    def __init__(self, case, size=40, seed=0, labelled=True, ids=(0, 1)):
        super().__init__(case, size, seed, labelled)
        index = torch.arange(size) // len(LABELS) % len(ids)
        if case.is_image:
            sign = (2.0 * index - 1).view(-1, 1, 1, 1)
            self.columns["pixel_values"][..., ::2] += sign
            self.columns["pixel_values"][..., 1::2] -= sign
        else:
            self.columns["input_ids"][:, :4] = 30 + 5 * index[:, None] + torch.arange(4)
        self.columns["domain"] = torch.tensor(ids)[index]

    def table(self, feature=None, **more):
        """The same as a `datasets.Dataset`, with a column that no model takes."""
        columns = {name: column.tolist() for name, column in self.columns.items()} | more
        table = datasets.Dataset.from_dict({**columns, "comment": ["none"] * len(self)})
        table = table.cast_column("domain", feature) if feature is not None else table
        return table.with_format("torch")


def trainer_of(case, output_dir, data=None, model=None, evaluation=None, **options):
    own = {name: options.pop(name) for name in ("teacher_model", "compute_metrics") if name in options}
    return ModularTrainer(
        case.model() if model is None else model,
        arguments(output_dir, **{"group_column": "domain", **options}),
        train_dataset=GroupedSamples(case) if data is None else data,
        eval_dataset=GroupedSamples(case, 13, seed=1) if evaluation is None else evaluation,
        modular_config=PAPER,
        **own,
    )


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


def separation(model, batch, column):
    """How much more alike the open gates of two samples are if they agree in a column than if they do not."""
    with record_masks(model.eval()) as gates, torch.no_grad():
        model(**without(batch, "domain", "labels"))
    jaccard = metrics.pairwise_jaccard(torch.cat(list(gates.values()), 1) > 0)
    same = batch[column][:, None] == batch[column]
    others = ~torch.eye(len(same), dtype=torch.bool)
    return (jaccard[same & others].mean() - jaccard[~same].mean()).item()


@over_two_models
def test_gates_organise_by_group(case, tmp_path):
    batch = GroupedSamples(case, seed=2).batch(*range(40))
    for column, trained, other in ((None, "labels", "domain"), ("domain", "domain", "labels")):
        options = {"max_steps": 60, "learning_rate": 1e-2, "alpha": 2.0, "compactness": 0.0, "logging_steps": 60}
        trainer = trainer_of(case, tmp_path, group_column=column, per_device_train_batch_size=20, **options)
        trainer.train()
        assert separation(trainer.model, batch, trained) > 0.3
        assert abs(separation(trainer.model, batch, other)) < 0.1


@over_two_models
def test_the_objective_compares_groups_and_the_task_keeps_its_labels(case, tmp_path):
    trainer = trainer_of(case, tmp_path, alpha=0.7, compactness=0.0)
    batch = GroupedSamples(case).batch(*range(0, 16))
    model = trainer.model.eval()
    given = dict(batch)
    with record_masks(model) as gates:
        logits = model(**without(batch, "domain", "labels")).logits
    task = nn.functional.cross_entropy(logits, batch["labels"])
    torch.testing.assert_close(trainer.compute_loss(model, given), task, atol=1e-6, rtol=1e-6)
    assert list(given) == list(batch)  # the caller's batch is whole
    observed = trainer._averages["eval"].drain()
    expected = ContrastiveLoss(0.7, 0.2)(gates, batch["domain"])["loss_contrastive"].item()
    assert observed["loss_contrastive"] == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(ContrastiveLoss(0.7, 0.2)(gates, batch["labels"])["loss_contrastive"].item())
    is_open = torch.cat(list(gates.values()), 1) > 0
    masks = metrics.class_masks(is_open, batch["domain"], 0.9)[1]
    assert observed["cohesion"] == pytest.approx(metrics.cohesion(is_open, batch["domain"]).item(), abs=1e-5)
    assert observed["coupling"] == pytest.approx(metrics.coupling(masks).item(), abs=1e-5)


@over_two_models
@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_the_column_reaches_the_objective_and_never_the_model(case, remove_unused_columns, tmp_path):
    feature = datasets.ClassLabel(names=DOMAINS)
    options = {"remove_unused_columns": remove_unused_columns}
    data = GroupedSamples(case, ids=(0, 1, 2)).table(feature)
    trainer = trainer_of(case, tmp_path, data, evaluation=data.select(range(13)), **options)
    seen = []
    hook = trainer.model.register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    trainer.train()
    result = trainer.evaluate()
    labelled = trainer.predict(data.select(range(13)))
    unlabelled = trainer.predict(data.select(range(13)).remove_columns("labels"))
    unlabelled_and_ungrouped = trainer.predict(data.select(range(13)).remove_columns(["labels", "domain"]))
    statistics = trainer.collect_statistics()
    hook.remove()
    inputs = set(GroupedSamples(case).columns) - {"domain"}
    assert all(inputs - {"labels"} <= names <= inputs for names in seen)
    assert {"eval_cohesion", "eval_coupling", "eval_loss_contrastive"} <= set(result)
    assert (labelled.predictions == unlabelled.predictions).all()
    assert (labelled.predictions == unlabelled_and_ungrouped.predictions).all()
    assert labelled.label_ids.tolist() == data["labels"][:13].tolist()
    assert "test_coupling" in labelled.metrics
    assert "test_coupling" not in unlabelled.metrics
    assert statistics.labels == DOMAINS
    assert statistics.num_samples.tolist() == [15, 15, 10]
    assert statistics.grouped_by == "domain"
    assert repr(statistics).startswith("NeuronStatistics(3 groups of 'domain', ")
    masks = statistics.module_masks()
    assert (masks.labels, masks.grouped_by) == (DOMAINS, "domain")
    with pytest.raises(NemoValueError, match=r"no mask for the group of 'domain' 'ant'. There are masks for 'mail'"):
        masks["ant"]


@pytest.mark.parametrize("as_table", [True, False], ids=["table", "torch dataset"])
@torch.no_grad()
def test_statistics_per_integer_group_equal_a_naive_loop(as_table, tmp_path):
    samples = GroupedSamples(VIT, 20, ids=(40, -3, 7))
    trainer = trainer_of(VIT, tmp_path, samples.table() if as_table else samples, evaluation=samples)
    statistics = trainer.collect_statistics()
    assert statistics.labels == [-3, 7, 40]  # the integers as given
    with record_masks(trainer.model.eval()) as gates:
        trainer.model(pixel_values=samples.columns["pixel_values"])
    joined = torch.cat(list(gates.values()), 1)
    for row, group in enumerate(statistics.labels):
        of_group = joined[samples.columns["domain"] == group]
        assert statistics.num_samples[row] == len(of_group)
        clear = (of_group == 0).logical_or(of_group > 1e-5).all(0)  # rounding may differ between batches
        assert torch.equal(statistics.open_counts[row][clear], (of_group > 0).sum(0).int()[clear])
        torch.testing.assert_close(statistics.gate_sums[row], of_group.sum(0), atol=1e-4, rtol=1e-4)
    masks = statistics.module_masks(0.5)
    assert masks.labels == [-3, 7, 40]
    assert masks.union([7, 40]).retention >= masks[7].retention


def test_streamed_datasets_have_groups_too(tmp_path):
    samples = GroupedSamples(VIT, ids=(0, 2))
    named = samples.table(datasets.ClassLabel(names=DOMAINS)).to_iterable_dataset()
    trainer = trainer_of(VIT, tmp_path, named, evaluation=named)
    trainer.train()
    assert trainer.collect_statistics().num_samples.tolist() == [20, 0, 20]
    assert trainer.collect_statistics().labels == DOMAINS
    assert trainer.collect_statistics(samples.table().to_iterable_dataset()).labels == [0, 2]


def test_grouped_by_is_saved_and_files_without_it_load(tmp_path):
    statistics = trainer_of(VIT, tmp_path).collect_statistics()
    statistics.save_pretrained(tmp_path)
    statistics.module_masks().save_pretrained(tmp_path)
    loaded = NeuronStatistics.from_pretrained(tmp_path), ModuleMasks.from_pretrained(tmp_path)
    assert [(one.grouped_by, one.labels) for one in loaded] == [("domain", [0, 1])] * 2
    assert repr(loaded[1]).startswith("ModuleMasks(2 groups of 'domain', ")
    for kind, name in ((NeuronStatistics, "neuron_statistics"), (ModuleMasks, "module_masks")):
        path = tmp_path / f"{name}.safetensors"
        tensors, description = files.read_tensors(tmp_path, path.name)
        files.write_tensors(path, tensors, without(description, "grouped_by"))
        assert kind.from_pretrained(tmp_path).grouped_by is None


@pytest.mark.parametrize("kind", ["regression", "multi-label", "integer multi-label", "none"])
def test_with_groups_the_labels_may_be_anything(kind, tmp_path):
    samples = GroupedSamples(VIT)
    model = (
        VIT.model(num_labels=1, id2label={0: "score"}, label2id={"score": 0}) if kind == "regression" else VIT.model()
    )
    options = {}
    if kind == "regression":
        samples.columns["labels"] = samples.columns["labels"].float()
    elif kind == "none":
        del samples.columns["labels"]
        options["compute_loss_func"] = lambda outputs, _labels, num_items_in_batch=None: outputs.logits.square().mean()
    else:
        model.config.problem_type = "multi_label_classification"
        multi_hot = torch.rand(40, 5) < 0.4
        samples.columns["labels"] = multi_hot.float() if kind == "multi-label" else multi_hot.long()
    args = arguments(tmp_path, group_column="domain")
    trainer = ModularTrainer(model, args, train_dataset=samples, eval_dataset=samples, modular_config=PAPER, **options)
    trainer.train()
    assert all(logs["loss_contrastive"] > 0 for logs in trainer.state.log_history if "loss" in logs)
    if kind != "none":
        assert "eval_coupling" in trainer.evaluate()
    assert trainer.collect_statistics().num_samples.tolist() == [20, 20]


def test_distillation_with_groups(tmp_path):
    trainer = trainer_of(DEIT_TEACHER, tmp_path, teacher_model=VIT.model(5))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.collect_statistics().grouped_by == "domain"


@over_two_models
def test_a_resumed_training_is_bit_identical(case, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = trainer_of(case, tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_of(case, tmp_path / "resumed", model=case.model(7), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())


def test_the_card_says_groups(tmp_path):
    trainer = trainer_of(VIT, tmp_path)
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "README.md").text
    assert "every group of samples (column `domain`) has its own neurons" in text
    assert "extract_module(model, masks, groups=masks.labels[:2])" in text


@pytest.mark.parametrize("name", ["label", "labels", "label_ids", "target"])
def test_the_labels_are_no_group_column(name, tmp_path):
    with pytest.raises(NemoValueError, match=f"another column than the labels of the task, got '{name}'"):
        ModularTrainingArguments(str(tmp_path), group_column=name, label_names=["target"], report_to="none")


class Named(Samples):
    """Groups as text, without a `datasets.Dataset` around them."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "domain": "news"}


REMEDY = r'dataset = dataset.class_encode_column\("domain"\)'
WORDS = ["mail", "news"] * 20
UNUSABLE = {
    "texts": (lambda: Samples(VIT, 40).columns, {"domain": WORDS}, rf"got 'mail'. Encode strings with `{REMEDY}"),
    "fractions": (lambda: Samples(VIT, 40).columns, {"domain": [0.5] * 40}, r"got 0.5"),
    "gaps": (lambda: Samples(VIT, 40).columns, {"domain": [0, None] * 20}, "got None.*leave out samples without"),
    "no column": (lambda: Samples(VIT, 40).columns, {}, "no column 'domain', only pixel_values, labels, comment"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("role", ["train", "eval", "one of several"])
def test_unusable_columns_are_refused_before_training(kind, role, tmp_path):
    columns, more, text = UNUSABLE[kind]
    columns = {name: column.tolist() for name, column in columns().items()} | more | {"comment": ["none"] * 40}
    bad, good = datasets.Dataset.from_dict(columns), GroupedSamples(VIT)
    data = {"train": (bad, good), "eval": (good, bad), "one of several": (good, {"good": good, "bad": bad})}[role]
    with pytest.raises(NemoValueError, match=text):
        trainer_of(VIT, tmp_path, data[0], evaluation=data[1])


def test_the_named_remedy_works(tmp_path):
    table = GroupedSamples(VIT).table().remove_columns("domain").add_column("domain", WORDS)
    trainer = trainer_of(VIT, tmp_path, table.class_encode_column("domain"))
    trainer.train()
    assert trainer.collect_statistics().labels == ["mail", "news"]


def test_unusable_columns_of_other_datasets_are_refused(tmp_path):
    with pytest.raises(NemoValueError, match="got 'news'. Encode strings"):
        trainer_of(VIT, tmp_path, Named(VIT))
    with pytest.raises(NemoValueError, match="no column 'domain', only pixel_values, labels"):
        trainer_of(VIT, tmp_path, Samples(VIT))
    table = datasets.Dataset.from_dict({"domain": WORDS, "labels": [0] * 40})
    with pytest.raises(NemoValueError, match="got string. Encode strings"):
        trainer_of(VIT, tmp_path, table.to_iterable_dataset())
    with pytest.raises(NemoValueError, match="no column 'domain', only labels"):
        trainer_of(VIT, tmp_path, table.remove_columns("domain").to_iterable_dataset())
    missing = GroupedSamples(VIT, ids=(-1, 0)).table(datasets.ClassLabel(names=DOMAINS))
    with pytest.raises(NemoValueError, match="got -1, which its ClassLabel feature does not name"):
        trainer_of(VIT, tmp_path, missing)


def test_batches_without_groups_or_with_others_are_refused(tmp_path):
    trainer = trainer_of(VIT, tmp_path)
    with pytest.raises(NemoValueError, match="no column 'domain', only pixel_values, labels.*default collator drops"):
        trainer.evaluate(Samples(VIT))
    with pytest.raises(NemoValueError, match="no column 'domain', only pixel_values, labels"):
        trainer.collect_statistics(Samples(VIT))
    batch = GroupedSamples(VIT).batch(0, 1)
    for groups, given in (
        (torch.zeros(2, 3, dtype=torch.long), r"torch.int64 of shape \(2, 3\)"),
        (torch.rand(2), "float"),
    ):
        with pytest.raises(NemoValueError, match=f"one integer per sample, of shape .batch_size,.; got .*{given}"):
            trainer.compute_loss(trainer.model, {**batch, "domain": groups})


def test_collect_statistics_needs_the_names_of_all_groups():
    batch = GroupedSamples(VIT, ids=(3, 9)).batch(0, 1, 5)
    named = {"labels_name": "domain", "disable_tqdm": True}
    statistics = collect_statistics(VIT.masked(), [batch], names={9: "web", 3: "mail"}, **named)
    assert (statistics.labels, statistics.num_samples.tolist()) == (["web", "mail"], [1, 2])
    with pytest.raises(NemoValueError, match=r"one of the groups 3, 4, got torch.int64.* with values \[3, 9\]"):
        collect_statistics(VIT.masked(), [batch], names={3: "mail", 4: "web"}, **named)
    with pytest.raises(NemoValueError, match="one of the groups 3, got .*shape"):
        collect_statistics(VIT.masked(), [{**batch, "domain": torch.full((3, 2), 3)}], names={3: "mail"}, **named)
    with pytest.raises(NemoValueError, match="Two labels have the same name.*Give the groups distinct ones"):
        collect_statistics(VIT.masked(), [batch], names={3: "mail", 9: "mail"}, **named)


def test_generators_for_groups_are_attached_unless_the_config_detaches_them(tmp_path):
    for asked, given in ((None, False), (True, True), (False, False)):
        config = ModularConfig(detach_generator_inputs=asked)
        trainer = ModularTrainer(
            VIT.model(),
            arguments(tmp_path, group_column="domain"),
            modular_config=config,
            train_dataset=GroupedSamples(VIT),
        )
        assert modular_config(trainer.model).detach_generator_inputs is given
    trainer = ModularTrainer(
        VIT.model(), arguments(tmp_path, group_column="domain"), train_dataset=GroupedSamples(VIT)
    )
    assert modular_config(trainer.model).detach_generator_inputs is False
    trainer = ModularTrainer(VIT.model(), arguments(tmp_path), train_dataset=GroupedSamples(VIT))
    assert modular_config(trainer.model).detach_generator_inputs is None


def test_masks_put_on_before_groups_are_asked_for_give_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for detach, warned in ((None, True), (False, False), (True, False)):
        caplog.clear()
        model = apply_masks(VIT.model(), ModularConfig(detach_generator_inputs=detach))
        ModularTrainer(model, arguments(tmp_path, group_column="domain"), train_dataset=GroupedSamples(VIT))
        assert ("detach_generator_inputs" in caplog.text) == warned
