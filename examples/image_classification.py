# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Train an image classifier that becomes modular, and cut a small module for some of its labels out of it."""

import os
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from datasets import ClassLabel, load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    ViTImageProcessor,
    set_seed,
)

from nemo_hf import ModularConfig, ModularTrainer, ModularTrainingArguments, extract_module, save_module


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "Checkpoint to start from: Hub name or folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head of a checkpoint that has another number of labels."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Train a model of this type (`vit`, `deit`) from scratch instead."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "For training from scratch: `hidden_size=96,num_hidden_layers=6,…`"}
    )
    target_modules: str = field(
        default="all", metadata={"help": "Layers to mask: all, ffn, attention, or a regular expression over names."}
    )
    skip_first_blocks: int = field(default=1, metadata={"help": "Number of encoder blocks that stay unmasked."})
    generator_hidden_size: int = field(
        default=16, metadata={"help": "Hidden width of the mask generators; 0: the paper's full width."}
    )
    gate: Literal["soft", "hard"] = field(default="soft", metadata={"help": "Gates in [0, 1], or 0 or 1."})
    threshold: float = field(
        default=0.9, metadata={"help": "A label needs the neurons that this share of its samples opens."}
    )
    module_labels: list[str] | None = field(
        default=None, metadata={"help": "Names of the labels of the module. Defaults to the first two."}
    )
    module_gates: Literal["mean", "binary"] = field(
        default="mean", metadata={"help": "What multiplies the neurons of the module: class-mean gates, or one."}
    )


@dataclass
class DataArguments:
    dataset_name: str = field(metadata={"help": "Data set with class labels: Hub name or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    test_split_name: str = field(default="test", metadata={"help": "Split for the final evaluation."})
    train_val_split: float | None = field(
        default=None, metadata={"help": "Share of the training set held out for `--eval_strategy`. None by default."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many samples only."})
    augment: bool = field(
        default=False, metadata={"help": "Random crops with padding 4 and horizontal flips during training."}
    )


def augment(image: np.ndarray, padding: int = 4) -> np.ndarray:
    """A random crop of the padded image, flipped half of the time: (height, width, channels), size unchanged."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = np.random.randint(0, 2 * padding + 1, size=2)
    crop = padded[top : top + image.shape[0], left : left + image.shape[1]]
    return crop[:, ::-1] if np.random.random() < 0.5 else crop


def compute_metrics(prediction):
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, ModularTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # the transforms below read the image column
    set_seed(training_args.seed)

    # Data
    dataset = load_dataset(data_args.dataset_name, data_args.dataset_config_name, revision=data_args.dataset_revision)
    label_column = data_args.label_column_name
    if not isinstance(dataset["train"].features[label_column], ClassLabel):
        raise ValueError(f"{label_column!r} holds no class labels; the columns are {dataset['train'].features}.")
    train, test = dataset["train"], dataset[data_args.test_split_name]
    validation = dataset.get("validation")
    if data_args.train_val_split:
        parts = train.train_test_split(data_args.train_val_split, seed=training_args.seed)
        train, validation = parts["train"], parts["test"]
    if data_args.max_train_samples:
        train = train.shuffle(training_args.seed).select(range(min(len(train), data_args.max_train_samples)))
    if data_args.max_eval_samples:
        test = test.shuffle(training_args.seed).select(range(min(len(test), data_args.max_eval_samples)))

    names = train.features[label_column].names
    module_labels = model_args.module_labels or names[:2]
    if unknown := set(module_labels) - set(names):
        raise ValueError(f"--module_labels: {sorted(unknown)} not among the labels of the data set, {names}.")

    # Model and image processor
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if model_args.model_type:
        config = AutoConfig.for_model(model_args.model_type, **labels)
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        model = AutoModelForImageClassification.from_config(config)
        size = {"height": config.image_size, "width": config.image_size}
        image_processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    else:
        source, revision = model_args.model_name_or_path, model_args.model_revision
        model = AutoModelForImageClassification.from_pretrained(
            source, revision=revision, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **labels
        )
        image_processor = AutoImageProcessor.from_pretrained(source, revision=revision)

    def transform(samples, function=None):
        images = [np.asarray(image.convert("RGB")) for image in samples[data_args.image_column_name]]
        images = [function(image) for image in images] if function else images
        pixel_values = image_processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": samples[label_column]}

    # Training
    modular_config = ModularConfig(
        target_modules=model_args.target_modules,
        skip_first_blocks=model_args.skip_first_blocks,
        generator_hidden_size=model_args.generator_hidden_size or None,
        gate=model_args.gate,
    )
    augmented = train.with_transform(lambda samples: transform(samples, augment if data_args.augment else None))
    trainer = ModularTrainer(
        model,
        training_args,
        modular_config=modular_config,
        train_dataset=augmented,
        eval_dataset=validation.with_transform(transform) if validation else None,
        processing_class=image_processor,
        compute_metrics=compute_metrics,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    metrics = trainer.evaluate(test.with_transform(transform))
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()

    # A module for some labels, evaluated on their samples as it is, without fine-tuning
    statistics = trainer.collect_statistics(train.with_transform(transform))
    if trainer.is_world_process_zero():
        statistics.save_pretrained(training_args.output_dir)  # later modules need no data
    masks = statistics.module_masks(model_args.threshold)
    module = extract_module(trainer.model, masks, module_labels, gates=model_args.module_gates)
    new_ids = {names.index(name): i for i, name in enumerate(module_labels)}
    samples = test.filter(lambda label: label in new_ids, input_columns=label_column)
    samples = samples.map(lambda label: {label_column: new_ids[label]}, input_columns=label_column)
    module_trainer = Trainer(
        module,
        replace(training_args, eval_strategy="no", load_best_model_at_end=False, push_to_hub=False, report_to="none"),
        processing_class=image_processor,
        compute_metrics=compute_metrics,
    )
    results = {}
    if len(module_labels) > 1:  # a module of one label has nothing to choose between
        results["accuracy"] = module_trainer.evaluate(samples.with_transform(transform))["eval_accuracy"]
    sizes = {name: module.config.nemo[name] for name in ("neuron_retention", "parameter_retention")}
    trainer.log_metrics(f"module {', '.join(module_labels)}", {**results, **sizes})
    if trainer.is_world_process_zero():
        save_module(
            module,
            os.path.join(training_args.output_dir, "module"),
            processing_class=image_processor,
            metrics=results,
        )

    card = {"tasks": "image-classification", "dataset": data_args.dataset_name}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
