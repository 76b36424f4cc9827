# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Datasets for image or text classification: splits, columns, model inputs, batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging

from .errors import NemoValueError
from .labels import OTHER_COLUMN, REGRESSION


logger = logging.get_logger(__name__)

LABEL_COLUMNS = ("label", "labels")
TEXT_COLUMNS = ("text", "sentence")
TRAIN_LENGTH = 128  # tokens, where nothing else is said


@dataclass
class SourceArguments:
    """Where the data are. Columns are found by their types unless they are named."""

    dataset_name: str = field(metadata={"help": "A dataset on the Hub, or a local folder in the Hub's layout."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    input_column: str | None = field(default=None, metadata={"help": "Column with the images or the texts."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the labels."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest text in tokens; the rest is cut off. Defaults to 128 for training, and then to what the "
            "model was trained with."
        },
    )


@dataclass
class TrainDataArguments(SourceArguments):
    """Data to train on, or to learn masks from."""

    train_split: str = field(default="train", metadata={"help": "Split to train on, or to learn masks from."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many random samples of it only."})


@dataclass
class EvalDataArguments(SourceArguments):
    """Data to evaluate on."""

    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Defaults to the test split, or else the validation split."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many samples only."}
    )


@dataclass
class DataArguments(TrainDataArguments, EvalDataArguments):
    """Both."""


@dataclass
class OptionalEvalDataArguments(EvalDataArguments):
    """Data to evaluate on where a command can do without."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the Hub, or a local folder in the Hub's layout."}
    )


@dataclass
class Columns:
    """The columns of a classification dataset and the names of its labels."""

    inputs: str
    label: str
    names: list[str]
    is_image: bool


def load_split(data: SourceArguments, split: str | None = None) -> Dataset:
    """
    One split of the dataset; without a name the test split, or else the validation split.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if there is no such split, or `datasets` cannot read the dataset.
    """
    try:
        splits = load_dataset(data.dataset_name, data.dataset_config_name)
    except (RuntimeError, DatasetsError) as error:  # a loading script, or damaged files
        raise NemoValueError(
            f"{data.dataset_name} cannot be loaded as a dataset: {error}. Give a repository or a folder with Parquet, "
            "CSV or JSON files, or with images, and without a loading script."
        ) from error
    candidates = [split] if split else [name for name in ("test", "validation") if name in splits]
    if not candidates or candidates[0] not in splits:
        raise NemoValueError(f"{data.dataset_name} has no split {split or 'test'!r}; it has {', '.join(splits)}.")
    return splits[candidates[0]]


def load_train_split(data: TrainDataArguments, seed: int) -> tuple[Dataset, Columns]:
    """
    The split to train on, `max_train_samples` random samples of it, and the columns of the whole split: also labels
    without a sample among these have their names.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if there is no such split, or its columns are not clear.
    """
    split = load_split(data, data.train_split)
    columns = find_columns(split, data)
    if data.max_train_samples:
        split = split.shuffle(seed=seed).select(range(min(len(split), data.max_train_samples)))
    return split, columns


def load_splits(data: DataArguments, seed: int, group_column: str | None) -> tuple[Dataset, Dataset, Columns]:
    """
    The splits to train and to evaluate on, and the columns of the first. Texts in the group column become
    `ClassLabel`, the same in both.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if there is no such split or column, or the columns are not clear.
    """
    train, columns = load_train_split(data, seed)
    evaluation = _first_samples(load_split(data, data.eval_split), data)
    if group_column is not None and _is_text(_feature(train, group_column)):
        names = {value for value in (*train[group_column], *evaluation[group_column]) if value is not None}
        feature = ClassLabel(names=sorted(names))
        train, evaluation = (split.cast_column(group_column, feature) for split in (train, evaluation))
    return train, evaluation, columns


def load_eval_split(data: EvalDataArguments, group_column: str | None = None) -> tuple[Dataset, Columns]:
    """
    The split to evaluate on, the first `max_eval_samples` of it, and its columns. Texts in the group column become
    `ClassLabel`.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if there is no such split or column, or the columns are not clear.
    """
    split = load_split(data, data.eval_split)
    columns = find_columns(split, data)
    split = _first_samples(split, data)
    if group_column is not None and _is_text(_feature(split, group_column)):
        split = split.class_encode_column(group_column)
    return split, columns


def _first_samples(split: Dataset, data: EvalDataArguments) -> Dataset:
    return split.select(range(min(len(split), data.max_eval_samples))) if data.max_eval_samples else split


def _feature(dataset: Dataset, column: str) -> Any:
    if column not in dataset.features:
        raise NemoValueError(f"The dataset has no column {column!r}; it has {', '.join(dataset.features)}.")
    return dataset.features[column]


def find_columns(dataset: Dataset, data: SourceArguments) -> Columns:
    """
    Find the columns with the inputs and the labels by their types, unless the arguments name them.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if there are none, or several with texts or with labels, a sample has
            several labels, or the labels are fractions.
    """
    features = dataset.features
    for name in (data.input_column, data.label_column):
        if name is not None:
            _feature(dataset, name)
    label = data.label_column or _find_label_column(dataset)
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    texts = [name for name, feature in features.items() if _is_text(feature) and name != label]
    texts = [name for name in TEXT_COLUMNS if name in texts] or texts
    inputs = data.input_column or next(iter(images + texts), None)
    if inputs is None:
        raise NemoValueError(f"The dataset has neither images nor texts, only {', '.join(features)}.")
    if data.input_column is None and not images and len(texts) > 1:
        raise NemoValueError(
            f"The dataset has several columns with texts: {', '.join(texts)}. Name the one to use with "
            "--input_column; join them into one first if the model shall read more."
        )
    feature = features[label]
    if not isinstance(feature, ClassLabel | Value):
        raise NemoValueError(
            f"The column {label!r} does not hold one label for each sample, but {feature}. Samples of several labels "
            "are for `ModularTrainer` in a script."
        )
    if feature.dtype.startswith(("float", "double", "decimal")):
        raise NemoValueError(
            f"{REGRESSION}: got the column {label!r} of {feature.dtype}. If its numbers stand for classes, cast the "
            f"column to int64 or to `ClassLabel`. Otherwise train in a script. {OTHER_COLUMN}"
        )
    names = feature.names if isinstance(feature, ClassLabel) else _names(set(dataset[label]))
    return Columns(inputs, label, names, isinstance(features[inputs], Image))


def _find_label_column(dataset: Dataset) -> str:
    """The column called `label`, or else the only one of class labels."""
    features = dataset.features
    found = [name for name in LABEL_COLUMNS if name in features]
    found = found or [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not found:
        raise NemoValueError(
            f"The dataset has no labels: none of its columns {', '.join(features)} is called `label` or holds class "
            "labels. Name the one to use with --label_column."
        )
    if len(found) > 1:
        raise NemoValueError(
            f"The dataset has several columns with labels: {', '.join(found)}. Name the one to use with "
            "--label_column."
        )
    return found[0]


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _names(values: set[Any]) -> list[str]:
    """Names for the labels that a column without names holds; `None` is no label."""
    return [str(value) for value in sorted(values - {None})]


def encode(
    dataset: Dataset,
    columns: Columns,
    processor: Any,
    label2id: dict[str, int],
    max_length: int | None = None,
    group_column: str | None = None,
    for_module: bool = False,
) -> Dataset:
    """
    The dataset as model inputs with the label ids of a model, and the groups if there is a column for them; samples
    without a label, or with one that the model does not have, are left out, with a warning unless the model is a
    module. Texts are cut at `max_length` tokens, by default at the `model_max_length` of the tokenizer.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if no sample is left.
    """
    names = label_names(dataset, columns)
    ids = np.array([-1 if name is None else label2id.get(name, -1) for name in names], dtype=np.int64)
    if not (ids >= 0).any():
        found = _names(set(names))[:10]
        if not found:
            raise NemoValueError(
                "No sample has a label, as in test splits whose labels are kept secret. Choose another split, such as "
                "--eval_split validation."
            )
        raise NemoValueError(
            f"None of the dataset's labels ({', '.join(found)}) is a label of the model "
            f"({', '.join(list(label2id)[:10])})."
        )
    kept = np.flatnonzero(ids >= 0)
    if len(kept) < len(names) and not for_module:
        others = _names(set(names) - set(label2id))
        logger.warning(
            f"{len(names) - len(kept)} of {len(names)} samples are left out: {names.count(None)} have no label, the "
            f"others one that the model does not have ({', '.join(others[:10]) or '–'})."
        )
    groups = [] if group_column is None else [group_column]
    dataset = dataset.select(kept).select_columns([columns.inputs, *groups]).add_column("labels", ids[kept])
    if not columns.is_image:
        longest = max_length or processor.model_max_length
        longest = TRAIN_LENGTH if longest > VERY_LARGE_INTEGER // 2 else longest  # the tokenizer knows of no limit
        return dataset.map(
            lambda batch: processor(batch[columns.inputs], truncation=True, max_length=longest),
            batched=True,
            remove_columns=columns.inputs,
        )

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[columns.inputs]]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            **{name: batch[name] for name in ("labels", *groups)},
        }

    return dataset.with_transform(transform)


def label_names(dataset: Dataset, columns: Columns) -> list[str | None]:
    """The name of the label of every sample; `None` where it has none: no value, or -1 in a `ClassLabel`."""
    feature, values = dataset.features[columns.label], list(dataset[columns.label])
    if isinstance(feature, ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else None for value in values]
    return [None if value is None else str(value) for value in values]


def dataloader(dataset: Dataset, processor: Any, is_image: bool, batch_size: int) -> DataLoader:
    """Batches of encoded samples in their order."""
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collator(processor, is_image))


def collator(processor: Any, is_image: bool) -> Any:
    """What makes a batch of encoded samples."""
    return collate_images if is_image else DataCollatorWithPadding(processor)


def collate_images(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack images of one size, their labels and groups."""
    numbers = samples[0].keys() - {"pixel_values"}
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        **{name: torch.tensor([sample[name] for sample in samples]) for name in numbers},
    }
