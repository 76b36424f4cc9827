# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
What an entry of the architecture table can say. An [`Architecture`] names the maskable layers of a model family and
how their neurons are tied; masking, extraction and reloading are driven by it. The entries are in `families.py`;
`resolution.py` compares them with models.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from . import slim
from .errors import NemoValueError


@dataclass(frozen=True)
class Attention:
    """
    The attention of a block. Paths are relative to the block.

    Fused projections: `query`, `key` and `value` are the same path; the layer then has their units in this order.

    Args:
        layer (`str`): the sub-layer whose forward splits its projections into heads.
        query, key, value (`str`): the projections; their units are heads of `head_size`. With fewer heads of keys and
            values (grouped-query attention), every group of query heads shares one.
        output (`str`): the linear layer that writes the heads back to the residual stream.
        head_size (`tuple[str, ...]`): attributes of `layer` that hold the size of one head.
        num_heads (`tuple[str, ...]`, *optional*): attributes of `layer` that hold the number of (query) heads.
        all_head_size (`tuple[str, ...]`, *optional*): attributes of `layer` that hold their product.
        rotary (`bool`, *optional*): whether rotary positions turn units `i` and `i + head_size / 2` of q and k
            together; `layer` takes their `position_embeddings` as a keyword argument.
        unit_norms (`tuple[str, ...]`, *optional*): norms over the units of each head of q and k. Where a model has
            them, q and k are not masked.
        head_biases (`tuple[str, ...]`, *optional*): parameters with one column per head. A model may lack them.
        shared_head_bias (`str`, *optional*): path in the model of a bias per head that all blocks share. Where a model
            has it, no head is dropped.
        head_rows (`tuple[str, ...]`, *optional*): further linear layers and parameters whose rows belong to heads, as
            many to each. A model may lack them.
        inline_scale (`bool`, *optional*): whether the forward computes the scale of the scores from `head_size`
            instead of keeping it in an attribute.
        cosine (`bool`, *optional*): whether the forward normalises the units of each head of q and of k.
        own_value_size (`bool`, *optional*): whether the forward lets the heads of v have another size than those of q
            and k. Not with `rotary`.
        windowed (`bool`, *optional*): whether q, k and v see windows as samples.
        reasons (`dict[str, str]`, *optional*): which of `"query"`, `"key"`, `"value"` and `"output"` are never masked
            in this family, and why.
    """

    layer: str
    query: str
    key: str
    value: str
    output: str
    head_size: tuple[str, ...]
    num_heads: tuple[str, ...] = ()
    all_head_size: tuple[str, ...] = ()
    rotary: bool = False
    unit_norms: tuple[str, ...] = ()
    head_biases: tuple[str, ...] = ()
    shared_head_bias: str | None = None
    head_rows: tuple[str, ...] = ()
    inline_scale: bool = False
    cosine: bool = False
    own_value_size: bool = False
    windowed: bool = False
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class FeedForward:
    """
    The feed-forward layers of a block: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`. Paths are
    relative to the block.

    Args:
        up (`str`): the linear layer into the hidden units.
        activation (`str`): the element-wise non-linearity.
        down (`str`): the linear layer from the hidden units back to the residual stream.
        gate (`str`, *optional*): the layer whose activated output multiplies that of `up`. The same path as `up` for a
            fused layer; the first half of its units is then activated.
        depthwise (`str`, *optional*): a depthwise convolution between `up` and the activation.
    """

    up: str
    activation: str
    down: str
    gate: str | None = None
    depthwise: str | None = None


@dataclass(frozen=True)
class Convolution:
    """
    One step of a [`Chain`]. Paths are relative to the path of the chain; `*` stands for every child, in order.

    Args:
        layer (`str`): a convolution, or a hidden linear layer.
        norm (`str`, *optional*): the batch norm after it. The gates multiply its output.
        activation (`str`, *optional*): the element-wise non-linearity between this step and the next. An attribute
            that is `None` stands for none.
        squeeze_excite (`tuple[str, str]`, *optional*): the two convolutions or linear layers of a squeeze-excite block
            behind the activation. Paths where a model has nothing stand for none.
        optional (`bool`, *optional*): whether a model may lack this step.
    """

    layer: str
    norm: str | None = None
    activation: str | None = None
    squeeze_excite: tuple[str, str] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Chain:
    """
    Convolutions (and hidden linear layers) one behind the other: the kept channels of a step are all that the next one
    reads.

    Args:
        steps (`tuple[Convolution, ...]`): in forward order.
        path (`str`, *optional*): where the chain is; `*` stands for every child, so that one entry describes all
            blocks. At the top level (`""`) every step counts as a block.
        reader (`str`, *optional*): an unmasked layer that reads the channels of the last step and nothing else (a
            classifier after pooling or flattening). Without it the last step writes to a residual stream, which keeps
            its width unless the family describes it with a [`Stream`].
        shortcut (`bool`, *optional*): whether it is the other way through the block of the chain before it: it reads
            what that chain reads, and both results are added.
    """

    steps: tuple[Convolution, ...]
    path: str = ""
    reader: str | None = None
    shortcut: bool = False


@dataclass(frozen=True)
class Stream:
    """
    The residual streams between the chains of a family, in which a channel is zero if no chain writes to it, so that
    modules lose it. For that only additions, poolings, element-wise activations and dropout may lie between the
    chains: no norm, no concatenation. Every chain reads what the one before it has written.

    Args:
        reader (`str`, *optional*): the layer that reads the last stream and nothing else (a classifier after pooling
            or flattening), where no chain does.
        activation (`str`, *optional*): the activation behind an addition, relative to the path of the chain. The path
            of some chains may lack it.
    """

    reader: str | None = None
    activation: str | None = None


@dataclass(frozen=True)
class StockLayout:
    """
    What the configuration of the plain class can say, so that modules of the stock layout need no code of nemo_hf: one
    size for all blocks. Each is an attribute of the configuration.

    Args:
        intermediate_size (`str`, *optional*): hidden units of the feed-forward layers.
        num_heads (`str`, *optional*): the number of (query) heads.
        num_key_value_heads (`str`, *optional*): the number of heads of keys and values, where there are fewer.
        head_size (`str`, *optional*): the size of one head. It must be there if heads are dropped.
        cuts_units (`bool`, *optional*): whether the size of heads may shrink; with rotary positions it may not.
        divides (`bool`, *optional*): whether the number of heads must divide `hidden_size`.
    """

    intermediate_size: str | None = None
    num_heads: str | None = None
    num_key_value_heads: str | None = None
    head_size: str | None = None
    cuts_units: bool = False
    divides: bool = False


@dataclass(frozen=True)
class Architecture:
    """
    One model family.

    Args:
        model_type (`str`): as in `config.model_type`.
        heads (`dict[str, tuple[str, ...]]`): the classes that can be masked and cut, each with the paths of the
            linear layers whose rows are the labels.
        blocks (`str`, *optional*): path of the transformer blocks in forward order; `*` stands for every child
            (`"vit.layers.*"`).
        attention ([`Attention`], *optional*): the attention of each block.
        feed_forward ([`FeedForward`] or `tuple[FeedForward, ...]`, *optional*): the feed-forward layers of each block;
            of several alternatives the one that a block has.
        chains (`tuple[Chain, ...]`, *optional*): chains of convolutions in forward order. Neighbours with the same
            path belong to the same blocks, except at the top level.
        stream ([`Stream`], *optional*): what lies between the chains, if channels may leave it.
        encoder (`str`, *optional*, defaults to `""`): path of the sub-layer that gets the tokens which the blocks see,
            and their `attention_mask`. The model itself by default.
        stock ([`StockLayout`], *optional*): what the plain class can be told. Without it modules are always ragged.
    """

    model_type: str
    heads: dict[str, tuple[str, ...]]
    blocks: str | None = None
    attention: Attention | None = None
    feed_forward: FeedForward | tuple[FeedForward, ...] = ()
    chains: tuple[Chain, ...] = ()
    stream: Stream | None = None
    encoder: str = ""
    stock: StockLayout | None = None


Part = Attention | FeedForward | Chain
ATTENTION_ROLES = ("query", "key", "value", "output")


ARCHITECTURES: dict[str, Architecture] = {}
# Families that cannot be supported, and why.
UNSUPPORTED: dict[str, str] = {
    "albert": "all its blocks are one layer, called several times, so that a neuron would have as many gates as there "
    "are blocks and could be removed only where all of them are closed",
}


def register_architecture(architecture: Architecture, exist_ok: bool = False) -> None:
    """
    Add a model family to the table.

    Args:
        architecture ([`Architecture`]): the entry.
        exist_ok (`bool`, *optional*, defaults to `False`): whether an existing entry may be replaced.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the family is there already, is unknown to transformers, or the entry
            says nothing about its layers or classes.

    Example:

    ```python
    >>> from nemo_hf import Architecture, Chain, Convolution, register_architecture
    >>> steps = (Convolution("layers.*.conv", norm="layers.*.norm", activation="layers.*.activation"),)
    >>> entry = Architecture("my_vgg", heads={"MyVGG": ("classifier",)}, chains=(Chain(steps, reader="classifier"),))
    >>> register_architecture(entry)  # after AutoConfig.register("my_vgg", ...)
    ```
    """
    model_type = architecture.model_type
    if model_type in ARCHITECTURES and not exist_ok:
        raise NemoValueError(
            f"The architecture {model_type!r} is registered already; pass exist_ok=True to replace it."
        )
    _check_entry(architecture)
    try:
        slim.register_slim_classes(model_type)
    except KeyError as error:
        raise NemoValueError(
            f"transformers knows no configuration with model type {model_type!r}. Register yours first with "
            "`AutoConfig.register` and `AutoModelForImageClassification.register` (or the Auto class of your task)."
        ) from error
    ARCHITECTURES[model_type] = architecture


def _check_entry(architecture: Architecture) -> None:
    """What can be wrong with an entry before there is a model."""
    model_type = architecture.model_type
    if not architecture.heads:
        raise NemoValueError(f"The architecture {model_type!r} names no model class under `heads`.")
    for class_name, paths in architecture.heads.items():
        if isinstance(paths, str) or not paths:
            raise NemoValueError(
                f"heads[{class_name!r}] of the architecture {model_type!r} must be a tuple of paths, got {paths!r}."
            )
    if not (architecture.attention or architecture.feed_forward or architecture.chains):
        raise NemoValueError(
            f"The architecture {model_type!r} describes no layers: give `attention`, `feed_forward` or `chains`."
        )
    if (architecture.attention or architecture.feed_forward) and not architecture.blocks:
        raise NemoValueError(
            f"The architecture {model_type!r} describes the layers of blocks but not where the blocks are: give "
            '`blocks`, such as "encoder.layers.*".'
        )
    if architecture.attention:
        _check_attention(architecture.attention, model_type)
    for chain in architecture.chains:
        if not isinstance(chain, Chain) or not chain.steps:
            raise NemoValueError(f"A chain of the architecture {model_type!r} has no steps: {chain!r}.")
    others = architecture.chains[:-1]
    if architecture.stream and (not others or any(chain.reader is not None for chain in others)):
        raise NemoValueError(
            f"The architecture {model_type!r} describes a `stream`: it needs several chains that write to it, without "
            "a `reader`. Only the last may have one."
        )


def _check_attention(attention: Attention, model_type: str) -> None:
    if not attention.head_size:
        raise NemoValueError(f"The attention of the architecture {model_type!r} names no attribute under `head_size`.")
    if attention.rotary and attention.own_value_size:
        raise NemoValueError(
            f"The attention of the architecture {model_type!r} has both `rotary` and `own_value_size`: heads with "
            "rotary positions are cut to one size for q, k and v. Leave out `own_value_size`; heads of v are then "
            "padded to the size of those of q and k."
        )
    if unknown := set(attention.reasons) - set(ATTENTION_ROLES):
        raise NemoValueError(
            f"`reasons` in the attention of the architecture {model_type!r} must name {', '.join(ATTENTION_ROLES)}, "
            f"got {', '.join(map(repr, sorted(unknown)))}."
        )
