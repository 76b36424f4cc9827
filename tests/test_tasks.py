# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Data and new models on the command line: columns, labels, configurations, processors."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from nemo_hf import NemoValueError, task_data, tasks


TEXTS = ["one two three", "four five six", "two four"]


def images():
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    pictures = [PILImage.new("RGB", (20, 12), colour) for colour in ("black", "white")]
    return Dataset.from_dict({"image": pictures, "label": [0, 1]}, features=features)


def texts():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2]}, features=features)


def new_model(dataset, **options):
    model = tasks.ModelArguments(train_tokenizer=True, vocab_size=60, **options)
    columns = task_data.find_columns(dataset, task_data.DataArguments(dataset_name="here"))
    processor = tasks.load_processor(model, columns, dataset, 32)
    return tasks.load_model(model, columns, processor), processor


def test_derived_values_follow_the_overrides():
    overrides = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1,intermediate_size=64"
    model, tokenizer = new_model(texts(), model_type="llama", config_overrides=overrides)
    assert model.model.layers[0].self_attn.head_dim == 16  # not that of the default sizes
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert (model.config.vocab_size, model.config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    assert model.config.eos_token_id == tokenizer.sep_token_id


def test_lists_come_as_json_and_convolutional_networks_take_the_images_as_they_are():
    overrides = '{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}'
    model, processor = new_model(images(), model_type="resnet", config_overrides=overrides)
    assert [len(stage.layers) for stage in model.resnet.encoder.stages] == [1, 2]
    assert processor(images()["image"][:1], return_tensors="pt")["pixel_values"].shape == (1, 3, 12, 20)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("nonesuch=1", "key nonesuch isn't"),
        ("{", "Expecting property name"),
        ("hidden_size", "dictionary update sequence"),
    ],
)
def test_wrong_overrides_are_refused(overrides, text):
    with pytest.raises(NemoValueError, match=f"config_overrides must be hidden_size=96.*{text}"):
        new_model(images(), model_type="vit", config_overrides=overrides)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_type": "vit"}, "--model_type is for a new model"),
        ({"config_overrides": "hidden_size=8"}, "--config_overrides is for a new model"),
        ({"config_overrides": "a=8", "train_tokenizer": True}, "--config_overrides, --train_tokenizer are for a new"),
    ],
)
def test_options_of_new_models_are_refused_beside_a_pretrained_one(options, text):
    with pytest.raises(NemoValueError, match=f"{text}.*names the pretrained some/model. Leave out one"):
        tasks.ModelArguments(model_name_or_path="some/model", **options)


@pytest.fixture
def decoder(tmp_path):
    """A pretrained GPT-2 as there are many: no token to pad with, neither in the tokenizer nor in the config."""
    tokenizer = tasks.train_wordpiece(TEXTS, 60, 16)
    GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3).save_pretrained(tmp_path)
    GPT2ForSequenceClassification(GPT2Config.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]").save_pretrained(tmp_path)
    return tmp_path


def test_decoders_without_a_pad_token_pad_with_the_end(decoder):
    dataset = texts()
    arguments, columns = tasks.ModelArguments(model_name_or_path=str(decoder)), columns_of(dataset)
    processor = tasks.load_processor(arguments, columns, dataset, None)
    model = tasks.load_model(arguments, columns, processor)
    assert (processor.pad_token, model.config.pad_token_id) == ("[SEP]", processor.convert_tokens_to_ids("[SEP]"))

    trained = tasks.load_checkpoint(str(decoder), is_image=False)
    processor = tasks.processor_of(str(decoder), trained, is_image=False)
    for classifier in (model, trained):
        encoded = task_data.encode(dataset, columns, processor, {"a": 0, "b": 1})
        batch = next(iter(task_data.dataloader(encoded, processor, False, 2)))
        assert classifier(**batch).logits.shape[0] == 2


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(decoder):
    backend = tasks.train_wordpiece(TEXTS, 60, 16).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(decoder)
    model = tasks.load_checkpoint(str(decoder), is_image=False)
    with pytest.raises(NemoValueError, match="has neither a pad_token nor an eos_token.*Give it one"):
        tasks.processor_of(str(decoder), model, is_image=False)


def labelled(column, values, feature, **more):
    features = Features({column: Value("string"), "label": feature, **dict.fromkeys(more, Value("string"))})
    return Dataset.from_dict({column: TEXTS, "label": values, **more}, features=features)


def columns_of(dataset, **arguments):
    return task_data.find_columns(dataset, task_data.DataArguments(dataset_name="here", **arguments))


def test_text_columns_of_csv_files_are_texts():
    features = Features({"text": Value("large_string"), "domain": Value("large_string"), "label": Value("int64")})
    dataset = Dataset.from_dict({"text": TEXTS, "domain": ["x", "y", "x"], "label": [0, 1, 1]}, features=features)
    assert columns_of(dataset) == task_data.Columns("text", "label", ["0", "1"], is_image=False)


def test_one_of_several_text_columns_must_be_named():
    dataset = labelled("question", [0, 1, 0], ClassLabel(names=["no", "yes"]), answer=TEXTS)
    with pytest.raises(NemoValueError, match="several columns with texts: question, answer. Name the one to use"):
        columns_of(dataset)
    assert columns_of(dataset, input_column="answer").inputs == "answer"
    dataset = labelled("text", [0, 1, 0], ClassLabel(names=["no", "yes"]), id=["1", "2", "3"])
    assert columns_of(dataset).inputs == "text"


def test_one_of_several_label_columns_must_be_named():
    classes = ClassLabel(names=["no", "yes"])
    values = {"text": TEXTS, "coarse_label": [0, 1, 0], "fine_label": [1, 1, 0]}
    dataset = Dataset.from_dict(values).cast_column("coarse_label", classes).cast_column("fine_label", classes)
    with pytest.raises(
        NemoValueError, match="several columns with labels: coarse_label, fine_label. Name the one to use with --label"
    ):
        columns_of(dataset)
    assert columns_of(dataset, label_column="coarse_label").label == "coarse_label"
    assert columns_of(dataset.add_column("label", [0, 0, 1])).label == "label"
    assert columns_of(dataset.remove_columns("fine_label")).label == "coarse_label"
    both = dataset.rename_columns({"coarse_label": "label", "fine_label": "labels"})
    with pytest.raises(NemoValueError, match="several columns with labels: label, labels"):
        columns_of(both)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("data.py", "", "Dataset scripts are no longer supported"), ("train.json", "{", "generating the dataset")],
    ids=["script", "damaged"],
)
def test_folders_that_datasets_cannot_read(tmp_path, name, content, reason):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(NemoValueError, match=f"cannot be loaded as a dataset: .*{reason}.*with Parquet, CSV or JSON"):
        task_data.load_split(task_data.DataArguments(str(folder)))


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([-1, 1, 0], ClassLabel(names=["a", "b"])),
        ([None, 1, 0], ClassLabel(names=["a", "b"])),
        ([None, "b", "a"], Value("string")),
    ],
    ids=["-1", "no id", "no name"],
)
def test_samples_without_a_label_are_left_out(values, feature):
    dataset = labelled("text", values, feature)
    columns = columns_of(dataset)
    assert columns.names == ["a", "b"]
    tokenizer = tasks.train_wordpiece(TEXTS, 60, 16)
    assert task_data.encode(dataset, columns, tokenizer, {"a": 0, "b": 1})["labels"] == [1, 0]


def test_a_split_without_labels_is_refused():
    dataset = labelled("text", [-1, -1, -1], ClassLabel(names=["a", "b"]))
    tokenizer = tasks.train_wordpiece(TEXTS, 60, 16)
    with pytest.raises(NemoValueError, match="No sample has a label.*--eval_split validation"):
        task_data.encode(dataset, columns_of(dataset), tokenizer, {"a": 0, "b": 1})
    dataset = labelled("text", [-1, -1, -1], Value("int64"))
    with pytest.raises(NemoValueError, match=r"labels \(-1\) is a label of the model \(0, 1\)"):
        task_data.encode(dataset, columns_of(dataset), tokenizer, {"0": 0, "1": 1})


@pytest.fixture
def many_labels(tmp_path):
    """A folder whose labels are plain texts: ten in `train`, and one more in `test`."""
    for split, names in (("train", [f"c{i % 10}" for i in range(60)]), ("test", [f"c{i}" for i in range(11)])):
        values = {"text": [f"text of {name}" for name in names], "label": [None, *names[1:]]}
        Dataset.from_dict(values).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    return task_data.DataArguments(str(tmp_path), max_train_samples=5)


def test_names_of_labels_are_those_of_the_whole_split(many_labels):
    train, evaluation, columns = task_data.load_splits(many_labels, 0, None)
    assert (len(train), len(evaluation)) == (5, 11)
    assert columns.names == [f"c{i}" for i in range(10)]
    assert task_data.load_train_split(many_labels, 0)[1] == columns


def test_samples_that_are_left_out_are_counted(many_labels, caplog):
    _, evaluation, columns = task_data.load_splits(many_labels, 0, None)
    tokenizer = tasks.train_wordpiece(TEXTS, 60, 16)
    label2id = {name: i for i, name in enumerate(columns.names)}
    assert len(task_data.encode(evaluation, columns, tokenizer, label2id)) == 9
    text = "2 of 11 samples are left out: 1 have no label, the others one that the model does not have (c10)"
    assert text in caplog.text
    caplog.clear()
    task_data.encode(evaluation, columns, tokenizer, {"c2": 0}, for_module=True)  # it is of some labels only
    assert caplog.text == ""


def test_lists_of_labels_are_refused():
    dataset = labelled("text", [[0], [0, 1], []], List(Value("int64")))
    with pytest.raises(NemoValueError, match="does not hold one label for each sample"):
        columns_of(dataset)


@pytest.mark.parametrize("dtype", ["float32", "float64", "decimal128(4, 1)"])
def test_fractions_are_no_classes(dtype):
    dataset = labelled("text", [0.5, 1.25, 3.0], Value("float64")).cast_column("label", Value(dtype))
    with pytest.raises(NemoValueError, match="Regression targets have no classes .*'label' of .*cast the column"):
        columns_of(dataset)
    dataset = labelled("text", [0.0, 1.0, 1.0], Value("float64")).cast_column("label", Value("int64"))
    assert columns_of(dataset).names == ["0", "1"]


def test_texts_are_as_long_as_in_training_unless_said_otherwise():
    dataset = labelled("text", [0, 1, 0], ClassLabel(names=["a", "b"]))
    tokenizer = tasks.train_wordpiece(TEXTS, 60, 4)
    encoded = task_data.encode(dataset, columns_of(dataset), tokenizer, {"a": 0, "b": 1})
    assert {len(ids) for ids in encoded["input_ids"]} == {4}
    encoded = task_data.encode(dataset, columns_of(dataset), tokenizer, {"a": 0, "b": 1}, max_length=3)
    assert {len(ids) for ids in encoded["input_ids"]} == {3}


def test_the_length_of_training_is_kept_with_a_pretrained_tokenizer(tmp_path):
    tasks.train_wordpiece(TEXTS, 60, 512).save_pretrained(tmp_path)
    dataset = texts()
    model = tasks.ModelArguments(model_name_or_path=str(tmp_path))
    for given, expected in ((None, 128), (300, 300)):
        assert tasks.load_processor(model, columns_of(dataset), dataset, given).model_max_length == expected


def test_a_trained_tokenizer_is_the_same_in_every_process():
    script = (
        "import hashlib, json; from nemo_hf import tasks; "
        "texts = [f'{a}{b}{c} {c}{a}' for a in 'abcdefgh' for b in 'ijklmnop' for c in 'qrstuvwxyz']; "
        "tokenizer = tasks.train_wordpiece(texts, 150, 16); "
        "print(hashlib.md5(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1, runs
    assert runs[0].stdout, runs[0].stderr


def test_the_example_trains_the_same_tokenizer():
    script = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "text_classification.py"))
    assert script["train_wordpiece"] is tasks.train_wordpiece


def test_letters_inside_words_are_ordinary_tokens():
    tokenizer = tasks.train_wordpiece(["a ##b ab b", "xyz xyz"], 40, 16)
    assert tokenizer.tokenize("a ##b") == ["a", "#", "#", "b"]
    assert tokenizer.tokenize("XYZ") == ["xyz"]
    assert tokenizer.decode(tokenizer("abx")["input_ids"], skip_special_tokens=True) == "abx"
    assert set(tokenizer.all_special_tokens) == set(tasks.SPECIAL_TOKENS)
