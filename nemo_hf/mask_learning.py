# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`learn_masks`]: masks for a model that is trained already. Gates per label are learnt; the weights stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import ModularConfig
from .errors import NemoRuntimeError, NemoValueError
from .gating import StraightThroughStep
from .labels import check_labels, check_names, labels_of
from .maskable import MaskableLayer, maskable_layers
from .masking import is_masked, list_maskable_layers
from .module_masks import ModuleMasks
from .slim import layer_sizes


logger = logging.get_logger(__name__)

OPEN_LOGIT = 1.0  # every gate starts open
# Added to the logits in training, so that gates near the edge are tried both ways: before a ReLU a gate that never
# opens gets no gradient from the task.
LOGIT_NOISE = 0.5
MISSED = 1.25  # masks of this size, relative to the target, are worth a warning
WARMUP = 0.25  # share of the batches over which the weight of the size grows, so that gates differ before any closes


def learn_masks(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    target_modules: str | list[str] = "all",
    skip_first_blocks: int = 1,
    target_retention: float = 0.2,
    compactness: float = 10.0,
    learning_rate: float = 0.1,
    num_epochs: int = 10,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> ModuleMasks:
    """
    Learn which neurons every label needs in a model that was trained as usual, without training the model: one gate,
    0 or 1, per label and neuron, with a straight-through gradient.

    What is trained is what a module computes. For every sample a random set of labels is drawn that contains its own;
    a neuron is open if one of them opens it, and the loss is the cross entropy over the logits of these labels alone.
    The size of a label's mask costs `compactness · max(0, share of open gates − target_retention)`.

    Args:
        model (`PreTrainedModel`): a plain classifier of a supported family. It runs in evaluation mode and is left as
            it was.
        dataloader (`Iterable`): batches as dictionaries with the model's inputs and `labels`, one integer per sample.
            It is read once per epoch, and once more to count the batches if it has no length.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all"`): which layers, as in
            [`ModularConfig`].
        skip_first_blocks (`int`, *optional*, defaults to 1): blocks that keep all neurons, as in [`ModularConfig`].
        target_retention (`float`, *optional*, defaults to 0.2): share of neurons in (0, 1] that a label may keep. A
            module for several labels keeps those of all of them.
        compactness (`float`, *optional*, defaults to 10.0): weight of what a mask has above the target.
        learning_rate (`float`, *optional*, defaults to 0.1): of Adam on the logits of the gates, which start at 1.
        num_epochs (`int`, *optional*, defaults to 10): passes over the data.
        seed (`int`, *optional*, defaults to 0): of the sets of labels and of the noise on the gates.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Returns:
        [`ModuleMasks`]: masks of every label that has samples, without mean gates: [`extract_module`] gives the kept
        neurons gate 1. A layer that would be empty keeps the neuron with the largest logit.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model has mask generators or two labels of one name, a batch has no
            labels or not one class per sample, there are no batches, or a value is outside its range.
        [`~nemo_hf.errors.UnsupportedModelError`]: if the model's family is not supported.

    Example:

    ```python
    >>> masks = learn_masks(model, dataloader, target_retention=0.1)
    >>> module = extract_module(model, masks, labels=["cat", "dog"])
    ```
    """
    _check_values(target_retention, compactness, learning_rate, num_epochs)
    if is_masked(model):
        raise NemoValueError(
            "This model has mask generators: `collect_statistics(model, dataloader).module_masks()` makes masks of "
            "them. To learn masks for its plain layers call `remove_masks(model)` first."
        )
    chosen = set(list_maskable_layers(model, ModularConfig(target_modules, skip_first_blocks)))
    layers = [layer for layer in maskable_layers(model) if layer.name in chosen]
    sizes = {layer.name: layer_sizes(model.get_submodule(layer.name))[1] for layer in layers}
    check_names(model.config.id2label.values(), "`config.id2label`")
    label_gates = _LabelGates(model.config.num_labels, sizes, model.device, seed)
    optimizer = torch.optim.Adam([label_gates.logits], lr=learning_rate)
    seen: set[int] = set()
    with _frozen(model), _multiplied(model, layers) as gates:
        for progress, batch in _batches(dataloader, num_epochs, disable_tqdm):
            labels = _labels(batch, model)
            seen.update(labels.tolist())
            loss = _task_loss(model, batch, labels, label_gates, gates)
            excess = (label_gates.retention() - target_retention).clamp(min=0).mean()
            optimizer.zero_grad()
            (loss + compactness * min(1.0, progress / WARMUP) * excess).backward()
            optimizer.step()
    of_labels = label_gates.masks()
    masks = ModuleMasks({model.config.id2label[i]: of_labels[i] for i in sorted(seen)}, origin="learnt")
    if masks.retention() > MISSED * target_retention:
        logger.warning(
            f"Labels keep {masks.retention():.0%} of their neurons on average, but target_retention is "
            f"{target_retention:.0%}. Gates need time to close: raise num_epochs or learning_rate, or compactness if "
            "size matters more than accuracy."
        )
    return masks


class _LabelGates:
    """
    One gate, 0 or 1, per label and neuron.

    Args:
        num_labels (`int`): of the model.
        sizes (`Mapping[str, int]`): layer name → number of neurons.
        device (`torch.device`): of the logits.
        seed (`int`): of the sets of labels and of the noise.
    """

    def __init__(self, num_labels: int, sizes: Mapping[str, int], device: torch.device, seed: int):
        self.sizes = dict(sizes)
        shape = (num_labels, sum(sizes.values()))
        self.logits = torch.full(shape, OPEN_LOGIT, device=device, requires_grad=True)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw_selections(self, labels: torch.Tensor) -> torch.Tensor:
        """For every sample its own label and a random number, from one up, of others: `(batch_size, num_labels)`."""
        num_labels, device = len(self.logits), self.logits.device
        order = torch.rand(len(labels), num_labels, device=device, generator=self.generator)
        order.scatter_(1, labels[:, None], -1.0)  # its own comes first
        size = torch.randint(2, num_labels + 1, (len(labels), 1), device=device, generator=self.generator)
        return order.argsort(1).argsort(1) < size

    def of_modules(self, selections: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The gates of the modules for some selections of labels: open where one of the labels opens them. The gradient
        of an open gate is shared by the labels that open it.

        Args:
            selections (`torch.Tensor` of shape `(batch_size, num_labels)`): booleans.

        Returns:
            Layer name → gates of shape `(batch_size, num_neurons)`.
        """
        noise = torch.randn(self.logits.shape, device=self.logits.device, generator=self.generator)
        gates = StraightThroughStep.apply(self.logits + LOGIT_NOISE * noise)
        counts = selections.to(gates.dtype) @ gates
        return self.by_layer(counts / counts.detach().clamp(min=1))

    def retention(self) -> torch.Tensor:
        """Share of open gates, without noise, of shape `(num_labels,)`."""
        return StraightThroughStep.apply(self.logits).mean(1)

    def masks(self) -> list[dict[str, torch.Tensor]]:
        """Per label: layer name → boolean mask of shape `(num_neurons,)`, none of them empty."""
        masks = {}
        for name, logits in self.by_layer(self.logits.detach().cpu()).items():
            masks[name] = (logits > 0).scatter(1, logits.argmax(1, keepdim=True), True)
        return [{name: mask[i] for name, mask in masks.items()} for i in range(len(self.logits))]

    def by_layer(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split the neurons of `(..., num_neurons)` by the name of their layer."""
        return dict(zip(self.sizes, tensor.split(list(self.sizes.values()), dim=-1), strict=True))


def _batches(
    dataloader: Iterable[Mapping[str, Any]], num_epochs: int, disable_tqdm: bool
) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """All batches of all epochs, each with the share of all batches that it completes."""
    try:
        num_batches = len(dataloader)
    except TypeError:  # of an iterable dataset
        num_batches = sum(1 for _ in dataloader)
    for epoch in range(1, num_epochs + 1):
        batch = None
        shown = tqdm(dataloader, desc=f"Masks, epoch {epoch} of {num_epochs}", disable=disable_tqdm)
        for number, batch in enumerate(shown, start=(epoch - 1) * num_batches + 1):
            yield number / (num_epochs * num_batches), batch
        if batch is None:
            raise NemoValueError(
                f"The dataloader has no batches in epoch {epoch}. It is read once per epoch, and once to count its "
                "batches if it has no length: pass a `DataLoader` or a list of batches, not a generator."
            )


def _task_loss(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    labels: torch.Tensor,
    label_gates: _LabelGates,
    gates: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Cross entropy of one module per sample, each for a random set of labels around that of the sample."""
    selections = label_gates.draw_selections(labels)
    gates.update(label_gates.of_modules(selections))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(
        **{name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    )
    if gates:
        raise NemoRuntimeError(
            f"The forward pass never called {len(gates)} layers, so their gates do nothing: "
            f"{', '.join(list(gates)[:4])}{', …' if len(gates) > 4 else ''}. Exclude them with `target_modules`."
        )
    logits = outputs.logits.float().to(selections.device)
    return functional.cross_entropy(logits.masked_fill(~selections, float("-inf")), labels)


@contextlib.contextmanager
def _multiplied(model: nn.Module, layers: list[MaskableLayer]) -> Iterator[dict[str, torch.Tensor]]:
    """
    Hooks that multiply the outputs of layers, or of the norms behind them, by the gates of a batch. They take the
    gates out of the dictionary that this yields: layer name → gates of shape `(batch_size, num_neurons)`.
    """
    gates: dict[str, torch.Tensor] = {}

    def multiply(name: str, channels_first: bool, outputs: torch.Tensor) -> torch.Tensor:
        if name not in gates:
            raise NemoRuntimeError(f"The forward pass calls {name} twice. Exclude it with `target_modules`.")
        of_layer = gates.pop(name).to(outputs)
        of_layer = of_layer.repeat_interleave(len(outputs) // len(of_layer), dim=0)  # windows of one image
        others = [1] * (outputs.dim() - 2)
        return outputs * of_layer.view(len(of_layer), *([-1, *others] if channels_first else [*others, -1]))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooked = model.get_submodule(layer.norm or layer.name)
            arguments = (layer.name, isinstance(hooked, nn.Conv2d | nn.BatchNorm2d))
            hook = hooked.register_forward_hook(lambda _layer, _inputs, out, given=arguments: multiply(*given, out))
            hooks.callback(hook.remove)
        yield gates


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients of the weights, but with gradients through the layers."""
    modes = {layer: layer.training for layer in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def _labels(batch: Mapping[str, Any], model: PreTrainedModel) -> torch.Tensor:
    """The labels of a batch, of shape `(batch_size,)`, on the model's device."""
    labels, num_labels = labels_of(batch), model.config.num_labels
    check_labels(labels, model.config)
    if labels.dim() > 1:
        raise NemoValueError(
            f"Masks are learnt for one label per sample, of shape (batch_size,); got several, of shape "
            f"{tuple(labels.shape)}. For those train a modular model with `ModularTrainer`."
        )
    if num_labels < 2 or not ((labels >= 0) & (labels < num_labels)).all():
        raise NemoValueError(
            f"Masks are learnt for labels from 0 to {num_labels - 1} (`model.config.num_labels`), at least two; got "
            f"values from {labels.min().item()} to {labels.max().item()}."
        )
    return labels.to(model.device)


def _check_values(target_retention: float, compactness: float, learning_rate: float, num_epochs: int) -> None:
    if not 0 < target_retention <= 1:
        raise NemoValueError(f"target_retention is a share of neurons in (0, 1], got {target_retention!r}.")
    if not compactness >= 0:
        raise NemoValueError(f"compactness must not be negative, got {compactness!r}.")
    if not learning_rate > 0:
        raise NemoValueError(f"learning_rate must be above 0, got {learning_rate!r}.")
    if not isinstance(num_epochs, int) or num_epochs < 1:
        raise NemoValueError(f"num_epochs must be an integer from 1 up, got {num_epochs!r}.")
