# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line on small data sets that are made here."""

import json
import os
import runpy
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from models import LABELS as ANIMALS
from models import case_of
from PIL import Image as PillowImage
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, ViTImageProcessorPil, Wav2Vec2FeatureExtractor

from nemo_hf import AutoModularModel, ModuleMasks, NeuronStatistics, cli, collect_statistics, demo, remove_masks


LABELS = ["dark", "light", "striped"]
TRAINING = [
    "--num_train_epochs",
    "1",
    "--per_device_train_batch_size",
    "8",
    "--report_to",
    "none",
    "--disable_tqdm",
    "True",
]
SIZES = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32"
IMAGE_MODEL = ["--model_type", "vit", "--config_overrides", f"{SIZES},image_size=8,patch_size=4"]
TEXT_MODEL = ["--model_type", "bert", "--train_tokenizer", "--vocab_size", "60", "--config_overrides", SIZES]


def write_dataset(folder, column, feature, make, **groups):
    """A folder that `load_dataset` reads, 24 samples to train and 12 to test; `groups`: column → its two values."""
    rng = np.random.default_rng(0)
    more = {name: Value("string" if isinstance(values[0], str) else "int64") for name, values in groups.items()}
    features = Features({column: feature, "label": ClassLabel(names=LABELS), **more})
    for split, size in (("train", 24), ("test", 12)):
        labels = [i % 3 for i in range(size)]
        columns = {column: [make(label, rng) for label in labels], "label": labels}
        columns |= {name: [values[i // 3 % 2] for i in range(size)] for name, values in groups.items()}
        path = folder / f"{split}-00000-of-00001.parquet"
        DatasetDict({split: Dataset.from_dict(columns, features=features)})[split].to_parquet(str(path))
    return str(folder)


def draw(label, rng):
    """A grey picture: transformers' pipelines and the command line make it RGB."""
    pixels = np.full((8, 8), (0, 255, 0)[label], dtype=np.uint8)
    if label == 2:
        pixels[::2] = 255
    return PillowImage.fromarray(pixels)


def write_text(label, rng):
    return " ".join(rng.choice([f"{LABELS[label]}{i}" for i in range(4)], size=5))


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "data").mkdir()
    data = write_dataset(folder / "data", "image", Image(), draw)
    arguments = ["train", *IMAGE_MODEL, "--dataset_name", data, "--output_dir", str(folder / "model"), *TRAINING]
    assert cli.main([*arguments, "--json", str(folder / "train.json")]) == 0
    return folder


def test_train_writes_model_statistics_and_figures(image_run):
    files = {path.name for path in (image_run / "model").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "neuron_statistics.safetensors"} <= files
    figures = json.loads((image_run / "train.json").read_text())
    assert 0 <= figures["eval_accuracy"] <= 1
    assert 0 < figures["single_label_retention"] <= 1


def test_extract_then_evaluate_on_the_labels_of_the_module(image_run, tmp_path):
    module = str(tmp_path / "module")
    arguments = ["extract", str(image_run / "model"), "--labels", "striped", "0", "--output", module]
    assert cli.main([*arguments, "--json", str(tmp_path / "extract.json")]) == 0
    extracted = json.loads((tmp_path / "extract.json").read_text())
    assert extracted["labels"] == ["striped", "dark"]
    assert extracted["bytes"] == os.path.getsize(os.path.join(module, "model.safetensors"))

    arguments = ["evaluate", module, "--dataset_name", str(image_run / "data")]
    assert cli.main([*arguments, "--json", str(tmp_path / "evaluate.json")]) == 0
    evaluated = json.loads((tmp_path / "evaluate.json").read_text())
    assert evaluated["kind"] == "module"
    assert evaluated["num_samples"] == 8  # the test samples of two of three labels


def test_evaluate_modular_checkpoint(image_run, tmp_path):
    path = tmp_path / "evaluate.json"
    arguments = ["evaluate", str(image_run / "model"), "--dataset_name", str(image_run / "data"), "--json", str(path)]
    assert cli.main(arguments) == 0
    figures = json.loads(path.read_text())
    trained = json.loads((image_run / "train.json").read_text())
    assert figures["kind"] == "modular"
    assert figures["accuracy"] == pytest.approx(trained["eval_accuracy"])


def test_a_module_of_one_label_has_no_accuracy(image_run, tmp_path, capsys):
    module, path = str(tmp_path / "module"), tmp_path / "evaluate.json"
    assert cli.main(["extract", str(image_run / "model"), "--labels", "light", "--output", module]) == 0
    data = ["--dataset_name", str(image_run / "data")]
    assert cli.main(["evaluate", module, *data, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert (figures["num_samples"], figures["accuracy"]) == (4, None)
    assert "accuracy –" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "error", [TypeError("of a config"), RuntimeError("of torch"), KeyError("of a file")], ids=repr
)
def test_errors_of_other_libraries_are_one_line_too(monkeypatch, capsys, error):
    def fail(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", fail)
    assert cli.main(["info", "somewhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"nemo-hf info: error: {type(error).__name__}: {error} (--debug shows the traceback)"
    with pytest.raises(type(error)):
        cli.main(["info", "somewhere", "--debug"])


def test_wrong_values_of_a_config_are_one_line(image_run, tmp_path, capsys):
    data = ["--dataset_name", str(image_run / "data"), "--output_dir", str(tmp_path)]
    for overrides, text in (
        ('{"hidden_size": "wide"}', "expected int, got str"),
        ('{"hidden_act": "sharp"}', "sharp"),
    ):
        assert cli.main(["train", "--model_type", "vit", "--config_overrides", overrides, *data, *TRAINING]) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("nemo-hf train: error: ")
        assert text in line


def test_text_path_with_a_new_tokenizer(tmp_path):
    (tmp_path / "data").mkdir()
    data = write_dataset(tmp_path / "data", "text", Value("string"), write_text)
    model, module = str(tmp_path / "model"), str(tmp_path / "module")
    assert cli.main(["train", *TEXT_MODEL, "--dataset_name", data, "--output_dir", model, *TRAINING]) == 0
    assert cli.main(["extract", model, "--labels", "dark", "light", "--output", module]) == 0
    assert cli.main(["evaluate", module, "--dataset_name", data]) == 0


@pytest.mark.parametrize("kind", ["text", "image"])
def test_train_by_group(kind, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    feature, make, groups = {"text": (Value("string"), write_text, ["web", "mail"]), "image": (Image(), draw, [7, 3])}[
        kind
    ]
    data = write_dataset(tmp_path / "data", kind, feature, make, source=groups)
    model = TEXT_MODEL if kind == "text" else IMAGE_MODEL
    arguments = ["train", *model, "--dataset_name", data, "--output_dir", str(tmp_path / "model"), *TRAINING]
    report = tmp_path / "report.json"
    assert cli.main([*arguments, "--group_column", "source", "--json", str(report)]) == 0
    statistics = NeuronStatistics.from_pretrained(tmp_path / "model")
    assert (statistics.grouped_by, statistics.labels) == ("source", sorted(groups))
    assert statistics.num_samples.tolist() == [12, 12]
    assert 0 < json.loads(report.read_text())["single_group_retention"] <= 1
    assert cli.main([*arguments, "--group_column", "origin"]) == 1
    assert f"The dataset has no column 'origin'; it has {kind}, label, source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "purple"], "Unknown label 'purple'. The model's labels are 'dark', 'light', 'striped'"),
        (["--labels", "dark", "--threshold", "1.5"], "threshold is a share of samples and must be in (0, 1], got 1.5"),
    ],
    ids=["label", "threshold"],
)
def test_errors_are_one_line_and_write_nothing(image_run, tmp_path, capsys, arguments, message):
    output = tmp_path / "module"
    assert cli.main(["extract", str(image_run / "model"), *arguments, "--output", str(output)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nemo-hf extract: error: ")
    assert message in error
    assert not output.exists()


def test_extract_without_statistics_names_what_is_missing(image_run, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((image_run / "model" / name).read_bytes())
    assert cli.main(["extract", str(tmp_path), "--labels", "dark", "--output", str(tmp_path / "module")]) == 1
    assert "There is no neuron_statistics.safetensors" in capsys.readouterr().err


def test_dataset_without_labels(tmp_path, capsys):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "train.parquet"))
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "test.parquet"))
    arguments = [
        "train",
        *TEXT_MODEL,
        "--dataset_name",
        str(tmp_path),
        "--output_dir",
        str(tmp_path / "model"),
        *TRAINING,
    ]
    assert cli.main(arguments) == 1
    assert "The dataset has no labels" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:'nemo_hf.cli' found in sys.modules")
def test_help_lists_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nemo-hf", "--help"])
    with pytest.raises(SystemExit) as stopped:  # what `python -m nemo_hf.cli --help` runs, without a new process
        runpy.run_module("nemo_hf.cli", run_name="__main__")
    assert not stopped.value.code
    answer = capsys.readouterr().out
    assert all(name in answer for name in cli.COMMANDS)


def test_demo_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NUM_PAIRS", 2)
    monkeypatch.setattr(demo, "NUM_TRIPLES", 1)
    monkeypatch.setattr(demo, "LATENCY_BATCH", 2)  # the demo times 13 modules, each in many runs
    *parts, processor = demo.load_digits_splits()
    few = [demo.Digits(part.pixel_values[:200], part.labels[:200]) for part in parts]
    monkeypatch.setattr(demo, "load_digits_splits", lambda: (*few, processor))
    monkeypatch.setitem(demo.TRAINING, "num_train_epochs", 1)
    path = tmp_path / "demo.json"
    assert cli.main(["demo", "--output", str(tmp_path / "demo"), "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["reload_difference"] == 0.0
    assert figures["max_logit_difference"] <= 1e-5
    assert [len(module["labels"]) for module in figures["modules"]] == [1] * 10 + [2] * 2 + [3]
    keys = {
        "labels",
        "accuracy",
        "plain_accuracy",
        "neuron_retention",
        "parameter_retention",
        "bytes",
        "latency_ratio",
    }
    assert all(keys <= set(module) for module in figures["modules"])
    assert all((module["accuracy"] is None) == (len(module["labels"]) == 1) for module in figures["modules"])
    for name, has_accuracy in (("3", False), ("-".join(map(str, figures["modules"][-1]["labels"])), True)):
        config = json.loads((tmp_path / "demo" / "modules" / name / "config.json").read_text())
        assert ("accuracy" in config["nemo"].get("metrics", {})) == has_accuracy
        card = (tmp_path / "demo" / "modules" / name / "README.md").read_text()
        assert ("| accuracy |" in card) == has_accuracy
    assert "Modules are measured as cut, without fine-tuning." in capsys.readouterr().out


def test_learnt_masks_of_a_plain_model(image_run, tmp_path, capsys):
    plain, module, data = (str(path) for path in (tmp_path / "plain", tmp_path / "module", image_run / "data"))
    model = remove_masks(AutoModularModel.from_pretrained(image_run / "model"))
    model.save_pretrained(plain)
    ViTImageProcessorPil.from_pretrained(image_run / "model").save_pretrained(plain)
    weights = (tmp_path / "plain" / "model.safetensors").read_bytes()
    extract = ["extract", plain, "--labels", "striped", "light", "--output", module]
    assert cli.main(extract) == 1
    assert "There is no module_masks.safetensors" in capsys.readouterr().err

    learn = ["learn-masks", plain, "--dataset_name", data, "--num_epochs", "6", "--batch_size", "2"]
    for option, value, text in (("--compactness", "-1", "compactness"), ("--learning_rate", "0", "learning_rate")):
        assert cli.main([*learn, option, value]) == 1
        assert text in capsys.readouterr().err
    assert cli.main([*learn, "--json", str(tmp_path / "learn.json")]) == 0
    figures = json.loads((tmp_path / "learn.json").read_text())
    assert 0 < figures["single_label_retention"] < 1
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == weights
    masks = ModuleMasks.from_pretrained(plain)
    assert masks.labels == ["dark", "light", "striped"]

    assert cli.main(extract) == 0
    nemo = json.loads((tmp_path / "module" / "config.json").read_text())["nemo"]
    assert (nemo["gates"], nemo["labels"]) == ("binary", ["striped", "light"])
    assert nemo["neuron_retention"] == pytest.approx(masks.retention(["striped", "light"]))
    assert cli.main(["evaluate", module, "--dataset_name", data]) == 0
    assert cli.main([*extract, "--threshold", "0.5"]) == 1
    assert "learnt masks have no --threshold and no --uniform" in capsys.readouterr().err

    elsewhere = str(tmp_path / "elsewhere")
    assert cli.main([*learn, "--output", elsewhere]) == 0
    again = ModuleMasks.from_pretrained(elsewhere)
    assert all(torch.equal(masks[label][name], again[label][name]) for label in masks.labels for name in masks.layers)
    assert cli.main(["extract", elsewhere, "--labels", "dark", "--output", str(tmp_path / "dark")]) == 0


def test_masks_are_learnt_for_plain_models_and_need_a_folder(image_run, tmp_path, capsys):
    data = ["--dataset_name", str(image_run / "data")]
    assert cli.main(["learn-masks", "someone/model", *data]) == 1
    assert "someone/model is no folder: name one for the masks with --output" in capsys.readouterr().err
    assert cli.main(["learn-masks", str(image_run / "model"), *data, "--output", str(tmp_path / "out")]) == 1
    assert "This model has mask generators" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("learn-masks", "--eval_split"),
        ("learn-masks", "--max_eval_samples"),
        ("evaluate", "--train_split"),
        ("evaluate", "--max_train_samples"),
        ("report", "--max_train_samples"),
    ],
)
def test_options_that_a_command_does_not_use_are_refused(image_run, capsys, command, option):
    arguments = [command, str(image_run / "model"), "--dataset_name", str(image_run / "data"), option, "4"]
    assert cli.main(arguments) == 1
    assert f"not used by the HfArgumentParser: ['{option}', '4']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("ASTForAudioClassification", ASTFeatureExtractor(num_mel_bins=8, max_length=12)),
        ("Wav2Vec2ForSequenceClassification", Wav2Vec2FeatureExtractor()),
        ("ViTForImageClassification", None),
    ],
    ids=["AST", "Wav2Vec2", "no processor"],
)
def test_extract_takes_along_the_processor_that_is_there(tmp_path, image_run, capsys, name, processor):
    case, parent, module = case_of(name), tmp_path / "parent", tmp_path / "module"
    model = case.masked(generator_hidden_size=2)
    model.save_pretrained(parent)
    if processor is not None:
        processor.save_pretrained(parent)
    batch = {**case.inputs(), "labels": torch.tensor([0, 1, 2, 3])}
    collect_statistics(model, [batch], disable_tqdm=True).save_pretrained(parent)
    assert cli.main(["extract", str(parent), "--labels", *ANIMALS[:2], "--output", str(module)]) == 0
    if processor is not None:
        assert type(AutoFeatureExtractor.from_pretrained(module)) is type(processor)
        return
    assert not (module / "preprocessor_config.json").exists()
    assert cli.main(["evaluate", str(module), "--dataset_name", str(image_run / "data")]) == 1
    assert (
        f"There is no image processor in {module} to read the dataset with. Save it there" in capsys.readouterr().err
    )
