# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`ModuleMasks`]: which neurons every label needs, and the algebra on them."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch

from . import metrics
from .errors import CheckpointError, NemoValueError
from .files import read_tensors, write_tensors


MASKS_FILE = "module_masks.safetensors"
ORIGINS = ("statistics", "learnt", "by hand")
Label = str | int


class NeuronMask(Mapping[str, torch.Tensor]):
    """
    One selection of neurons: layer name → boolean tensor of shape `(num_neurons,)`. `|`, `&` and `-` join, intersect
    and subtract selections over the same layers.

    Args:
        layers (`Mapping[str, torch.Tensor]`): the selection.
    """

    def __init__(self, layers: Mapping[str, torch.Tensor]):
        self._layers = dict(layers)

    def __getitem__(self, layer: str) -> torch.Tensor:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __or__(self, other: Mapping[str, torch.Tensor]) -> NeuronMask:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: Mapping[str, torch.Tensor]) -> NeuronMask:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: Mapping[str, torch.Tensor]) -> NeuronMask:
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def _combine(self, other: Mapping[str, torch.Tensor], operation: Any) -> NeuronMask:
        if {layer: mask.shape for layer, mask in other.items()} != {layer: mask.shape for layer, mask in self.items()}:
            raise NemoValueError("Selections can only be combined if they are over the same layers of the same sizes.")
        return NeuronMask({layer: operation(mask, other[layer]) for layer, mask in self.items()})

    @property
    def retention(self) -> float:
        """Share of neurons kept."""
        return sum(int(mask.sum()) for mask in self.values()) / sum(mask.numel() for mask in self.values())

    def pack(self) -> dict[str, str]:
        """Layer name → the bits of its selection in base64, as the provenance of a module stores them."""
        return {
            layer: base64.b64encode(np.packbits(mask.cpu().numpy()).tobytes()).decode("ascii")
            for layer, mask in self.items()
        }

    def __repr__(self) -> str:
        return f"NeuronMask({len(self)} layers, retention {self.retention:.3f})"


class ModuleMasks:
    """
    The neurons that every label needs: label → layer → boolean tensor. Or every group of samples: then groups stand
    wherever this page says labels.

    Args:
        masks (`Mapping`): label (name or id) → layer name → boolean tensor of shape `(num_neurons,)`. Every label has
            the same layers. A layer that the model masks but that is missing here keeps all its neurons.
        gates (`Mapping`, *optional*): label → layer name → mean gate of the label's samples, of shape
            `(num_neurons,)`. [`NeuronStatistics.module_masks`] stores them; `extract_module(..., gates="mean")` needs
            them.
        threshold (`float`, *optional*): share of samples by which [`NeuronStatistics.module_masks`] chose, for the
            provenance of modules.
        grouped_by (`str`, *optional*): where the masks are of groups of samples: the column that holds the groups.
        origin (`"statistics"`, `"learnt"` or `"by hand"`, *optional*, defaults to `"by hand"`): where the masks come
            from, for the provenance of modules: [`NeuronStatistics`], [`learn_masks`] or anything else.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if labels differ in their layers or sizes, a mask is not boolean, or
            `origin` is another word.

    Example:

    ```python
    >>> import torch
    >>> from nemo_hf import ModuleMasks
    >>> masks = ModuleMasks({"cat": {"fc": torch.tensor([True, False])}, "dog": {"fc": torch.tensor([True, True])}})
    >>> masks.retention(["cat"]), masks.coupling()
    (0.5, 0.5)
    >>> (masks["dog"] - masks["cat"])["fc"].tolist()
    [False, True]
    ```
    """

    def __init__(
        self,
        masks: Mapping[Label, Mapping[str, torch.Tensor]],
        gates: Mapping[Label, Mapping[str, torch.Tensor]] | None = None,
        threshold: float | None = None,
        grouped_by: str | None = None,
        origin: Literal["statistics", "learnt", "by hand"] = "by hand",
    ):
        if not masks:
            raise NemoValueError("ModuleMasks needs the mask of at least one label.")
        if origin not in ORIGINS:
            raise NemoValueError(f"origin must be one of {', '.join(map(repr, ORIGINS))}, got {origin!r}.")
        masks, gates = _plain_labels(masks), None if gates is None else _plain_labels(gates)
        for label, layers in masks.items():
            if not all(isinstance(mask, torch.Tensor) for mask in layers.values()):
                raise NemoValueError(f"The mask of label {label!r} must hold a boolean tensor for each layer.")
        self._masks = {label: NeuronMask(layers) for label, layers in masks.items()}
        self._gates = None if gates is None else {label: dict(layers) for label, layers in gates.items()}
        self.threshold = threshold
        self.grouped_by = grouped_by
        self.origin = origin
        sizes = {layer: tuple(mask.shape) for layer, mask in next(iter(self._masks.values())).items()}
        for label, mask in self._masks.items():
            if {layer: tuple(tensor.shape) for layer, tensor in mask.items()} != sizes or not sizes:
                raise NemoValueError(
                    f"The mask of label {label!r} has other layers or sizes than that of {self.labels[0]!r}."
                )
            for layer, tensor in mask.items():
                if tensor.dtype != torch.bool or tensor.dim() != 1:
                    raise NemoValueError(
                        f"The mask of {layer!r} for label {label!r} must be a boolean tensor of shape (num_neurons,), "
                        f"got {tensor.dtype} of shape {tuple(tensor.shape)}."
                    )
                if self._gates is not None and _gate_shape(self._gates, label, layer) != tensor.shape:
                    raise NemoValueError(
                        f"The mean gates of {layer!r} for label {label!r} are missing or of another size, or no "
                        "floating-point numbers."
                    )

    @property
    def labels(self) -> list[Label]:
        """The labels, as given."""
        return list(self._masks)

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return list(next(iter(self._masks.values())))

    @property
    def has_gates(self) -> bool:
        """Whether mean gates are stored."""
        return self._gates is not None

    def __getitem__(self, label: Label) -> NeuronMask:
        if label not in self._masks:
            known = ", ".join(map(repr, self.labels[:10])) + (", …" if len(self.labels) > 10 else "")
            kind = "label" if self.grouped_by is None else f"the group of {self.grouped_by!r}"
            raise NemoValueError(f"There is no mask for {kind} {label!r}. There are masks for {known}.")
        return self._masks[label]

    def __contains__(self, label: object) -> bool:
        return label in self._masks

    def __len__(self) -> int:
        return len(self._masks)

    def union(self, labels: Iterable[Label] | None = None) -> NeuronMask:
        """The neurons that at least one of the labels needs (all labels by default)."""
        chosen = self._chosen(labels)
        joined = self[chosen[0]]
        for label in chosen[1:]:
            joined = joined | self[label]
        return joined

    def mean_gates(self, labels: Iterable[Label] | None = None) -> dict[str, torch.Tensor]:
        """
        Layer name → mean over the labels of their mean gates, of shape `(num_neurons,)`.

        Raises:
            [`~nemo_hf.errors.NemoValueError`]: if no gates are stored.
        """
        if self._gates is None:
            raise NemoValueError(
                "These masks hold no mean gates. Make them with `NeuronStatistics.module_masks()`, or extract with "
                "gates='binary'."
            )
        chosen = self._chosen(labels)
        for label in chosen:
            self[label]  # a clear error for an unknown label
        return {layer: torch.stack([self._gates[label][layer] for label in chosen]).mean(0) for layer in self.layers}

    def retention(self, labels: Iterable[Label] | None = None) -> float:
        """Share of neurons that a module for these labels keeps; without labels the mean over single labels."""
        if labels is None:
            return sum(mask.retention for mask in self._masks.values()) / len(self)
        return self.union(labels).retention

    def coupling(self) -> float:
        """Mean Jaccard index over all pairs of labels; NaN for a single label."""
        return metrics.coupling(torch.stack([torch.cat(list(mask.values())) for mask in self._masks.values()])).item()

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `module_masks.safetensors`."""
        tensors = {
            f"mask.{layer}": torch.stack([mask[layer] for mask in self._masks.values()]) for layer in self.layers
        }
        if self._gates is not None:
            gates = self._gates
            tensors |= {
                f"gate.{layer}": torch.stack([gates[label][layer] for label in self.labels]) for layer in self.layers
            }
        description = {
            "kind": "module_masks",
            "labels": self.labels,
            "layers": self.layers,
            "threshold": self.threshold,
            "grouped_by": self.grouped_by,
            "origin": self.origin,
        }
        write_tensors(os.path.join(save_directory, MASKS_FILE), tensors, description)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **hub_kwargs: Any) -> ModuleMasks:
        """
        Read `module_masks.safetensors` from a folder or a repository.

        Raises:
            [`~nemo_hf.errors.CheckpointError`]: if the file is missing or damaged.
        """
        tensors, description = read_tensors(source, MASKS_FILE, **hub_kwargs)
        try:
            labels, layers = description["labels"], description["layers"]
            masks, gates = (
                {label: {layer: tensors[f"{kind}.{layer}"][i] for layer in layers} for i, label in enumerate(labels)}
                if any(name.startswith(kind) for name in tensors)
                else None
                for kind in ("mask", "gate")
            )
            threshold = description["threshold"]
            # Before files said it, those with a threshold were of statistics.
            origin = description.get("origin", "by hand" if threshold is None else "statistics")
            return cls(masks, gates, threshold, description.get("grouped_by"), origin)
        except (KeyError, TypeError, IndexError, NemoValueError) as error:
            raise CheckpointError(f"{MASKS_FILE} in {source} is damaged ({error!r}).") from error

    def _chosen(self, labels: Iterable[Label] | None) -> list[Label]:
        if isinstance(labels, str | int):
            raise NemoValueError(f"Labels go into a list, got {labels!r}.")
        chosen = self.labels if labels is None else list(labels)
        if not chosen:
            raise NemoValueError("Name at least one label.")
        return chosen

    def __repr__(self) -> str:
        kind = "labels" if self.grouped_by is None else f"groups of {self.grouped_by!r}"
        return f"ModuleMasks({len(self)} {kind}, {len(self.layers)} layers, mean retention {self.retention():.3f})"


def _plain_labels(given: Mapping[Label, Any]) -> dict[Label, Any]:
    """Integers of numpy as those of Python, which JSON can hold."""
    return {int(label) if isinstance(label, Integral) else label: value for label, value in given.items()}


def _gate_shape(gates: dict[Label, dict[str, torch.Tensor]], label: Label, layer: str) -> torch.Size | None:
    found = gates.get(label, {}).get(layer)
    return None if found is None or not found.is_floating_point() else found.shape
