# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the layers of a model that its entry in the architecture table names, and compare the two."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import architectures, slim
from .architectures import (
    ATTENTION_ROLES,
    UNSUPPORTED,
    Architecture,
    Attention,
    Chain,
    Convolution,
    FeedForward,
    Part,
    Stream,
)
from .config import MODULE_KIND, checkpoint_kind
from .errors import UnsupportedModelError


def resolve_architecture(model: nn.Module) -> Architecture:
    """
    The entry of a model's family.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model is wrapped, of an unknown family, or of a class without
            a classification head.
    """
    # A `PeftModel`, or a model after `model.add_adapter`.
    if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"This {type(model).__name__} has adapters, whose share of the outputs would bypass the gates. Merge them "
            "first: `model = peft_model.merge_and_unload().requires_grad_(True)`; PEFT leaves the weights frozen. A "
            "module can be tuned with adapters."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers `PreTrainedModel`, got {type(model).__name__}. Pass the model itself, without "
            f"wrappers."
        )
    model_type, class_name = model.config.model_type, type(model).__name__
    if isinstance(model, FSDPModule):
        raise UnsupportedModelError(
            f"The parameters of this {class_name} are sharded over processes (FSDP), so that its layers cannot be "
            "masked or cut. Save it with `trainer.save_model(path)` and go on, in one process, with "
            "`AutoModularModel.from_pretrained(path)`."
        )
    if checkpoint_kind(model.config) == MODULE_KIND:
        raise UnsupportedModelError(f"{class_name} is a module already. Masks and further cuts start from its parent.")
    if model_type in UNSUPPORTED:
        raise UnsupportedModelError(f"Models of type {model_type!r} cannot be supported: {UNSUPPORTED[model_type]}.")
    if model_type not in architectures.ARCHITECTURES:
        near = difflib.get_close_matches(model_type, architectures.ARCHITECTURES, n=2, cutoff=0.5)
        raise UnsupportedModelError(
            f"Models of type {model_type!r} are not supported. Supported: "
            f"{', '.join(sorted(architectures.ARCHITECTURES))}."
            + (f" Nearest: {', '.join(near)}." if near else "")
            + " Describe another family with an `Architecture` entry and `nemo_hf.register_architecture`."
        )
    architecture = architectures.ARCHITECTURES[model_type]
    if class_name not in architecture.heads:
        raise UnsupportedModelError(
            f"{class_name} has no classification head that can be cut. Supported classes of {model_type!r}: "
            f"{', '.join(architecture.heads)}."
        )
    return architecture


def resolve_parts(model: PreTrainedModel) -> list[tuple[int, Part]]:
    """
    The parts of a model with the number of their block, in forward order; all paths are those of the model.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model has no entry, or does not have what its entry names.
    """
    resolver = _Resolver(resolve_architecture(model), model)
    parts = resolver.parts()
    resolver.streams(parts)  # a stream that does not fit shows before training, not after it
    return parts


@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """
    A residual stream whose channels are zero where no layer writes to them.

    Args:
        width (`int`): its channels.
        writers (`list[str]`): the layers whose outputs are added up in it.
        readers (`list[str]`): the layers that read it.
    """

    width: int
    writers: list[str] = dataclasses.field(default_factory=list)
    readers: list[str] = dataclasses.field(default_factory=list)


def resolve_streams(model: PreTrainedModel) -> list[ResidualStream]:
    """
    The residual streams of a model that channels may leave, in forward order.

    Raises:
        [`~nemo_hf.errors.UnsupportedModelError`]: as [`resolve_parts`].
    """
    resolver = _Resolver(resolve_architecture(model), model)
    return resolver.streams(resolver.parts())


def constant_at_zero(model: nn.Module, activation: str | None) -> float:
    """The output of an element-wise activation for the input zero; 0 without one."""
    if activation is None:
        return 0.0
    with torch.no_grad():  # on the CPU even where transformers makes a model on the meta device
        layer = model.get_submodule(activation)
        like = next((tensor for tensor in layer.parameters() if not tensor.is_meta), torch.zeros(1, device="cpu"))
        return layer.forward(like.new_zeros(1)).item()  # without its hooks


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution computes every channel from the one channel of the same number."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1


def is_grouped(layer: nn.Module) -> bool:
    """Whether a convolution has groups of channels, other than a depthwise one."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer)


def layer_groups(layer: nn.Module) -> int:
    """Groups of channels; 1 for a linear layer."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


class _Resolver:
    """Compares an entry with a model: every path and attribute is there and of the right kind."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel):
        self.architecture = architecture
        self.model = model
        self.layers = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())

    def parts(self) -> list[tuple[int, Part]]:
        for path in self.architecture.heads[type(self.model).__name__]:
            self._require("heads", path, nn.Linear)
        found: list[tuple[int, Part]] = []
        block = 0
        if self.architecture.blocks:
            for prefix in self._expand("blocks", self.architecture.blocks):
                found.extend((block, part) for part in self._transformer_block(prefix))
                block += 1
        for path, chains in itertools.groupby(self.architecture.chains, key=lambda chain: chain.path):
            chains = list(chains)
            for prefix in self._expand("chains.path", path) if path else [""]:
                resolved = [part for part in (self._chain(prefix, chain) for chain in chains) if part.steps]
                for part in resolved:
                    found.append((block, part))
                    block += 0 if path else len(part.steps)
                block += 1 if path else 0
        return found

    def streams(self, parts: list[tuple[int, Part]]) -> list[ResidualStream]:
        """
        The streams that channels may leave, one of each width, since what is added up has one width. Where two of one
        width are never added, their readers keep more than they need.
        """
        entry = self.architecture.stream
        if entry is None:
            return []
        chains = [part for _, part in parts if isinstance(part, Chain)]
        found: dict[int, ResidualStream] = {}
        before: ResidualStream | None = None  # what the last chain has read
        stream: ResidualStream | None = None  # what it has written to; the first one reads the images
        for chain in chains:
            before = source = before if chain.shortcut else stream
            if source is not None:
                self._read(source, chain.steps[0].layer)
            if chain.reader is None:
                width = slim.layer_sizes(self.layers[chain.steps[-1].layer])[1]
                stream = found.setdefault(width, ResidualStream(width))
                stream.writers.append(chain.steps[-1].layer)
        if entry.reader is not None and stream is not None:
            self._require("stream.reader", entry.reader, (nn.Linear, nn.Conv2d))
            self._read(stream, entry.reader)
        if self._moves_zero(entry, chains):
            return []
        return [stream for stream in found.values() if not any(map(self._has_groups, stream.readers))]

    def _has_groups(self, name: str) -> bool:
        return layer_groups(self.layers[name]) > 1

    def _read(self, stream: ResidualStream, name: str) -> None:
        layer = self.layers[name]
        features, rest = divmod(slim.layer_sizes(layer)[0], stream.width)
        if rest or (
            features > 1 and not isinstance(layer, nn.Linear)
        ):  # flattened channels have several features each
            raise self._mismatch("stream", f"{name} (to read {stream.width} channels)", layer)
        stream.readers.append(name)

    def _moves_zero(self, entry: Stream, chains: list[Chain]) -> bool:
        """Whether an activation at the end of a chain, or behind an addition, makes something of zero."""
        activations = {chain.steps[-1].activation for chain in chains if chain.reader is None}
        if entry.activation is not None:
            paths = dict.fromkeys(self._join(chain.path, entry.activation) for chain in chains)
            there = [path for path in paths if path in self.layers]
            if not there:
                raise self._mismatch("stream.activation", next(iter(paths)), None)
            activations.update(there)
        return any(constant_at_zero(self.model, activation) != 0 for activation in activations)

    def _transformer_block(self, prefix: str) -> Iterator[Part]:
        if self.architecture.attention is not None:
            yield self._attention(prefix, self.architecture.attention)
        alternatives = self.architecture.feed_forward
        if isinstance(alternatives, FeedForward):
            alternatives = (alternatives,)
        if alternatives:
            there = [part for part in alternatives if f"{prefix}.{part.up}" in self.layers]
            yield self._feed_forward(prefix, (there or alternatives)[0])

    def _attention(self, prefix: str, part: Attention) -> Attention:
        paths = {name: f"{prefix}.{getattr(part, name)}" for name in ("layer", *ATTENTION_ROLES)}
        norms = tuple(path for path in (f"{prefix}.{norm}" for norm in part.unit_norms) if path in self.layers)
        biases = tuple(path for path in (f"{prefix}.{b}" for b in part.head_biases) if path in self.parameters)
        rows = tuple(
            path for path in (f"{prefix}.{r}" for r in part.head_rows) if path in self.layers | self.parameters
        )
        shared = part.shared_head_bias if self.layers.get(part.shared_head_bias or "-") is not None else None
        owner = self._require("attention.layer", paths["layer"], nn.Module)
        for name in part.num_heads + part.head_size + part.all_head_size:
            if not isinstance(getattr(owner, name, None), int):
                raise self._mismatch("attention", f"{paths['layer']}.{name}", getattr(owner, name, None))
        sizes = {}
        for name in ATTENTION_ROLES:
            layer = self._require(f"attention.{name}", paths[name], (nn.Linear, Conv1D))
            sizes[name] = slim.layer_sizes(layer)
        width, size = sizes["output"][0], getattr(owner, part.head_size[0])
        fused = paths["query"] == paths["key"] == paths["value"]
        if fused:
            fits = sizes["query"][1] == 3 * width
        else:
            fits = sizes["query"][1] == width and sizes["key"][1] == sizes["value"][1]
            fits = fits and width % sizes["key"][1] == 0 and sizes["key"][1] % size == 0
        if not fits or width % size:
            raise self._mismatch("attention", f"{paths['query']} (heads of {size} units)", owner)
        for path in rows:
            found = self.parameters.get(path)
            count = self._require("attention.head_rows", path, nn.Linear).out_features if found is None else len(found)
            if count % (width // size):
                raise self._mismatch("attention.head_rows", f"{path} (rows of {width // size} heads)", owner)
        found_parts = {"unit_norms": norms, "head_biases": biases, "head_rows": rows, "shared_head_bias": shared}
        return dataclasses.replace(part, **paths, **found_parts)

    def _feed_forward(self, prefix: str, part: FeedForward) -> FeedForward:
        paths = {
            field.name: f"{prefix}.{getattr(part, field.name)}"
            for field in dataclasses.fields(part)
            if getattr(part, field.name) is not None
        }
        sizes = {}
        for name in ("up", "gate", "down"):
            if name in paths:
                layer = self._require(f"feed_forward.{name}", paths[name], (nn.Linear, Conv1D))
                sizes[name] = slim.layer_sizes(layer)
        self._require("feed_forward.activation", paths["activation"], nn.Module)
        if "depthwise" in paths and not is_depthwise(self._require("depthwise", paths["depthwise"], nn.Conv2d)):
            raise self._mismatch("feed_forward.depthwise", paths["depthwise"], self.layers[paths["depthwise"]])
        hidden = sizes["down"][0] * (2 if paths.get("gate") == paths["up"] else 1)
        if any(sizes[name][1] != hidden for name in ("up", "gate") if name in sizes):
            raise self._mismatch("feed_forward", f"{paths['up']} ({hidden} units)", self.layers[paths["up"]])
        return dataclasses.replace(part, **paths)

    def _chain(self, prefix: str, chain: Chain) -> Chain:
        steps: list[Convolution] = []
        for step in chain.steps:
            steps.extend(self._steps(prefix, step))
        reader = None if chain.reader is None else self._join(prefix, chain.reader)
        if reader is not None:
            self._require("chains.reader", reader, (nn.Linear, nn.Conv2d))
        layers = [self.layers[step.layer] for step in steps]
        channels = 0
        for step, layer in zip(steps, layers, strict=True):
            if channels and slim.layer_sizes(layer)[0] % channels:
                raise self._mismatch("chains", f"{step.layer} (to read {channels} channels)", layer)
            channels = slim.layer_sizes(layer)[1]
        for (step, layer), following in zip(zip(steps, layers, strict=True), layers[1:], strict=False):
            if is_grouped(layer) and layer_groups(following) > 1:
                raise self._mismatch("chains", f"{step.layer} (followed by another grouped convolution)", layer)
        return dataclasses.replace(chain, steps=tuple(steps), path=prefix, reader=reader)

    def _steps(self, prefix: str, step: Convolution) -> Iterator[Convolution]:
        """The layers that a step stands for: as many as its path has matches."""
        found = [path for path in self._matches(self._join(prefix, step.layer)) if path in self.layers]
        if not found and not step.optional:
            raise self._mismatch("chains", self._join(prefix, step.layer), None)
        for path in found:
            # What a `*` stood for in the path of the layer, it stands for in the others.
            pattern = self._join(prefix, step.layer).split(".")
            stars = [piece for piece, star in zip(path.split("."), pattern, strict=True) if star == "*"]
            others = {
                name: self._filled(prefix, getattr(step, name), stars)
                for name in ("norm", "activation")
                if getattr(step, name) is not None
            }
            self._require("chains.layer", path, (nn.Conv2d, nn.Linear))
            if "norm" in others:
                norm = self._require("chains.norm", others["norm"], nn.BatchNorm2d)
                is_linear = isinstance(self.layers[path], nn.Linear)
                if is_linear or norm.weight is None or norm.num_features != slim.layer_sizes(self.layers[path])[1]:
                    raise self._mismatch("chains.norm", others["norm"], norm)
            if "activation" in others:
                others["activation"] = self._activation(others["activation"])
            excite = step.squeeze_excite
            if excite is not None:
                excite = tuple(self._filled(prefix, part, stars) for part in excite)
                if not any(name in self.layers for name in excite):
                    excite = None
                for name in excite or ():
                    self._require("chains.squeeze_excite", name, (nn.Conv2d, nn.Linear))
            yield dataclasses.replace(step, layer=path, squeeze_excite=excite, **others)

    def _activation(self, path: str) -> str | None:
        """The path of an activation, or `None` where the model says that there is none."""
        if path in self.layers:
            return path
        owner, _, name = path.rpartition(".")
        if getattr(self.layers.get(owner), name, "missing") is not None:
            raise self._mismatch("chains.activation", path, None)
        return None

    def _expand(self, field: str, pattern: str) -> list[str]:
        found = self._matches(pattern)
        if not found:
            raise self._mismatch(field, pattern, self.layers.get(pattern.partition(".*")[0]))
        return found

    def _matches(self, pattern: str) -> list[str]:
        """The paths in the model that fit a pattern in which `*` stands for every child."""
        found = [""]
        for piece in pattern.split("."):
            step = []
            for prefix in found:
                names = [name for name, _ in self.layers[prefix].named_children()] if piece == "*" else [piece]
                step.extend(self._join(prefix, name) for name in names)
            found = [path for path in step if path in self.layers]
        return found

    def _filled(self, prefix: str, pattern: str, stars: list[str]) -> str:
        values = iter(stars)
        pieces = [next(values, "*") if piece == "*" else piece for piece in pattern.split(".")]
        return self._join(prefix, ".".join(pieces))

    @staticmethod
    def _join(prefix: str, path: str) -> str:
        return f"{prefix}.{path}" if prefix else path

    def _require(self, field: str, path: str, kinds: type | tuple[type, ...]) -> nn.Module:
        """The layer at a path, which must be of one of the kinds and compute what this kind computes."""
        layer = self.layers.get(path)
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
        if kind is None:
            raise self._mismatch(field, path, layer)
        if kind is not nn.Module and type(layer).forward is not kind.forward and not hasattr(layer, "mask_state"):
            raise self._mismatch(field, path, layer)
        return layer

    def _mismatch(self, field: str, path: str, found: object) -> UnsupportedModelError:
        there = "nothing" if found is None else type(found).__name__
        return UnsupportedModelError(
            f"The architecture entry {self.architecture.model_type!r} does not fit this model: field {field!r} names "
            f"{path!r}, where there is {there}. Quantised layers and adapters are not plain layers: mask the model "
            "before quantising it, merge adapters first."
        )
