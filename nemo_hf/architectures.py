# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
The architecture table: one [`Architecture`] entry per model family says where the maskable layers are and how their
neurons are tied. Everything else (masking, extraction, reloading) is driven by it; a new family joins as data.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from . import slim
from .errors import NemoValueError, UnsupportedModelError


Role = Literal["query", "key", "value", "attention_output", "up", "down"]


@dataclass(frozen=True)
class Attention:
    """
    Where the attention of a block is. Paths are relative to the block.

    Args:
        layer (`str`): the sub-layer whose forward splits its projections into heads.
        query, key, value (`str`): the projections; their units are `num_heads` groups of `head_size`.
        output (`str`): the linear layer that writes the heads back to the residual stream.
        num_heads (`tuple[str, ...]`): attributes of `layer` that hold the number of heads.
        head_size (`tuple[str, ...]`): attributes of `layer` that hold the size of one head.
        all_head_size (`tuple[str, ...]`, *optional*): attributes of `layer` that hold their product.
    """

    layer: str
    query: str
    key: str
    value: str
    output: str
    num_heads: tuple[str, ...]
    head_size: tuple[str, ...]
    all_head_size: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeedForward:
    """
    Where the feed-forward pair of a block is. Paths are relative to the block.

    Args:
        up (`str`): the linear layer into the hidden units.
        activation (`str`): the element-wise non-linearity between the two.
        down (`str`): the linear layer from the hidden units back to the residual stream.
    """

    up: str
    activation: str
    down: str


@dataclass(frozen=True)
class Architecture:
    """
    One model family.

    Args:
        model_type (`str`): as in `config.model_type`.
        blocks (`str`): path of the list of encoder blocks in the model, in forward order.
        attention ([`Attention`]): the attention of each block.
        feed_forward ([`FeedForward`]): the feed-forward pair of each block.
        heads (`dict[str, tuple[str, ...]]`): the classes that can be masked and cut, each with the paths of the
            linear layers whose rows are the labels.
    """

    model_type: str
    blocks: str
    attention: Attention
    feed_forward: FeedForward
    heads: dict[str, tuple[str, ...]]

    def roles(self) -> dict[Role, str]:
        """The maskable layers of a block in forward order: role → path relative to the block."""
        return {
            "query": self.attention.query,
            "key": self.attention.key,
            "value": self.attention.value,
            "attention_output": self.attention.output,
            "up": self.feed_forward.up,
            "down": self.feed_forward.down,
        }


@dataclass(frozen=True)
class MaskableLayer:
    """A maskable layer: its name in `model.named_modules()`, the number of its block, and its role there."""

    name: str
    block: int
    role: Role


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture, exist_ok: bool = False) -> None:
    """
    Add a model family to the table.

    Args:
        architecture ([`Architecture`]): the entry.
        exist_ok (`bool`, *optional*, defaults to `False`): whether an existing entry may be replaced.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the family is there already, is unknown to transformers, or names no
            class.
    """
    model_type = architecture.model_type
    if model_type in ARCHITECTURES and not exist_ok:
        raise NemoValueError(
            f"The architecture {model_type!r} is registered already; pass exist_ok=True to replace it."
        )
    if not architecture.heads:
        raise NemoValueError(f"The architecture {model_type!r} names no model class under `heads`.")
    try:
        slim.register_slim_classes(model_type)
    except KeyError as error:
        raise NemoValueError(
            f"transformers knows no configuration with model type {model_type!r}. Register yours first with "
            "`AutoConfig.register` and `AutoModelForImageClassification.register` (or the Auto class of your task)."
        ) from error
    ARCHITECTURES[model_type] = architecture


def resolve_architecture(model: nn.Module) -> Architecture:
    """
    The entry of a model's family, checked against the model.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model is wrapped, of an unknown family, of a class without a
            classification head, or does not have the layers that its entry names.
    """
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps the model in adapters. Merge them first (`model.merge_and_unload()`)."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers `PreTrainedModel`, got {type(model).__name__}. Pass the model itself, without "
            f"wrappers."
        )
    model_type, class_name = model.config.model_type, type(model).__name__
    if model_type.startswith(slim.MODEL_TYPE_PREFIX):
        raise UnsupportedModelError(f"{class_name} is a module already. Masks and further cuts start from its parent.")
    if model_type not in ARCHITECTURES:
        near = difflib.get_close_matches(model_type, ARCHITECTURES, n=2, cutoff=0.5)
        raise UnsupportedModelError(
            f"Models of type {model_type!r} are not supported. Supported: {', '.join(sorted(ARCHITECTURES))}."
            + (f" Nearest: {', '.join(near)}." if near else "")
            + " Describe another family with an `Architecture` entry and `nemo_hf.register_architecture`."
        )
    architecture = ARCHITECTURES[model_type]
    if class_name not in architecture.heads:
        raise UnsupportedModelError(
            f"{class_name} has no classification head that can be cut. Supported classes of {model_type!r}: "
            f"{', '.join(architecture.heads)}."
        )
    _validate(architecture, model)
    return architecture


def maskable_layers(architecture: Architecture, model: nn.Module) -> Iterator[MaskableLayer]:
    """The maskable layers of a model in forward order."""
    for block in range(len(model.get_submodule(architecture.blocks))):
        for role, path in architecture.roles().items():
            yield MaskableLayer(f"{architecture.blocks}.{block}.{path}", block, role)


def _validate(architecture: Architecture, model: PreTrainedModel) -> None:
    """Compare an entry with a model: every path and attribute is there and of the right kind."""
    layers = dict(model.named_modules())
    if not isinstance(layers.get(architecture.blocks), nn.ModuleList):
        raise _mismatch(architecture, "blocks", architecture.blocks, layers.get(architecture.blocks))
    for path in architecture.heads[type(model).__name__]:
        if not isinstance(layers.get(path), nn.Linear):
            raise _mismatch(architecture, "heads", path, layers.get(path))
    for layer in maskable_layers(architecture, model):
        found = layers.get(layer.name)
        if not isinstance(found, nn.Linear):
            raise _mismatch(architecture, layer.role, layer.name, found)
    attention = architecture.attention
    for block in range(len(layers[architecture.blocks])):
        owner = layers.get(f"{architecture.blocks}.{block}.{attention.layer}")
        for name in attention.num_heads + attention.head_size + attention.all_head_size:
            if not isinstance(getattr(owner, name, None), int):
                raise _mismatch(
                    architecture, "attention", f"{architecture.blocks}.{block}.{attention.layer}.{name}", owner
                )
        if f"{architecture.blocks}.{block}.{architecture.feed_forward.activation}" not in layers:
            raise _mismatch(architecture, "activation", architecture.feed_forward.activation, None)


def _mismatch(architecture: Architecture, field: str, path: str, found: object) -> UnsupportedModelError:
    there = "nothing" if found is None else type(found).__name__
    return UnsupportedModelError(
        f"The architecture entry {architecture.model_type!r} does not fit this model: field {field!r} names {path!r}, "
        f"where there is {there}. Quantised layers and adapters are not plain linear layers: mask the model before "
        "wrapping it."
    )


_VIT_ATTENTION = Attention(
    layer="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    num_heads=("num_attention_heads",),
    head_size=("head_dim",),
)
_VIT_FEED_FORWARD = FeedForward(up="mlp.fc1", activation="mlp.activation_fn", down="mlp.fc2")
_BERT_ATTENTION = Attention(
    layer="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    num_heads=("num_attention_heads",),
    head_size=("attention_head_size",),
    all_head_size=("all_head_size",),
)
_BERT_FEED_FORWARD = FeedForward(
    up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense"
)

for _entry in (
    Architecture(
        model_type="vit",
        blocks="vit.layers",
        attention=_VIT_ATTENTION,
        feed_forward=_VIT_FEED_FORWARD,
        heads={"ViTForImageClassification": ("classifier",)},
    ),
    Architecture(
        model_type="deit",
        blocks="deit.layers",
        attention=_VIT_ATTENTION,
        feed_forward=_VIT_FEED_FORWARD,
        heads={
            "DeiTForImageClassification": ("classifier",),
            "DeiTForImageClassificationWithTeacher": ("cls_classifier", "distillation_classifier"),
        },
    ),
    Architecture(
        model_type="bert",
        blocks="bert.encoder.layer",
        attention=_BERT_ATTENTION,
        feed_forward=_BERT_FEED_FORWARD,
        heads={"BertForSequenceClassification": ("classifier",)},
    ),
    Architecture(
        model_type="roberta",
        blocks="roberta.encoder.layer",
        attention=_BERT_ATTENTION,
        feed_forward=_BERT_FEED_FORWARD,
        heads={"RobertaForSequenceClassification": ("classifier.out_proj",)},
    ),
    Architecture(
        model_type="distilbert",
        blocks="distilbert.transformer.layer",
        attention=Attention(
            layer="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            num_heads=("n_heads",),
            head_size=("attention_head_size",),
        ),
        feed_forward=FeedForward(up="ffn.lin1", activation="ffn.activation", down="ffn.lin2"),
        heads={"DistilBertForSequenceClassification": ("classifier",)},
    ),
):
    register_architecture(_entry)
