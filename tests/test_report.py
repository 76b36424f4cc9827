# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The report: its figures, files and errors. The page in a browser: `test_report_browser.py`."""

import base64
import json
import re
import shutil
import sys

import pytest
import torch
from datasets import Image
from models import CASES, LABELS, VIT, module_masks
from test_cli import IMAGE_MODEL, TRAINING, draw, write_dataset

from nemo_hf import (
    CheckpointError,
    NemoError,
    NemoRuntimeError,
    NemoValueError,
    NeuronStatistics,
    apply_masks,
    cli,
    extract_module,
    hold_gates,
    metrics,
    write_report,
)
from nemo_hf.extraction import constant_gates, module_parameters
from nemo_hf.masking import masked_layers
from nemo_hf.report import read_log_history
from nemo_hf.report_data import training_panels
from nemo_hf.slim import layer_sizes


HOSTILE = [
    "<script>document.title='taken'</script>",
    "</script><img src=x onerror=document.title='taken'>",
    "日本語, 🐱 & عربي",
    "$x_1$ | `pipe` \\ [link](https://example.com)",
    'it\'s "quoted"\nin two lines',
]
MANY = [f"label {i}" for i in range(100)]


def statistics_of(model, names, seed=0, grouped_by=None):
    """Random counts over 20 samples per label: about a fifth of the neurons reach the threshold of 0.9."""
    generator = torch.Generator().manual_seed(seed)
    layers = {name: layer_sizes(layer)[1] for name, layer in masked_layers(model).items()}
    statistics = NeuronStatistics(names, layers, grouped_by=grouped_by)
    rate = torch.where(torch.rand(len(names), sum(layers.values()), generator=generator) < 0.2, 1.0, 0.3)
    for _ in range(20):
        gates = (torch.rand(rate.shape, generator=generator) < rate).float()
        statistics.update(
            dict(zip(layers, gates.split(list(layers.values()), 1), strict=True)), torch.arange(len(names))
        )
    return statistics


def batches(labels, size=40, **columns):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
            "labels": torch.arange(size) % labels,
            **columns,
        }
        for _ in range(2)
    ]


def checkpoint(folder, names=LABELS, grouped_by=None, groups=None):
    """A modular checkpoint with statistics and a log."""
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = VIT.model(**named)
    model = apply_masks(model)
    model.save_pretrained(folder)
    statistics_of(model, groups or names, grouped_by=grouped_by).save_pretrained(folder)
    logs = [
        {"loss": 1.0, "loss_task": 0.7, "grad_norm": float("nan"), "neuron_retention": 1.0, "epoch": 1.0, "step": 5},
        {"eval_loss": 0.9, "eval_accuracy": 0.5, "eval_runtime": 3.0, "epoch": 1.0, "step": 5},
        {"loss": 0.5, "loss_task": 0.4, "grad_norm": 1.0, "neuron_retention": 0.4, "epoch": 2.0, "step": 10},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of five labels with accuracies: model, folder of the report, figures."""
    folder = tmp_path_factory.mktemp("report")
    model = checkpoint(folder / "model")
    figures = write_report(folder / "model", folder / "report", batches(len(LABELS)))
    return model, folder, figures


def data_of(path):
    """The data inside a page, as a browser would find them: up to the first end tag."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)[1])


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_are_those_of_the_extracted_module(case, masked):
    parent = case.masked() if masked else case.model()
    before = {name: parameter.device.type for name, parameter in parent.named_parameters()}
    masks = module_masks(parent)
    selections = [["cat"], ["elk", "ant"], LABELS]
    expected = [metrics.count_parameters(extract_module(parent, masks, labels)) for labels in selections]
    assert module_parameters(parent, masks, selections) == expected
    assert {name: parameter.device.type for name, parameter in parent.named_parameters()} == before


def test_figures_are_those_of_masks_and_modules(written):
    model, folder, figures = written
    masks = NeuronStatistics.from_pretrained(folder / "model").module_masks()
    assert figures == json.loads((folder / "report" / "report.json").read_text())
    assert [len(module["labels"]) for module in figures["modules"]] == [1] * 5 + [2] * 10 + [5]
    for module in figures["modules"]:
        nemo = extract_module(model, masks, module["labels"]).config.nemo
        assert module["neuron_retention"] == nemo["neuron_retention"] == masks.retention(module["labels"])
        assert module["parameter_retention"] == nemo["parameter_retention"]
    assert figures["coupling"] == masks.coupling()
    assert figures["overlap"][0][1] == pytest.approx(_jaccard(masks["ant"], masks["bee"]))
    for label, kept in zip(LABELS, figures["kept_per_layer"], strict=True):
        assert kept == [int(mask.sum()) for mask in masks[label].values()]


def _jaccard(first, second):
    one, two = (torch.cat(list(mask.values())) for mask in (first, second))
    return (one & two).sum().item() / (one | two).sum().item()


@torch.no_grad()
def test_accuracies_are_those_of_the_modules(written):
    model, folder, figures = written
    masks = NeuronStatistics.from_pretrained(folder / "model").module_masks()
    data = batches(len(LABELS))
    for module in figures["modules"]:
        ids = torch.tensor([LABELS.index(label) for label in module["labels"]])
        cut = extract_module(model, masks, module["labels"])
        hits = total = 0
        for batch in data:
            rows = torch.isin(batch["labels"], ids)
            answers = ids[cut(pixel_values=batch["pixel_values"][rows]).logits.argmax(1)]
            hits, total = hits + int((answers == batch["labels"][rows]).sum()), total + int(rows.sum())
        if len(ids) > 1:
            assert module["accuracy"] == pytest.approx(hits / total, abs=1 / total)  # rounding may swap close logits
            assert module["num_eval_samples"] == total
        else:
            assert "accuracy" not in module
    evaluation = figures["evaluation"]
    assert evaluation["num_samples"] == 80
    pair = next(module for module in figures["modules"] if module["labels"] == ["ant", "bee"])
    errors = evaluation["errors_pairs"]
    assert pair["accuracy"] == pytest.approx(1 - (errors[0][1] + errors[1][0]) / 2)
    for recall, row in zip(evaluation["recall"], evaluation["errors_all"], strict=True):
        assert recall + sum(row) == pytest.approx(1)


def test_without_data_there_are_no_accuracies(written, tmp_path):
    _, folder, _ = written
    figures = write_report(folder / "model", tmp_path)
    assert "evaluation" not in figures
    assert not any("accuracy" in module for module in figures["modules"])
    assert "accuracy |" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "accuracy_size.png").exists()


def test_files_plots_and_curves(written):
    _, folder, figures = written
    names = {"report.html", "report.md", "report.json", "kept_neurons.png", "overlap.png"}
    assert {path.name for path in (folder / "report").iterdir()} == names | {"accuracy_size.png", "training.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (folder / "report").glob("*.png"))
    assert figures["log_history"][0]["grad_norm"] is None  # JSON knows no NaN
    panels = {panel["title"]: panel for panel in training_panels(figures["log_history"])}
    assert [series["name"] for series in panels["Training loss"]["series"]] == ["loss", "loss_task"]
    assert panels["Training loss"]["series"][0]["points"] == [[1.0, 1.0], [2.0, 0.5]]
    scores = [series["name"] for series in panels["Shares and scores"]["series"]]
    assert scores == ["neuron_retention", "eval_accuracy"]


def test_the_page_holds_the_masks(written):
    _, folder, figures = written
    masks = NeuronStatistics.from_pretrained(folder / "model").module_masks()
    data = data_of(folder / "report" / "report.html")
    joined = [base64.b64decode(text) for text in data["bits"]]
    union = [a | b for a, b in zip(joined[0], joined[3], strict=True)]
    assert sum(byte.bit_count() for byte in union) == sum(int(m.sum()) for m in masks.union(["ant", "dog"]).values())
    assert data["modules"] == figures["modules"]


@pytest.mark.parametrize("names", [HOSTILE, MANY], ids=["hostile", "hundred"])
def test_hostile_and_many_labels(names, tmp_path):
    checkpoint(tmp_path / "model", names)
    figures = write_report(tmp_path / "model", tmp_path / "report", batches(len(names), size=len(names)))
    assert figures["labels"] == names
    assert len(figures["modules"]) == (16 if names is HOSTILE else 101)
    text = (tmp_path / "report" / "report.html").read_text()
    assert data_of(tmp_path / "report" / "report.html")["labels"] == names
    assert len(re.findall(r"<script", text)) == 2
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg|https://example.com", "", text)
    table = (tmp_path / "report" / "report.md").read_text()
    assert "<script" not in table
    assert "<img" not in table
    assert not re.search(r"(?<!\\)\]\(https", table)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_by_group(tmp_path):
    model = checkpoint(tmp_path / "model", grouped_by="domain", groups=["news", "mail", "chat"])
    names = {7: "chat", 3: "news", 5: "mail", 9: "unknown"}
    domain = torch.tensor([7, 3, 5, 9]).repeat(10)
    data = batches(len(LABELS), domain=domain)
    figures = write_report(tmp_path / "model", tmp_path / "report", data, groups=names)
    assert figures["groups"] == ["news", "mail", "chat"]
    assert "labels" not in figures
    masks = NeuronStatistics.from_pretrained(tmp_path / "model").module_masks()
    for module in figures["modules"]:
        module_config = extract_module(model, masks, groups=module["groups"]).config
        assert module["parameter_retention"] == module_config.nemo["parameter_retention"]
    own = figures["modules"][1]
    with torch.no_grad(), hold_gates(model, constant_gates(model, masks, ["mail"], "mean")):
        hits = [
            (model(pixel_values=batch["pixel_values"]).logits.argmax(1) == batch["labels"])[domain == 5]
            for batch in data
        ]
    assert own["accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert figures["evaluation"]["accuracy_alone"][1] == own["accuracy"]
    assert "masks by group ('domain')" in (tmp_path / "report" / "report.md").read_text()
    with pytest.raises(NemoValueError, match="by group .'domain'., so groups= must name the groups in the data"):
        write_report(tmp_path / "model", tmp_path / "report", data)


def test_matplotlib_is_asked_for_before_any_work(written, tmp_path, monkeypatch):
    _, folder, _ = written
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NemoRuntimeError, match=r"pip install nemo_hf\[report\]"):
        write_report(folder / "model", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def damaged(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-50])


def as_module(folder):
    shutil.copy(folder / "neuron_statistics.safetensors", folder.parent)
    model = VIT.model()
    module = extract_module(model, module_masks(model), ["cat", "dog"])
    shutil.rmtree(folder)
    module.save_pretrained(folder)
    shutil.move(folder.parent / "neuron_statistics.safetensors", folder)


def other_statistics(folder):
    statistics_of(VIT.masked(skip_first_blocks=2), LABELS[:3]).save_pretrained(folder)
    statistics = NeuronStatistics.from_pretrained(folder)
    statistics.labels[0] = "zebra"
    statistics.save_pretrained(folder)


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda folder: (folder / "neuron_statistics.safetensors").unlink(), "There is no neuron_statistics"),
        (lambda folder: damaged(folder, "neuron_statistics.safetensors"), "is damaged or was not written by nemo_hf"),
        (lambda folder: damaged(folder, "model.safetensors"), "cannot be loaded.*weights are damaged"),
        (lambda folder: damaged(folder, "trainer_state.json"), "Remove it for a report without training curves"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"log_history": [1]}'), "is damaged"),
        (lambda folder: VIT.model().save_pretrained(folder), "is not a modular checkpoint"),
        (as_module, "is not a modular checkpoint.*It is a module"),
        (other_statistics, "Unknown label 'zebra'"),
    ],
    ids=["missing", "cut statistics", "cut weights", "cut log", "odd log", "plain", "module", "other statistics"],
)
def test_bad_checkpoints(harm, text, written, tmp_path):
    shutil.copytree(written[1] / "model", tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(NemoError, match=text):
        write_report(tmp_path / "model", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_curves_of_the_last_checkpoint_and_of_none(tmp_path):
    assert read_log_history(tmp_path) == []
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0, "step": 1}]}')
    assert read_log_history(tmp_path) == [{"loss": 1.0, "step": 1}]
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="trainer_state.json is damaged"):
        read_log_history(tmp_path)


def test_labels_that_are_no_classes_are_refused(written, tmp_path):
    _, folder, _ = written
    data = [{**batch, "labels": torch.zeros(40, 5)} for batch in batches(5)]
    with pytest.raises(NemoValueError, match="Accuracies need one integer label per sample"):
        write_report(folder / "model", tmp_path / "report", data)


def test_no_samples_and_labels_without_samples(written, tmp_path):
    _, folder, _ = written
    with pytest.raises(NemoValueError, match="no samples to measure accuracies on"):
        write_report(folder / "model", tmp_path / "report", [])
    figures = write_report(folder / "model", tmp_path / "report", batches(2))
    missing = next(module for module in figures["modules"] if module["labels"] == ["dog", "elk"])
    assert (missing["accuracy"], missing["num_eval_samples"]) == (None, 0)
    assert figures["evaluation"]["recall"][3:] == [None, None]


def test_statistics_of_one_label(tmp_path):
    model = checkpoint(tmp_path / "model")
    statistics = statistics_of(model, LABELS)
    statistics.num_samples[1:] = 0
    statistics.save_pretrained(tmp_path / "model")
    figures = write_report(tmp_path / "model", tmp_path / "report", batches(len(LABELS)))
    assert [module["labels"] for module in figures["modules"]] == [["ant"]]
    assert figures["coupling"] is None
    assert "accuracy" not in figures["modules"][0]


@pytest.mark.parametrize("groups", [None, ["web", "mail"]], ids=["labels", "groups"])
def test_command_line(groups, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    column = {} if groups is None else {"source": groups}
    data = write_dataset(tmp_path / "data", "image", Image(), draw, **column)
    model = str(tmp_path / "model")
    options = [] if groups is None else ["--group_column", "source"]
    assert cli.main(["train", *IMAGE_MODEL, "--dataset_name", data, "--output_dir", model, *TRAINING, *options]) == 0
    arguments = ["report", model, "--output", str(tmp_path / "report"), "--json", str(tmp_path / "figures.json")]
    assert cli.main([*arguments, "--dataset_name", data, "--threshold", "0.8", "--max_pair_labels", "2"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["threshold"] == 0.8
    assert figures["evaluation"]["num_samples"] == 12
    assert figures["log_history"]  # `nemo-hf train` saves the state of the trainer
    sizes = [len(module["labels" if groups is None else "groups"]) for module in figures["modules"]]
    assert sizes == ([1, 1, 1, 3] if groups is None else [1, 1, 2])
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "data")]) == 1
