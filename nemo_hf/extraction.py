# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`extract_module`]: cut the neurons that some labels need out of a model, as a slim model that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import metrics, slim
from .architectures import Architecture, maskable_layers, resolve_architecture
from .config import MODULE_KIND
from .errors import NemoValueError, UnsupportedModelError
from .layers import MaskedLinear
from .module_masks import Label, ModuleMasks
from .slicing import folded_bias, padded_heads, take_columns, take_rows


def extract_module(
    model: PreTrainedModel,
    masks: ModuleMasks,
    labels: Sequence[Label],
    gates: Literal["mean", "binary"] | None = None,
    layout: Literal["ragged"] = "ragged",
) -> PreTrainedModel:
    """
    Cut out the module for some labels: a small dense model that computes what the model computes with these gates
    held constant.

    Args:
        model (`PreTrainedModel`): the parent, with masks or without. It is not changed.
        masks ([`ModuleMasks`]): which neurons each label needs.
        labels (`Sequence[str | int]`): names or ids of the parent's labels, in the order that the module's labels
            shall have.
        gates (`"mean"` or `"binary"`, *optional*): what multiplies a kept neuron: the mean over the labels of its
            class-mean gate, or one. Defaults to `"mean"` for masks that hold mean gates, to `"binary"` for masks made
            by hand.
        layout (`"ragged"`, *optional*): every layer has its own sizes.

    Returns:
        `PreTrainedModel`: of class `Slim<parent's class>`, with its own `config`, in evaluation mode, on the parent's
        device and in its dtype.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for an unknown label, masks of another model, or gates that the masks do
        not hold.
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model cannot be cut.

    Example:

    ```python
    >>> module = extract_module(model, trainer.collect_statistics().module_masks(), labels=["cat", "dog"])
    >>> module.save_pretrained("cat-dog")
    ```
    """
    if layout != "ragged":
        raise NemoValueError(f"layout must be 'ragged', got {layout!r}.")
    if gates not in (None, "mean", "binary"):
        raise NemoValueError(f"gates must be 'mean' or 'binary', got {gates!r}.")
    architecture = resolve_architecture(model)
    label_ids = resolve_labels(model.config, labels)
    keys = [_mask_key(masks, model.config, label_id) for label_id in label_ids]
    gates = gates or ("mean" if masks.has_gates else "binary")
    held = constant_gates(model, masks, keys, gates)

    tensors, shapes = _cut(architecture, model, held, label_ids)
    config = _module_config(model, label_ids)
    config.nemo = {
        "kind": MODULE_KIND,
        "format": slim.FORMAT_VERSION,
        "parent": {"name_or_path": model.config._name_or_path, "class": type(model).__name__},
        "labels": list(config.id2label.values()),
        "label_ids": label_ids,
        "threshold": masks.threshold,
        "gates": gates,
        "layout": layout,
        "neuron_retention": masks.retention(keys),
        "neurons": masks.union(keys).pack(),
        "shapes": shapes,
    }
    # The initialisation is overwritten below; it must not move the user's random numbers.
    with torch.random.fork_rng(devices=[]):
        module = slim.slim_model_class(type(model))._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    module.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, strict=True)
    parent_parameters = sum(p.numel() for name, p in model.named_parameters() if ".mask_generator." not in name)
    module.config.nemo["parameter_retention"] = metrics.count_parameters(module) / parent_parameters
    return module.to(model.device).eval()


def constant_gates(
    model: PreTrainedModel, masks: ModuleMasks, labels: Sequence[Label], gates: Literal["mean", "binary"]
) -> dict[str, torch.Tensor]:
    """
    The constant gates with which a module for `labels` is cut.

    Args:
        model (`PreTrainedModel`): the parent.
        masks ([`ModuleMasks`]): which neurons each label needs.
        labels (`Sequence[str | int]`): as in `masks`.
        gates (`"mean"` or `"binary"`): see [`extract_module`].

    Returns:
        Layer name → float tensor of shape `(num_neurons,)`, zero for removed neurons. What
        [`~nemo_hf.masking.hold_gates`] takes.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the masks do not fit the model.
    """
    maskable = {layer.name for layer in maskable_layers(resolve_architecture(model), model)}
    union = masks.union(labels)
    for name, mask in union.items():
        if name not in maskable:
            raise NemoValueError(
                f"The masks are for another model: {name!r} is not a maskable layer of {type(model).__name__}."
            )
        if mask.numel() != model.get_submodule(name).out_features:
            raise NemoValueError(
                f"The masks are for another model: {name!r} has {model.get_submodule(name).out_features} neurons, the "
                f"mask {mask.numel()}."
            )
    held = {
        name: layer.weight.new_ones(layer.out_features, dtype=torch.float32, device="cpu")
        for name, layer in model.named_modules()
        if isinstance(layer, MaskedLinear)
    }
    means = masks.mean_gates(labels) if gates == "mean" else {}
    for name, mask in union.items():
        held[name] = mask.float().cpu() * means[name].float().cpu() if gates == "mean" else mask.float().cpu()
    return held


def resolve_labels(config: PreTrainedConfig, labels: Sequence[Label]) -> list[int]:
    """
    Ids of labels that are given by name or id.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for no labels, an unknown label, or one that is given twice.
    """
    if isinstance(labels, str | int) or not list(labels):
        raise NemoValueError(f"labels must be a non-empty list of label names or ids, got {labels!r}.")
    names = list(config.id2label.values())
    ids = []
    for label in labels:
        if isinstance(label, Integral) and not isinstance(label, bool) and int(label) in config.id2label:
            ids.append(int(label))
        elif label in config.label2id:
            ids.append(config.label2id[label])
        else:
            known = ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
            raise NemoValueError(
                f"Unknown label {label!r}. The model's labels are {known} (ids 0 to {len(names) - 1})."
            )
    if len(set(ids)) != len(ids):
        raise NemoValueError(f"A label is given twice: {list(labels)!r}.")
    return ids


def _mask_key(masks: ModuleMasks, config: PreTrainedConfig, label_id: int) -> Label:
    """The key of a label in masks whose keys are names or ids."""
    name = config.id2label[label_id]
    key = label_id if label_id in masks and name not in masks else name
    masks[key]  # a clear error where there is no mask
    return key


def _module_config(model: PreTrainedModel, label_ids: list[int]) -> PreTrainedConfig:
    """The parent's configuration as that of a module with fewer labels."""
    values = copy.deepcopy(model.config).to_dict()
    names = [model.config.id2label[i] for i in label_ids]
    if len(names) == 1:
        values["problem_type"] = None  # transformers takes "single_label_classification" for two labels and more only
    for key in ("nemo", "model_type", "architectures", "id2label", "label2id", "num_labels", "transformers_version"):
        values.pop(key, None)
    config_class = slim.slim_config_class(type(model.config))
    config = config_class(
        **values, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    return config


def _cut(
    architecture: Architecture, model: PreTrainedModel, held: Mapping[str, torch.Tensor], label_ids: list[int]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict of the slim model and its shapes, from the live parent and its constant gates."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".mask_generator." not in name}
    shapes: dict[str, Any] = {"linear": {}, "scatter": [], "attributes": {}}
    for path in architecture.heads[type(model).__name__]:
        rows = torch.tensor(label_ids)
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in tensors:
                tensors[name] = take_rows(tensors[name], rows)
    for block in range(len(model.get_submodule(architecture.blocks))):
        cutter = _BlockCutter(architecture, model, f"{architecture.blocks}.{block}.", held, tensors, shapes)
        cutter.cut_attention()
        cutter.cut_feed_forward()
    return tensors, shapes


class _BlockCutter:
    """Cuts one block: reads the live layers, writes sliced tensors and shapes."""

    def __init__(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefix: str,
        held: Mapping[str, torch.Tensor],
        tensors: dict[str, torch.Tensor],
        shapes: dict[str, Any],
    ):
        self.architecture, self.model, self.prefix = architecture, model, prefix
        self.held, self.tensors, self.shapes = held, tensors, shapes

    def gates(self, path: str) -> torch.Tensor:
        """Constant gates of a layer; ones where it is not masked."""
        layer = self.model.get_submodule(self.prefix + path)
        return self.held.get(self.prefix + path, torch.ones(layer.out_features))

    def cut_attention(self) -> None:
        """Units of q ∧ k and of v per head, heads without v dropped, all heads of the layer padded to one size."""
        attention = self.architecture.attention
        owner = self.model.get_submodule(self.prefix + attention.layer)
        num_heads, head_size = getattr(owner, attention.num_heads[0]), getattr(owner, attention.head_size[0])
        gates = {path: self.gates(path) for path in (attention.query, attention.key, attention.value)}
        query, key, value = ((gate > 0).view(num_heads, head_size) for gate in gates.values())
        similarity = query & key  # a unit counts in the scores only if both sides have it
        heads = value.any(1).nonzero().flatten()
        if len(heads) == 0:
            heads = torch.tensor([0])  # transformers' attention needs a head: one zero unit, whose output is zero
        size = max(1, int(similarity[heads].sum(1).max()), int(value[heads].sum(1).max()))
        similarity_index, value_index = (padded_heads(keep, heads, size) for keep in (similarity, value))
        self._linear(attention.query, similarity_index, gates[attention.query])
        self._linear(attention.key, similarity_index, gates[attention.key])
        self._linear(attention.value, value_index, gates[attention.value])
        self._residual_write(attention.output, value_index)
        if (len(heads), size) != (num_heads, head_size):
            sizes = dict.fromkeys(attention.num_heads, len(heads)) | dict.fromkeys(attention.head_size, size)
            self.shapes["attributes"][self.prefix + attention.layer] = sizes | dict.fromkeys(
                attention.all_head_size, len(heads) * size
            )

    def cut_feed_forward(self) -> None:
        """Hidden units leave both layers; what a removed unit contributes after the activation moves into the bias."""
        feed_forward = self.architecture.feed_forward
        gates = self.gates(feed_forward.up)
        kept = (gates > 0).nonzero().flatten()
        activation = self.model.get_submodule(self.prefix + feed_forward.activation)
        constant = activation(torch.zeros(1)).item()
        name = f"{self.prefix}{feed_forward.down}"
        bias = folded_bias(self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"), gates <= 0, constant)
        if bias is not None:
            if f"{name}.bias" not in self.tensors:
                raise UnsupportedModelError(f"{name} needs a bias for the constant of {type(activation).__name__}.")
            self.tensors[f"{name}.bias"] = bias
        self._linear(feed_forward.up, kept, gates)
        self._residual_write(feed_forward.down, kept)

    def _linear(self, path: str, rows: torch.Tensor, gates: torch.Tensor) -> None:
        name = self.prefix + path
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in self.tensors:
                self.tensors[part] = take_rows(self.tensors[part], rows, gates)
        self._note_shape(name, len(rows))

    def _residual_write(self, path: str, columns: torch.Tensor) -> None:
        """A layer that writes to the residual stream: fewer inputs, only the kept outputs, scattered to full width."""
        name = self.prefix + path
        gates = self.gates(path)
        rows = (gates > 0).nonzero().flatten()
        weight, bias = self.tensors.pop(f"{name}.weight"), self.tensors.pop(f"{name}.bias", None)
        scattered = len(rows) < len(gates)
        inner = f"{name}.linear" if scattered else name
        self.tensors[f"{inner}.weight"] = take_rows(take_columns(weight, columns), rows, gates)
        if bias is not None:
            self.tensors[f"{inner}.bias"] = take_rows(bias, rows, gates)
        if scattered:
            self.tensors[f"{name}.index"] = rows
            self.shapes["scatter"].append(name)
        self._note_shape(name, len(rows), len(columns))

    def _note_shape(self, name: str, out_features: int, in_features: int | None = None) -> None:
        layer: nn.Linear = self.model.get_submodule(name)
        sizes = [layer.in_features if in_features is None else in_features, out_features]
        if sizes != [layer.in_features, layer.out_features]:
            self.shapes["linear"][name] = sizes
