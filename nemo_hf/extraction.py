# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`extract_module`]: cut the neurons that some labels (or groups of samples) need out of a model, as a slim model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from . import metrics, slim
from .config import MODULE_KIND
from .cutting import StockSizes, cut
from .errors import NemoValueError
from .labels import ids_by_name
from .maskable import maskable_layers
from .masking import masked_layers
from .module_masks import Label, ModuleMasks
from .resolution import resolve_architecture
from .stock import stock_sizes, stock_values, why_not_stock


_uninitialised = threading.Lock()  # `no_init_weights` exchanges functions: two threads would put back each other's
AUTO_STOCK_LIMIT = 1.1  # `layout="auto"`: parameters of the stock layout to those of the ragged one


def extract_module(
    model: PreTrainedModel,
    masks: ModuleMasks,
    labels: Sequence[Label] | None = None,
    gates: Literal["mean", "binary"] | None = None,
    layout: Literal["ragged", "stock", "auto"] = "ragged",
    groups: Sequence[Label] | None = None,
) -> PreTrainedModel:
    """
    Cut out the module for some labels, or for some groups of samples: a small dense model that computes what the model
    computes with these gates held constant.

    Args:
        model (`PreTrainedModel`): the parent, with masks or without. It is not changed.
        masks ([`ModuleMasks`]): which neurons each label needs.
        labels (`Sequence[str | int]`, *optional*): names or ids of the parent's labels, in the order that the module's
            labels shall have.
        gates (`"mean"` or `"binary"`, *optional*): what multiplies a kept neuron: the mean over the labels of its
            class-mean gate, or one. Defaults to `"mean"` for masks that hold mean gates, to `"binary"` for masks made
            by hand.
        layout (`"ragged"`, `"stock"` or `"auto"`, *optional*, defaults to `"ragged"`): `"ragged"` gives every layer
            its own sizes and needs nemo_hf to load; `"stock"` gives all blocks one size, so that the plain class loads
            it (for families that can say so, and parents with masks in every block); `"auto"` takes the stock layout
            where it has at most 10 % more parameters than the ragged one.
        groups (`Sequence[str | int]`, *optional*): instead of labels, groups of samples by which the masks are (see
            `ModularTrainingArguments.group_column`). The module then keeps all labels.

    Returns:
        `PreTrainedModel`: of class `Slim<parent's class>`, or of the parent's class in the stock layout, with its own
        `config`, in evaluation mode, on the parent's device and in its dtype.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for an unknown label, masks of another model, or gates that the masks do
        not hold.
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model cannot be cut, or not in the stock layout.

    Example:

    ```python
    >>> module = extract_module(model, trainer.collect_statistics().module_masks(), labels=["cat", "dog"])
    >>> module.save_pretrained("cat-dog")
    >>> english = extract_module(model, masks_by_language, groups=["en"])
    ```
    """
    if layout not in ("ragged", "stock", "auto"):
        raise NemoValueError(f"layout must be 'ragged', 'stock' or 'auto', got {layout!r}.")
    if not isinstance(masks, ModuleMasks):
        raise NemoValueError(
            f"extract_module needs ModuleMasks, got {type(masks).__name__}. Statistics give them: "
            "`statistics.module_masks()`; selections of your own go into `ModuleMasks({label: selection})`."
        )
    architecture = resolve_architecture(model)
    label_ids, keys = _chosen(model.config, masks, labels, groups)
    gates = gates or ("mean" if masks.has_gates else "binary")
    held = constant_gates(model, masks, keys, gates)

    heads = architecture.heads[type(model).__name__]
    sizes = None
    if layout == "stock" or (layout == "auto" and why_not_stock(model, held) is None):
        sizes = stock_sizes(model, held)
    tensors, shapes = cut(model, held, heads, label_ids, sizes)
    if layout == "auto" and sizes:
        ragged = cut(model, held, heads, label_ids)
        if _num_elements(tensors) > AUTO_STOCK_LIMIT * _num_elements(ragged[0]):
            (tensors, shapes), sizes = ragged, None
    config = _module_config(model, label_ids, sizes)
    config.nemo = {
        "kind": MODULE_KIND,
        "format": slim.FORMAT_VERSION,
        "parent": {"name_or_path": model.config._name_or_path, "class": type(model).__name__},
        "labels": list(config.id2label.values()),
        "label_ids": label_ids,
        **({} if groups is None else {"groups": keys, "grouped_by": masks.grouped_by}),
        "masks": masks.origin,
        "threshold": masks.threshold,
        "gates": gates,
        "layout": "stock" if sizes else "ragged",
        "neuron_retention": masks.retention(keys),
        "neurons": masks.union(keys).pack(),
        "shapes": shapes,
    }
    # Made with the parent's sizes before its layers are exchanged, and all of it is loaded below: memory that is never
    # written to is not taken. What is drawn nevertheless must not move the user's random numbers.
    with _uninitialised, torch.random.fork_rng(devices=[]), no_init_weights():
        module_class = type(model) if sizes else slim.slim_model_class(type(model))
        module = module_class._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    module.load_state_dict(tensors, strict=True)
    module.config.nemo["parameter_retention"] = metrics.parameter_retention(module, model)
    return module.to(model.device).eval()


@torch.no_grad()
def module_parameters(
    model: PreTrainedModel, masks: ModuleMasks, selections: Iterable[Sequence[Label]], linear_only: bool = False
) -> list[int]:
    """
    How many parameters modules would have, exactly, without the cost of making them: the model is cut without its
    weights, shapes alone.

    Args:
        model (`PreTrainedModel`): the parent. It is not changed.
        masks ([`ModuleMasks`]): which neurons each label, or group, needs.
        selections (`Iterable[Sequence[str | int]]`): the labels of each module; groups, if the masks are by group.
        linear_only (`bool`, *optional*, defaults to `False`): as in [`~nemo_hf.metrics.count_parameters`].

    Returns:
        `list[int]`: one number for each selection.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: as [`extract_module`].
    """
    # Vectors stay: the constant outputs of removed units may be computed from a bias.
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    outline = copy.deepcopy(model, {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in matrices})
    names = metrics.parameter_names(model, linear_only, generators=False)
    gates = "mean" if masks.has_gates else "binary"
    cuts = (_cut(outline, masks, selection, gates) for selection in selections)
    return [
        sum(tensor.numel() for name, tensor in tensors.items() if _uncut_name(name, names) in names)
        for tensors in cuts
    ]


def module_overlap(model: PreTrainedModel, masks: ModuleMasks, selections: Iterable[Sequence[Label]]) -> torch.Tensor:
    """
    Overlap (MODA, arXiv 2411.01074): share of the parent's parameters that each two modules have in common, exactly.
    These are the parameters whose row and column both modules keep. Padding is no parameter of the parent.

    Args:
        model (`PreTrainedModel`): the parent. It is not changed.
        masks ([`ModuleMasks`]): which neurons each label, or group, needs.
        selections (`Iterable[Sequence[str | int]]`): the labels of each module; groups, if the masks are by group.
            Every module takes a bit of memory for each parameter of the parent.

    Returns:
        `torch.Tensor` of shape `(num_modules, num_modules)`: shares in [0, 1]; on the diagonal those of the single
        modules.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: as [`extract_module`].

    Example:

    ```python
    >>> overlap = module_overlap(model, masks, [["cat"], ["dog"], ["cat", "dog"]])
    ```
    """
    shared = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}  # the same memory, but all with gradients
    outline = copy.deepcopy(model, shared)
    parameters = [p for name, p in outline.named_parameters() if ".mask_generator." not in name]
    members = []
    for selection in selections:
        with torch.enable_grad():
            kept = [tensor for tensor in _cut(outline, masks, selection, "binary").values() if tensor.requires_grad]
        gradients = torch.autograd.grad(
            kept, parameters, [torch.ones_like(tensor) for tensor in kept], materialize_grads=True
        )
        taken = torch.cat([gradient.flatten() != 0 for gradient in gradients])
        members.append(torch.from_numpy(np.packbits(taken.cpu().numpy())))
    packed = torch.stack(members)
    return metrics.intersection_sizes(packed, packed) / len(taken)


def _cut(
    model: PreTrainedModel, masks: ModuleMasks, selection: Sequence[Label], gates: Literal["mean", "binary"]
) -> dict[str, torch.Tensor]:
    """The tensors of the module for some labels, or groups."""
    chosen = (selection, None) if masks.grouped_by is None else (None, selection)
    label_ids, keys = _chosen(model.config, masks, *chosen)
    heads = resolve_architecture(model).heads[type(model).__name__]
    return cut(model, constant_gates(model, masks, keys, gates), heads, label_ids)[0]


def _uncut_name(name: str, names: set[str]) -> str:
    """The parent's name of a tensor; that of a layer inside one that scatters lies one level deeper."""
    owner, _, leaf = name.rpartition(".")
    return name if name in names else f"{owner.rpartition('.')[0]}.{leaf}"


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
    named = {layer.name: layer for layer in maskable_layers(model)}
    union = masks.union(labels)
    for name, mask in union.items():
        if name not in named:
            raise NemoValueError(
                f"The masks are for another model: {name!r} is not a maskable layer of {type(model).__name__}."
            )
        if named[name].reason is not None:
            raise NemoValueError(f"{name!r} cannot be cut: {named[name].reason}.")
        neurons = slim.layer_sizes(model.get_submodule(name))[1]
        if mask.numel() != neurons:
            raise NemoValueError(
                f"The masks are for another model: {name!r} has {neurons} neurons, the mask {mask.numel()}."
            )
    if gates not in ("mean", "binary"):
        raise NemoValueError(f"gates must be 'mean' or 'binary', got {gates!r}.")
    held = {name: torch.ones(slim.layer_sizes(layer)[1]) for name, layer in masked_layers(model).items()}
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
    labels = labels if isinstance(labels, str | int) else list(labels)
    if isinstance(labels, str | int) or not labels:
        raise NemoValueError(f"labels must be a non-empty list of label names or ids, got {labels!r}.")
    names = list(config.id2label.values())
    label2id = ids_by_name(config)
    ids = []
    for label in labels:
        if isinstance(label, Integral) and not isinstance(label, bool) and int(label) in config.id2label:
            ids.append(int(label))
        elif label in label2id:
            ids.append(label2id[label])
        else:
            known = ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
            raise NemoValueError(
                f"Unknown label {label!r}. The model's labels are {known} (ids 0 to {len(names) - 1})."
            )
    if len(set(ids)) != len(ids):
        raise NemoValueError(f"A label is given twice: {list(labels)!r}.")
    return ids


def _chosen(
    config: PreTrainedConfig, masks: ModuleMasks, labels: Sequence[Label] | None, groups: Sequence[Label] | None
) -> tuple[list[int], list[Label]]:
    """Ids of the labels that the module has, and the keys of its masks."""
    if (labels is None) == (groups is None):
        raise NemoValueError(
            "Give either labels or groups: the labels that the module shall tell apart, or, for "
            "masks by groups of samples, the groups that it shall serve."
        )
    if labels is not None:
        if masks.grouped_by is not None:
            raise NemoValueError(
                f"These masks are by groups of {masks.grouped_by!r}, not by label. Choose with groups=, such as "
                f"groups={masks.labels[:2]!r}; the module keeps all labels."
            )
        label_ids = resolve_labels(config, labels)
        return label_ids, [_mask_key(masks, config, label_id) for label_id in label_ids]
    if isinstance(groups, str | int) or not list(groups):
        raise NemoValueError(f"groups must be a non-empty list, got {groups!r}.")
    if len(set(groups)) != len(groups):
        raise NemoValueError(f"A group is given twice: {list(groups)!r}.")
    for group in groups:
        masks[group]  # a clear error where there is no mask
    return list(range(config.num_labels)), list(groups)


def _mask_key(masks: ModuleMasks, config: PreTrainedConfig, label_id: int) -> Label:
    """The key of a label in masks whose keys are names or ids."""
    name = config.id2label[label_id]
    key = label_id if label_id in masks and name not in masks else name
    masks[key]  # a clear error where there is no mask
    return key


def _num_elements(tensors: Mapping[str, torch.Tensor]) -> int:
    """Without positions, which are integers."""
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def _module_config(model: PreTrainedModel, label_ids: list[int], sizes: StockSizes | None) -> PreTrainedConfig:
    """The parent's configuration as that of a module with fewer labels, and with the sizes of the stock layout."""
    values = copy.deepcopy(model.config).to_dict()
    names = [model.config.id2label[i] for i in label_ids]
    if len(names) == 1:
        values["problem_type"] = None  # transformers takes "single_label_classification" for two labels and more only
    # With the parent's `_name_or_path`, an adapter tuned on the module would name the parent as its base.
    of_the_parent = ("nemo", "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version")
    for key in (*of_the_parent, "id2label", "label2id", "num_labels"):
        values.pop(key, None)
    if "use_cache" in values:
        values["use_cache"] = False  # a classifier reads the whole text at once; torch.export refuses the cache
    if sizes is not None:
        values.update(stock_values(model, sizes))
    config_class = slim.slim_config_class(type(model.config)) if sizes is None else type(model.config)
    return config_class(**values, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
