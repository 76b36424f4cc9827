# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The usual way to make a plain model smaller, as a reference: drop the neurons with the smallest weights."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nemo_hf import ModularConfig, ModuleMasks, list_maskable_layers
from nemo_hf.extraction import module_parameters


@torch.no_grad()
def neuron_norms(model: PreTrainedModel, config: ModularConfig) -> dict[str, torch.Tensor]:
    """
    The L2 norm of every neuron's weights, divided by the mean of its layer.

    Args:
        model (`PreTrainedModel`): a plain model.
        config ([`ModularConfig`]): which layers.

    Returns:
        `dict[str, torch.Tensor]`: layer name → norms of shape `(num_neurons,)`.
    """
    norms = {}
    for name in list_maskable_layers(model, config):
        layer = model.get_submodule(name)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        norm = weight.flatten(1).norm(dim=1).float().cpu()
        norms[name] = norm / norm.mean()
    return norms


def magnitude_masks(
    model: PreTrainedModel, config: ModularConfig, num_labels: int, parameters: float
) -> tuple[ModuleMasks, int]:
    """
    The masks that keep the largest neurons, as many as make modules of `num_labels` labels as large as asked. The
    masks of all labels are alike. Every layer keeps its largest neuron.

    Args:
        model (`PreTrainedModel`): a plain model.
        config ([`ModularConfig`]): which layers.
        num_labels (`int`): labels of the modules.
        parameters (`float`): number of parameters that a module shall have.

    Returns:
        The masks whose modules are nearest to that size, and the number of parameters of these.
    """
    norms = neuron_norms(model, config)
    ranked = torch.cat([norm.masked_fill(norm == norm.max(), torch.inf) for norm in norms.values()])
    rank = torch.empty(len(ranked), dtype=torch.long)
    rank[ranked.argsort(descending=True, stable=True)] = torch.arange(len(ranked))
    ranks = dict(zip(norms, rank.split([len(norm) for norm in norms.values()]), strict=True))
    labels = list(range(num_labels))

    def keep(number: int) -> tuple[ModuleMasks, int]:
        mask = {name: of_layer < number for name, of_layer in ranks.items()}
        masks = ModuleMasks(dict.fromkeys(range(model.config.num_labels), mask))
        return masks, module_parameters(model, masks, [labels])[0]

    low, high = len(norms), len(rank)  # numbers of neurons
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keep(middle)[1] <= parameters else (low, middle)
    return min((keep(low), keep(high)), key=lambda found: abs(found[1] - parameters))
