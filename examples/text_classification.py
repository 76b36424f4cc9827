# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a text classifier that becomes modular, and cut a small module for some of its labels out of it."""

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from datasets import ClassLabel, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    set_seed,
)

from nemo_hf import ModularConfig, ModularTrainer, ModularTrainingArguments, extract_module, save_module
from nemo_hf.tasks import train_wordpiece


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="google-bert/bert-base-uncased", metadata={"help": "Checkpoint to start from: Hub name or folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head of a checkpoint that has another number of labels."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Train a model of this type (`bert`, `distilbert`, …) from scratch instead."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "For training from scratch: `hidden_size=96,num_hidden_layers=6,…`"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Defaults to that of the checkpoint."})
    train_tokenizer: bool = field(
        default=False,
        metadata={"help": "For training from scratch: learn a WordPiece tokenizer from the texts."},
    )
    vocab_size: int = field(default=8000, metadata={"help": "Size of the vocabulary of --train_tokenizer, at most."})
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
    text_column_name: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    test_split_name: str = field(default="test", metadata={"help": "Split for the final evaluation."})
    train_val_split: float | None = field(
        default=None, metadata={"help": "Share of the training set held out for `--eval_strategy`. None by default."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many samples only."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to that many tokens."})


def compute_metrics(prediction):
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, ModularTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    if model_args.train_tokenizer and not model_args.model_type:
        raise ValueError("--train_tokenizer is for training from scratch; add --model_type, for example `bert`.")
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

    # Tokenizer and model
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    source, revision = model_args.model_name_or_path, model_args.model_revision
    if model_args.train_tokenizer:
        texts = train[data_args.text_column_name]
        tokenizer = train_wordpiece(texts, model_args.vocab_size, data_args.max_seq_length)
    elif model_args.tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if model_args.model_type:
        config = AutoConfig.for_model(
            model_args.model_type, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **labels
        )
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            source, revision=revision, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **labels
        )

    def tokenize(samples):
        texts = samples[data_args.text_column_name]
        inputs = tokenizer(texts, truncation=True, max_length=data_args.max_seq_length)
        return {**inputs, "labels": samples[label_column]}

    def prepare(split):
        return split.map(tokenize, batched=True, remove_columns=split.column_names)

    # Training
    modular_config = ModularConfig(
        target_modules=model_args.target_modules,
        skip_first_blocks=model_args.skip_first_blocks,
        generator_hidden_size=model_args.generator_hidden_size or None,
        gate=model_args.gate,
    )
    train = prepare(train)
    trainer = ModularTrainer(
        model,
        training_args,
        modular_config=modular_config,
        train_dataset=train,
        eval_dataset=prepare(validation) if validation else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    metrics = trainer.evaluate(prepare(test))
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()

    # A module for some labels, evaluated on their samples as it is, without fine-tuning
    statistics = trainer.collect_statistics(train)
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
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    results = {}
    if len(module_labels) > 1:  # a module of one label has nothing to choose between
        results["accuracy"] = module_trainer.evaluate(prepare(samples))["eval_accuracy"]
    sizes = {name: module.config.nemo[name] for name in ("neuron_retention", "parameter_retention")}
    trainer.log_metrics(f"module {', '.join(module_labels)}", {**results, **sizes})
    if trainer.is_world_process_zero():
        save_module(
            module,
            os.path.join(training_args.output_dir, "module"),
            processing_class=tokenizer,
            metrics=results,
        )

    card = {"tasks": "text-classification", "dataset": data_args.dataset_name}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
