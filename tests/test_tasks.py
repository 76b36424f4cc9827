# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""New models on the command line: their configuration and their processor."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from nemo_hf import NemoValueError, tasks


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
    columns = tasks.find_columns(dataset, tasks.DataArguments(dataset_name="here"))
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
    [("nonesuch=1", "key nonesuch isn't"), ("{", "Expecting property name"), ("hidden_size", "dictionary update sequence")],
)
def test_wrong_overrides_are_refused(overrides, text):
    with pytest.raises(NemoValueError, match=f"config_overrides must be name=value.*{text}"):
        new_model(images(), model_type="vit", config_overrides=overrides)
