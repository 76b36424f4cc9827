# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The index of a collection, the README that is updated, `nemo-hf info`: what is damaged is named, not executed."""

import ast
import json

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from models import BERT, VIT, Samples, arguments, module_masks, over_two_models, random_masks
from processors import image_processor
from safetensors.torch import load_file, save_file

from nemo_hf import (
    AutoModularModel,
    CheckpointError,
    ModularTrainer,
    ModuleEntry,
    ModuleMasks,
    NemoValueError,
    cli,
    collect_statistics,
    extract_module,
    list_modules,
    push_modules,
    save_module,
)
from nemo_hf.collection import INDEX_FILE, entry_dict, write_index
from nemo_hf.inspection import describe_checkpoint
from nemo_hf.readme import update_card


ENTRY = entry_dict(ModuleEntry("cat", ["cat"], 0.5, 0.25, 10, 40, accuracy=0.9))


def index_of(**changes):
    """An index with one entry, or with other values in it."""
    return {"kind": "module_collection", "format": 1, "modules": {"cat": {**ENTRY, **changes}}}


@pytest.mark.parametrize(
    "folder", ["../secret", "/etc", "..", ".", "", "a/b", "a\\b", "C:x", "cat\n", ".hidden", 3, None]
)
def test_an_index_that_names_a_path_outside_its_folder_is_refused(tmp_path, folder):
    (tmp_path / INDEX_FILE).write_text(json.dumps(index_of(folder=folder)))
    for read in (list_modules, describe_checkpoint):
        with pytest.raises(CheckpointError, match="is damaged: module 'cat': folder must be the name of a folder"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("\x00\xff", "is damaged: it is not JSON"),
        ("[]", "must have kind 'module_collection'"),
        ({**index_of(), "modules": []}, "and a table `modules`"),
        ({**index_of(), "format": 2}, "has format 2; this version of nemo_hf reads formats up to 1. Upgrade nemo_hf"),
        ({**index_of(), "format": None}, "has format None"),
        ({**index_of(), "modules": {"cat": "cat"}}, "module 'cat': it must be a table"),
        ({**index_of(), "modules": {"a": ENTRY, "b": {**ENTRY, "folder": "CAT"}}}, "'CAT' is taken by another"),
        (index_of(neuron_retention=float("nan")), "neuron_retention must be a number from 0 to 1, got nan"),
        (index_of(parameter_retention=None), "parameter_retention must be a number from 0 to 1, got None"),
        (index_of(accuracy="high"), "accuracy must be a number from 0 to 1, got 'high'"),
        (index_of(parameters=1.5), "parameters must be an integer from 0 up, got 1.5"),
        (index_of(bytes=-1), "bytes must be an integer from 0 up, got -1"),
        (index_of(labels="cat"), "labels must be a list of names or numbers, got 'cat'"),
        (index_of(groups=[None]), "groups must be a list of names or numbers"),
        (index_of(parent=3), "parent must be a name, got 3"),
    ],
)
def test_damaged_indices_are_refused(tmp_path, content, text):
    (tmp_path / INDEX_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=text):
        list_modules(tmp_path)


def test_an_index_of_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no nemo_modules.json in .*: it is no collection of modules"):
        list_modules(tmp_path)
    write_index(tmp_path / INDEX_FILE, {"猫": {**ENTRY, "of_a_newer_version": 1}})
    assert list_modules(tmp_path) == {"猫": ModuleEntry("cat", ["cat"], 0.5, 0.25, 10, 40, accuracy=0.9)}


NEW = ModelCardData(library_name="transformers", tags=["nemo_hf", "b"], base_model="ann/parent")


def test_a_readme_keeps_what_a_person_wrote():
    windows = "---\r\ntags: b # as it is\r\nlicense: mit\r\nbase_model: old/one\r\n---\r\n# Mine\r\n"
    first = update_card(windows, "ours\nagain", NEW, "README.md")
    assert "# Mine\r\n\r\n<!-- nemo_hf: begin" in first
    assert first.count("\n") == first.count("\r\n")
    data = ModelCard(first).data
    assert (data.license, data.base_model, data.tags) == ("mit", "ann/parent", ["b", "nemo_hf"])
    assert update_card(first, "ours\nagain", NEW, "README.md") == first
    commented = "---\nlibrary_name: transformers # kept\ntags: [nemo_hf, b]\nbase_model: ann/parent\n---\nText"
    assert update_card(commented, "ours", NEW, "README.md").startswith(commented)
    assert update_card("# No metadata\n", "ours", NEW, "README.md").split("---\n")[2].startswith("# No metadata")
    assert update_card("  \n", "ours", NEW, "README.md") == update_card(None, "ours", NEW, "README.md")
    tricky = update_card(None, r"\1 \g<0> <b>", NEW, "README.md")
    assert r"\1 \g<0> <b>" in update_card(tricky, r"\1 \g<0> <b>", NEW, "README.md")


def test_results_are_renewed_and_those_of_others_stay():
    def card(*results):
        rows = [EvalResult("t", "d", "d", kind, value, metric_name=name) for kind, value, name in results]
        return ModelCardData(model_name="x" if rows else None, eval_results=rows or None)

    def results(text):
        return {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results or []}

    odd = "accuracy (--> ] <!-- nemo_hf: end -->)"
    mine = f"---\n{card(('f1', 0.4, 'f1'), ('accuracy', 0.5, 'accuracy')).to_yaml()}\n---\nMine"
    first = update_card(mine, "ours", card(("accuracy", 0.6, "accuracy"), ("accuracy", 0.7, odd)), "README.md")
    assert results(first) == {"accuracy": 0.6, "f1": 0.4, odd: 0.7}
    by_hand = first.replace("name: f1", "name: F1")
    assert results(update_card(by_hand, "ours", card(), "README.md")) == {"F1": 0.4}
    alone = update_card(None, "ours", card(("accuracy", 0.5, odd)), "README.md")
    assert ModelCard(alone).text.count("<!-- nemo_hf: end -->") == 1
    assert "model" not in update_card(alone, "ours", card(), "README.md")


BROKEN_CARDS = [
    (
        b"---\ntags: [a\n---\nmine",
        "The metadata of .*README.md cannot be read: .*Nothing was written. Correct the lines",
    ),
    (b"---\n- a\n---\nmine", "The metadata of .*README.md cannot be read"),
    (b"---\nmodel-index: 3\n---\nmine", "The metadata of .*README.md cannot be read"),
    (b"\xff\xfe", "README.md is not UTF-8 text"),
]


@pytest.fixture(scope="module")
def module():
    parent = VIT.masked()
    return extract_module(parent, module_masks(parent), ["cat", "dog"])


@pytest.mark.parametrize(("content", "text"), BROKEN_CARDS)
def test_save_module_names_a_broken_card_and_loses_nothing(module, tmp_path, content, text):
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "README.md").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        save_module(module, tmp_path / "module")
    assert [file.name for file in tmp_path.rglob("*")] == ["module", "README.md"]
    assert (tmp_path / "module" / "README.md").read_bytes() == content


def test_a_card_lists_what_was_measured_and_saving_again_forgets_it(module, tmp_path):
    metrics = {"eval_accuracy": 0.5, "parent_accuracy": 0.25, "f1": float("nan"), "latency_ratio": 0.75}
    metrics |= {"latency": 0.5, "parent_latency": 1.0, "note": "by hand | <b>", "eval_runtime": 3.0}
    save_module(module, tmp_path, metrics=metrics, base_model="ann/parent", dataset="ann/pictures")
    text = (tmp_path / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("ann/parent", ["ann/pictures"])
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == ("accuracy", 0.5, "image-classification")
    for row in ("| latency | 0.75 x the parent's |", "| latency | 0.5 (parent: 1) |", "| note | by hand \\| &lt;b> |"):
        assert row in text
    assert "nan" not in text
    assert "of 448 (" in text
    assert describe_checkpoint(tmp_path)["metrics"]["eval_accuracy"] == 0.5
    save_module(module, tmp_path)
    assert "metrics" not in describe_checkpoint(tmp_path)
    assert not hasattr(module.config, "metrics")
    assert "metrics" not in module.config.nemo


@over_two_models
def test_the_card_of_a_modular_model_has_results_and_hyper_parameters(case, tmp_path):
    args = arguments(tmp_path / "model", max_steps=1, alpha=0.25, eval_strategy="steps", eval_steps=1)
    data = Samples(case, 10)
    trainer = ModularTrainer(case.model(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_tags="ann/samples", dataset="Samples", finetuned_from="ann/base")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.pipeline_tag == ("image-classification" if case.is_image else "text-classification")
    assert (card.data.base_model, card.data.datasets) == ("ann/base", ["ann/samples"])
    assert any(result.metric_type == "loss" for result in card.data.eval_results)
    assert {result.dataset_type for result in card.data.eval_results} == {"ann/samples"}
    assert "| alpha | 0.25 |" in card.text
    assert 'AutoModularModel.from_pretrained("model")' in card.text
    assert "of mask generators |" in card.text


def test_a_broken_card_is_named_before_the_trainer_overwrites_it(tmp_path):
    trainer = ModularTrainer(VIT.model(), arguments(tmp_path), train_dataset=Samples(VIT, 10))
    (tmp_path / "README.md").write_bytes(BROKEN_CARDS[0][0])
    with pytest.raises(CheckpointError, match="The metadata of .*README.md cannot be read"):
        trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == BROKEN_CARDS[0][0]


def test_labels_cannot_leave_the_card(tmp_path):
    odd = "`x` ``` <!-- nemo_hf: end --> | ' \"\n"
    model = VIT.model(id2label={0: odd, 1: "b"}, label2id={odd: 0, "b": 1})
    trainer = ModularTrainer(model, arguments(tmp_path), train_dataset=Samples(VIT, 10))
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert text.count("<!-- nemo_hf: end -->") == 1
    code = text.split("```python\n")[1].partition("\n```")[0]
    assert ast.literal_eval(code.partition("labels=")[2].removesuffix(")")) == [odd, "b"]
    masks = ModuleMasks({odd: random_masks(model)[0]["cat"]})
    save_module(extract_module(trainer.model, masks, [odd]), tmp_path / "module")
    assert (tmp_path / "module" / "README.md").read_text().count("<!-- nemo_hf: end -->") == 1


def test_save_module_does_not_push(module, tmp_path):
    with pytest.raises(NemoValueError, match="Push with `push_modules"):
        save_module(module, tmp_path, push_to_hub=True)


def test_info_of_a_stock_module(tmp_path):
    model = VIT.model()
    masks = ModuleMasks(random_masks(model, skip_first_blocks=0)[0])
    save_module(extract_module(model, masks, ["cat", "dog"], layout="stock"), tmp_path)
    report = describe_checkpoint(tmp_path)
    assert (report["kind"], report["layout"], report["class"]) == ("module", "stock", "ViTForImageClassification")
    text = (tmp_path / "README.md").read_text()
    assert "| layout | stock |" in text
    assert "import nemo_hf" not in text


@pytest.mark.parametrize(
    ("options", "row", "whole"),
    [
        ({"origin": "statistics", "threshold": 0.8}, "from the statistics of a modular model", "modular model"),
        ({"origin": "learnt"}, "learnt for a classifier that was trained already", "classifier"),
        ({}, "chosen by hand", "classifier"),
    ],
    ids=["statistics", "learnt", "by hand"],
)
def test_card_and_info_say_where_masks_come_from(options, row, whole, tmp_path):
    plain = VIT.model()
    masks = ModuleMasks(random_masks(plain)[0], **options)
    module = extract_module(plain, masks, ["cat"])
    save_module(module, tmp_path / "module")
    text = (tmp_path / "module" / "README.md").read_text()
    assert f"| masks | {row}" in text
    assert f"The part of a {whole} that these labels need" in text
    assert ("| threshold | 0.8 |" in text) == ("threshold" in options)
    assert describe_checkpoint(tmp_path / "module")["masks"] == masks.origin
    plain.save_pretrained(tmp_path / "plain")
    masks.save_pretrained(tmp_path / "plain")
    report = describe_checkpoint(tmp_path / "plain")
    assert (report["kind"], report["masks"]) == ("plain", masks.origin)
    assert (report["single_label_retention"], report["coupling"]) == (masks.retention(), masks.coupling())


def test_info_of_every_kind(module, tmp_path):
    parent, plain = VIT.masked(), VIT.model()
    parent.save_pretrained(tmp_path / "parent")
    plain.save_pretrained(tmp_path / "plain")
    save_module(module, tmp_path / "module", processing_class=image_processor())
    report = describe_checkpoint(tmp_path / "plain")
    assert (report["kind"], report["parameters"]) == ("plain", plain.num_parameters())
    report = describe_checkpoint(tmp_path / "parent")
    assert (report["kind"], report["parameters"]) == ("modular", plain.num_parameters())
    assert report["generator_parameters"] == parent.num_parameters() - plain.num_parameters()
    assert (report["masked_layers"], report["neurons"]) == (12, 448)
    assert "single_label_retention" not in report
    statistics = collect_statistics(parent, [Samples(VIT, 10).batch(*range(10))], disable_tqdm=True)
    statistics.save_pretrained(tmp_path / "parent")
    report = describe_checkpoint(tmp_path / "parent")
    assert report["single_label_retention"] == statistics.module_masks().retention()
    report = describe_checkpoint(tmp_path, subfolder="module")
    expected = module.config.nemo
    assert report["kind"] == "module"
    for name in ("labels", "gates", "threshold", "layout", "format", "neuron_retention", "parameter_retention"):
        assert report[name] == expected[name]
    assert report["parameters"] == module.num_parameters()
    assert report["neurons"] == sum(report["neurons_per_layer"].values()) == round(448 * expected["neuron_retention"])
    assert report["bytes"] == (tmp_path / "module" / "model.safetensors").stat().st_size
    module.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert describe_checkpoint(tmp_path / "shards")["parameters"] == module.num_parameters()


def damage(folder, name, change):
    """Change one JSON file."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


DAMAGE = {
    "format": (lambda f: damage(f, "config.json", lambda c: c["nemo"].update(format=9)), "has format 9; .*Upgrade"),
    "bits": (
        lambda f: damage(f, "config.json", lambda c: c["nemo"].update(neurons={"x": "?"})),
        "config of .* damaged",
    ),
    "keys": (
        lambda f: damage(f, "config.json", lambda c: c["nemo"].pop("parent")),
        "config of .* is damaged: 'parent'",
    ),
    "json": (lambda f: (f / "config.json").write_text("{"), "config.json of .* is damaged"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "config.json of .* is damaged: it is no table"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "There is no model.safetensors in"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-64]),
        "model.safetensors of .* is damaged",
    ),
    "shards": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}'),
        "model.safetensors.index.json of .* names a file outside its folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_info_names_what_is_damaged(module, tmp_path, name, capsys):
    save_module(module, tmp_path)
    change, text = DAMAGE[name]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        describe_checkpoint(tmp_path)
    assert cli.main(["info", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("nemo-hf info: error: ")


def test_push_refuses_damaged_folders_before_anything_is_sent(module, tmp_path):
    for name in ("cut", "shape", "card"):
        save_module(module, tmp_path / name)
    DAMAGE["cut"][0](tmp_path / "cut")
    tensors = load_file(tmp_path / "shape" / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"][:1].clone()
    save_file(tensors, tmp_path / "shape" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "card" / "README.md").write_bytes(BROKEN_CARDS[0][0])
    BERT.masked().save_pretrained(tmp_path / "parent")
    for name, text in (
        ("cut", "cut cannot be loaded.*its weights are damaged"),
        ("shape", "shape cannot be loaded.*weights are damaged"),
        ("card", "The metadata of .*README.md cannot be read"),
        ("parent", "holds no module, but another model"),
        ("none", "holds no module: there is no config.json"),
    ):
        with pytest.raises(CheckpointError, match=text):
            push_modules("ann/none", [tmp_path / name])
    assert AutoModularModel.from_pretrained(tmp_path / "parent").config.nemo["kind"] == "modular"


def test_info_prints_and_writes_json(module, tmp_path, capsys):
    save_module(module, tmp_path / "module")
    assert cli.main(["info", str(tmp_path / "module"), "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text()) == describe_checkpoint(tmp_path / "module")
    out = capsys.readouterr().out
    assert "cat, dog" in out
    assert "neurons_per_layer" not in out
    write_index(tmp_path / INDEX_FILE, {"cat": ENTRY})
    assert cli.main(["info", str(tmp_path)]) == 0
    assert "--subfolder cat" in capsys.readouterr().out
