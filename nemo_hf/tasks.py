# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What the command line trains and loads: image and text classifiers, with their processors and accuracy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from .auto import AutoModularModel, saved_processor
from .config import ModularConfig
from .errors import NemoValueError
from .masking import is_modular_checkpoint
from .task_data import TRAIN_LENGTH, Columns


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class ModelArguments:
    """What is trained: a pretrained model, or a new one of a given type."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained model: a repository or a folder."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Train a new model of this type, such as vit or bert."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "For a new model: hidden_size=96,num_hidden_layers=6,… or a JSON object, for lists."},
    )
    train_tokenizer: bool = field(
        default=False,
        metadata={"help": "For a new text model: train a small WordPiece tokenizer on the training texts."},
    )
    vocab_size: int = field(default=8000, metadata={"help": "Size of that tokenizer's vocabulary."})
    revision: str = field(default="main", metadata={"help": "Revision of the pretrained model."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub."})
    target_modules: str = field(
        default="all", metadata={"help": "all, ffn, attention, or a regular expression of layers."}
    )
    skip_first_blocks: int = field(default=1, metadata={"help": "Encoder blocks, from the first, that stay unmasked."})
    generator_hidden_size: int = field(default=16, metadata={"help": "Width of the mask generators; 0: the paper's."})
    generator_init: str = field(default="open", metadata={"help": "Gates start open, or as in the paper."})
    detach_generator_inputs: bool | None = field(
        default=None,
        metadata={"help": "Generators read without a gradient. By default they do, but with convolutions or groups."},
    )
    gate: str | None = field(
        default=None,
        metadata={"help": "soft (default) or hard gates, or activation: no generators, the default for moda."},
    )
    activation_threshold: float | None = field(
        default=None,
        metadata={"help": "For gate activation: mean magnitude from which a neuron is active. By default 0 for ReLU."},
    )

    def __post_init__(self) -> None:
        """
        Raises:
            [`~nemo_hf.errors.NemoValueError`]: for options of a new model beside a pretrained one.
        """
        given = [name for name in ("model_type", "config_overrides", "train_tokenizer") if getattr(self, name)]
        if self.model_name_or_path is not None and given:
            raise NemoValueError(
                f"--{', --'.join(given)} {'is' if len(given) == 1 else 'are'} for a new model, but "
                f"--model_name_or_path names the pretrained {self.model_name_or_path}. Leave out one or the other."
            )

    def modular_config(self, objective: str) -> ModularConfig:
        """The masks that were asked for, or that an objective needs."""
        return ModularConfig(
            target_modules=self.target_modules,
            skip_first_blocks=self.skip_first_blocks,
            generator_hidden_size=self.generator_hidden_size or None,
            generator_init=self.generator_init,
            detach_generator_inputs=self.detach_generator_inputs,
            gate=self.gate or ("activation" if objective == "moda" else "soft"),
            activation_threshold=self.activation_threshold,
        )


def load_processor(model: ModelArguments, columns: Columns, train: Dataset, max_length: int | None) -> Any:
    """
    The image processor or tokenizer: of the pretrained model, or a new one. A tokenizer gets the length to train with
    as its `model_max_length`, so that it is saved with the model.
    """
    if model.model_name_or_path is not None:
        auto_class = AutoImageProcessor if columns.is_image else AutoTokenizer
        hub = {"revision": model.revision, "token": model.token}
        processor = auto_class.from_pretrained(model.model_name_or_path, **hub)
        if not columns.is_image:
            processor.model_max_length = max_length or min(processor.model_max_length, TRAIN_LENGTH)
        return processor
    if columns.is_image:
        size = getattr(_new_config(model, columns), "image_size", None)  # convolutional networks take any
        width, height = train[0][columns.inputs].size if size is None else (size, size)
        return ViTImageProcessorPil(size={"height": height, "width": width})
    if model.train_tokenizer:
        return train_wordpiece(train[columns.inputs], model.vocab_size, max_length or TRAIN_LENGTH)
    raise NemoValueError(
        "A new text model needs a tokenizer: pass --train_tokenizer, or start from a pretrained model."
    )


def _pad(tokenizer: Any, config: PreTrainedConfig, source: str) -> None:
    """Decoders such as GPT-2 have no token to fill batches with: take the one that ends a text."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise NemoValueError(
            f"The tokenizer of {source} has neither a pad_token nor an eos_token to fill batches with. Give it one: "
            "`tokenizer.pad_token = ...`, then `tokenizer.save_pretrained(folder)`."
        )
    config.get_text_config().pad_token_id = tokenizer.pad_token_id


def train_wordpiece(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """
    A lower-case WordPiece tokenizer in the manner of BERT, trained on the given texts; always the same for the same
    texts.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()

    def new(**vocabulary: Any) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", **vocabulary))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    # The trainer numbers letters inside words as it meets them, in the order of a hash map, and breaks ties by number.
    # As special tokens they are numbered first, here in their order. The tokenizer has them as ordinary ones.
    letters = sorted({letter for text in texts for letter in normalizer.normalize_str(text) if not letter.isspace()})
    first = [*SPECIAL_TOKENS, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    trained = new()
    trained.train_from_iterator(texts, trainer)
    tokenizer = new(vocab=trained.get_vocab())
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def load_model(model: ModelArguments, columns: Columns, processor: Any) -> PreTrainedModel:
    """
    The classifier to train, with the labels of the dataset: pretrained (modular ones with their masks) or new. It and
    its tokenizer get a token to fill batches with if they have none.
    """
    labels = {
        "num_labels": len(columns.names),
        "id2label": dict(enumerate(columns.names)),
        "label2id": {name: i for i, name in enumerate(columns.names)},
    }
    auto_class = AutoModelForImageClassification if columns.is_image else AutoModelForSequenceClassification
    if model.model_name_or_path is not None:
        hub = {"revision": model.revision, "token": model.token}
        config = AutoConfig.from_pretrained(model.model_name_or_path, **hub, **labels)
        if not columns.is_image:
            _pad(processor, config, model.model_name_or_path)
        if is_modular_checkpoint(config):
            return AutoModularModel.from_pretrained(model.model_name_or_path, config=config, **hub)
        return auto_class.from_pretrained(model.model_name_or_path, config=config, ignore_mismatched_sizes=True, **hub)
    config = _new_config(model, columns, **labels)
    if not columns.is_image:
        config.vocab_size, config.pad_token_id = len(processor), processor.pad_token_id
        config.bos_token_id, config.eos_token_id = processor.cls_token_id, processor.sep_token_id
    return auto_class.from_config(config)


def _new_config(model: ModelArguments, columns: Columns, **values: Any) -> Any:
    if model.model_type is None:
        raise NemoValueError("Name a pretrained model (--model_name_or_path) or the type of a new one (--model_type).")
    return AutoConfig.for_model(model.model_type, **values, **_overrides(model))


def _overrides(model: ModelArguments) -> dict[str, Any]:
    """Values for the constructor of a configuration, so that what it derives from them (`head_dim`) follows."""
    text = model.config_overrides
    if not text:
        return {}
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        config = AutoConfig.for_model(model.model_type)
        config.update_from_string(text)
    except (ValueError, TypeError) as error:
        raise NemoValueError(
            "config_overrides must be hidden_size=96,… or a JSON object, which can hold lists, such as "
            f"""{{"hidden_sizes": [16, 32]}}; got {text!r}: {error}."""
        ) from error
    return {name: getattr(config, name) for name in (part.partition("=")[0] for part in text.split(","))}


def load_checkpoint(checkpoint: str, is_image: bool, **hub_kwargs: Any) -> PreTrainedModel:
    """A trained classifier: a module, a modular model with its masks, or a plain model."""
    config = AutoConfig.from_pretrained(checkpoint, **hub_kwargs)
    auto_class = _auto_class(config, is_image, checkpoint)
    if is_modular_checkpoint(config):
        return AutoModularModel.from_pretrained(checkpoint, **hub_kwargs)
    return auto_class.from_pretrained(checkpoint, **hub_kwargs)


def processor_of(checkpoint: str, model: PreTrainedModel, is_image: bool, **hub_kwargs: Any) -> Any:
    """
    The image processor or tokenizer that was saved with a classifier, to read a dataset with. Both get a token to fill
    batches of texts with if they have none.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the classifier reads other data, or there is no processor.
    """
    _auto_class(model.config, is_image, checkpoint)
    processor = saved_processor(checkpoint, model, **hub_kwargs)
    if processor is None:
        raise NemoValueError(
            f"There is no {'image processor' if is_image else 'tokenizer'} in {checkpoint} to read the dataset with. "
            "Save it there: `processor.save_pretrained(folder)`."
        )
    if not is_image:
        _pad(processor, model.config, checkpoint)
    return processor


def _auto_class(config: PreTrainedConfig, is_image: bool, checkpoint: str) -> Any:
    auto_class = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
    if type(config) not in auto_class._model_mapping:
        kind = "image" if is_image else "text"
        raise NemoValueError(f"{checkpoint} ({config.model_type}) is no {kind} classifier, as the dataset needs.")
    return auto_class


def accuracy(prediction: Any) -> dict[str, float]:
    """`compute_metrics` for a Trainer: the share of samples whose largest logit is that of their label."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def model_accuracy(model: PreTrainedModel, dataloader: DataLoader) -> float | None:
    """Accuracy of a model over batches with labels; `None` where one label leaves nothing to choose between."""
    if model.config.num_labels == 1:
        return None
    model.eval()
    hits = total = 0
    for batch in dataloader:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        hits += int((model(**inputs).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return hits / total
