# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
The terms that make a model modular. Each is an `nn.Module` that takes the gates of a batch and its labels (ids
of shape `(batch_size,)` or booleans of shape `(batch_size, num_labels)`) and returns a dictionary of weighted scalar
terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import NemoValueError
from .labels import OTHER_COLUMN, shares_label


ZERO_NORM = 1e-4  # added to squared norms of gates: a row of zeros keeps a finite gradient
NEMO_EPSILON = 1e-8  # of the reference
NEMO_SHORTEST = 1e-2  # rows of gates that are shorter are divided by this instead of their length


def at_least_float(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 what has less precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def stack_by_width(masks: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """
    The gates of layers of equal width stacked, in float32 at least, so that a loss needs a few batched operations
    instead of one per layer.

    Args:
        masks (`Mapping[str, torch.Tensor]`): layer name → gates of shape `(batch_size, num_neurons)`.

    Returns:
        `list[torch.Tensor]` of shapes `(num_layers, batch_size, num_neurons)`, one for each width.
    """
    groups: dict[int, list[torch.Tensor]] = {}
    for gates in masks.values():
        groups.setdefault(gates.shape[-1], []).append(at_least_float(gates))
    return [torch.stack(group) for group in groups.values()]


def _same_label(masks: Mapping[str, torch.Tensor], labels: torch.Tensor | None) -> torch.Tensor:
    """Boolean `(batch_size, batch_size)`: whether two samples have a label in common."""
    if not masks:
        raise NemoValueError("There are no gates to compare: the forward pass recorded none.")
    if labels is None:
        raise NemoValueError(
            "A modular objective compares the gates of samples by label, but the batch has no labels."
        )
    batch_size = next(iter(masks.values())).shape[0]
    one_each = labels.shape == (batch_size,) and not labels.is_floating_point()
    several_each = labels.shape[:-1] == (batch_size,) and labels.dtype == torch.bool
    if not one_each and not several_each:
        raise NemoValueError(
            f"A modular objective needs booleans of shape ({batch_size}, num_labels), or one integer label per "
            f"sample, of shape ({batch_size},); got {labels.dtype} of shape {tuple(labels.shape)}. Regression and "
            f"token labels have no classes to organise gates by. {OTHER_COLUMN}"
        )
    return shares_label(labels)


def _unit(gates: torch.Tensor) -> torch.Tensor:
    """Rows of unit length; unlike a division by the norm, with a finite gradient for a row of zeros."""
    return gates * (gates.square().sum(-1, keepdim=True) + ZERO_NORM).rsqrt()


class ContrastiveLoss(nn.Module):
    """
    Supervised contrastive loss on gates: samples of one class shall open the same neurons, samples of different
    classes others.

    For layer `l`, with gates normalised to unit length and `S` their inner products, `P(i)` the other samples that
    share a label with `i` and `A(i)` all other samples: `L_l = mean_i [logsumexp_{j ∈ A(i)} S_ij / τ − mean_{j ∈ P(i)}
    S_ij / τ]`, averaged over layers. The form of Khosla et al. (arXiv 2004.11362, equation 2) of the loss of NeMo
    (arXiv 2508.11348, section 3): a sample is no partner of itself, samples without partner are skipped, everything
    runs in float32. A batch without pairs gives zero.

    Args:
        alpha (`float`): weight.
        temperature (`float`): τ.

    Returns:
        `dict[str, torch.Tensor]`: `loss_contrastive`, weighted.
    """

    def __init__(self, alpha: float, temperature: float):
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature

    def forward(self, masks: Mapping[str, torch.Tensor], labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        same = _same_label(masks, labels)
        others = ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        positives = (same & others).float()
        partners = positives.sum(-1)
        weight = (partners > 0).float() / (partners > 0).sum().clamp(min=1)
        total = 0.0
        with torch.autocast(same.device.type, enabled=False):
            for gates in stack_by_width(masks):
                unit = _unit(gates)
                similarity = unit @ unit.transpose(-1, -2) / self.temperature
                # The diagonal is masked by a finite number: a batch of one sample has no others, and -inf would give
                # NaN.
                all_others = torch.logsumexp(similarity.masked_fill(~others, -1e4), dim=-1)
                mean_partner = (similarity * positives).sum(-1) / partners.clamp(min=1)
                total = total + ((all_others - mean_partner) * weight).sum()
        return {"loss_contrastive": self.alpha * total / len(masks)}


class NemoLoss(nn.Module):
    """
    The contrastive loss exactly as the reference code of NeMo computes it (arXiv 2508.11348), for comparison: every
    sample is its own partner, and pairs that do not count enter both sums as `exp(0)`.

    `A_i = Σ_j exp(S_ij P_ij / τ)`, `N_i = Σ_j exp(S_ij (1 − P_ij) / τ)`, `L_l = mean_i −log[(A_i + ε) / (A_i + N_i +
    ε)]`, with `P_ij = 1` where two samples share a label and `ε = 1e-8`, averaged over layers.

    Args:
        alpha (`float`): weight.
        temperature (`float`): τ.

    Returns:
        `dict[str, torch.Tensor]`: `loss_contrastive`, weighted.
    """

    def __init__(self, alpha: float, temperature: float):
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature

    def forward(self, masks: Mapping[str, torch.Tensor], labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        same = _same_label(masks, labels).float()
        total = 0.0
        with torch.autocast(same.device.type, enabled=False):
            for gates in stack_by_width(masks):
                # The reference divides by 1e-12 where a row is zero: no gradient of half precision holds the result.
                unit = nn.functional.normalize(gates, dim=-1, eps=NEMO_SHORTEST)
                similarity = unit @ unit.transpose(-1, -2) / self.temperature
                positive = torch.exp(similarity * same).sum(-1)
                negative = torch.exp(similarity * (1 - same)).sum(-1)
                ratio = (positive + NEMO_EPSILON) / (positive + negative + NEMO_EPSILON)
                total = total - ratio.log().mean(-1).sum()
        return {"loss_contrastive": self.alpha * total / len(masks)}


class CohesionCouplingLoss(nn.Module):
    """
    Gates of samples of one class shall be alike and those of different classes different: the loss of MwT (arXiv
    2306.09376, section 3), and of MODA (arXiv 2411.01074, section 3) where the "gates" are activations.

    With `S_ij` the cosine similarity of the gates of two samples in a layer: `alpha · (1 − mean S_ij over pairs of one
    class) + beta · mean S_ij over pairs of different classes`, averaged over layers. A sample and itself are no pair;
    without pairs of a kind their term is zero.

    Args:
        alpha (`float`): weight of the first term, the lack of cohesion.
        beta (`float`): weight of the second, the coupling.

    Returns:
        `dict[str, torch.Tensor]`: `loss_cohesion` and `loss_coupling`, weighted.
    """

    def __init__(self, alpha: float, beta: float):
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, masks: Mapping[str, torch.Tensor], labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        same = _same_label(masks, labels)
        others = ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        alike, unlike = (same & others).float(), (~same & others).float()
        in_class = between = 0.0
        with torch.autocast(same.device.type, enabled=False):
            for gates in stack_by_width(masks):
                unit = _unit(gates)
                similarity = unit @ unit.transpose(-1, -2)
                in_class = in_class + (similarity * alike).sum()
                between = between + (similarity * unlike).sum()
            num_alike, num_unlike = alike.sum(), unlike.sum()
            # No pairs: nothing to bring together.
            lack = (num_alike > 0).float() - in_class / (len(masks) * num_alike.clamp(min=1))
            shared = between / (len(masks) * num_unlike.clamp(min=1))
        return {"loss_cohesion": self.alpha * lack, "loss_coupling": self.beta * shared}


class CompactnessLoss(nn.Module):
    """
    Pulls the share of open neurons down to a target.

    Gates in [0, 1]: `weight · max(0, mean gate − target)`, the mean over samples and all neurons of the model.
    Activations, which have no upper bound: `weight · mean activation` (the L1 term of MODA, arXiv 2411.01074, section
    3) as long as the share of active neurons is above the target.

    Args:
        weight (`float`): weight.
        target_retention (`float`): share of neurons that a sample shall keep open; no pull below it.
        activations (`bool`, *optional*, defaults to `False`): whether the gates are activations.

    Returns:
        `dict[str, torch.Tensor]`: `loss_compactness`, weighted.
    """

    def __init__(self, weight: float, target_retention: float, activations: bool = False):
        super().__init__()
        self.weight = weight
        self.target_retention = target_retention
        self.activations = activations

    def forward(self, masks: Mapping[str, torch.Tensor], labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        neurons = sum(gates.shape[-1] for gates in masks.values())
        mean_gate = sum(at_least_float(gates).mean(0).sum() for gates in masks.values()) / neurons
        if not self.activations:
            return {"loss_compactness": self.weight * torch.relu(mean_gate - self.target_retention)}
        share_open = sum((gates > 0).float().mean(0).sum() for gates in masks.values()) / neurons
        return {"loss_compactness": self.weight * mean_gate * (share_open > self.target_retention).float()}


def distillation_loss(
    class_logits: torch.Tensor, distillation_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """
    `0.5 · CE(class head) + 0.25 · (KL(class head, teacher) + KL(distillation head, teacher))`, in float32: the soft
    distillation of NeMo's recipe for DeiT (arXiv 2508.11348, section 4).

    Args:
        class_logits, distillation_logits, teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`): of both
            heads of the student, and of the teacher.
        labels (`torch.Tensor` of shape `(batch_size,)`): ids.

    Returns:
        `torch.Tensor`: a scalar.
    """
    teacher = teacher_logits.float().softmax(-1)
    divergence = sum(
        nn.functional.kl_div(logits.float().log_softmax(-1), teacher, reduction="batchmean")
        for logits in (class_logits, distillation_logits)
    )
    return 0.5 * nn.functional.cross_entropy(class_logits.float(), labels) + 0.25 * divergence


def distilled_outputs(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], teacher: nn.Module | None
) -> tuple[torch.Tensor, Any]:
    """
    Outputs and loss of `DeiT…WithTeacher`, which takes no labels: in training [`distillation_loss`]; in evaluation,
    which needs no teacher, the cross-entropy of the average of both heads.

    Args:
        model (`nn.Module`): the student.
        inputs (`Mapping[str, torch.Tensor]`): a batch with `labels`, ids of shape `(batch_size,)`.
        teacher (`nn.Module`, *optional*): a classifier of the same `pixel_values`.

    Returns:
        The loss and the outputs of the student.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: for other labels, or in training without a teacher.
    """
    labels = inputs["labels"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise NemoValueError(
            f"Distillation needs one integer label per sample, of shape (batch_size,); got {labels.dtype} of "
            f"shape {tuple(labels.shape)}."
        )
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    if not model.training:
        return nn.functional.cross_entropy(outputs.logits.float(), labels), outputs
    if teacher is None:
        raise NemoValueError("The model learns from a teacher: pass ModularTrainer(..., teacher_model=classifier).")
    with torch.no_grad():
        teacher_logits = teacher(pixel_values=inputs["pixel_values"]).logits
    return distillation_loss(outputs.cls_logits, outputs.distillation_logits, teacher_logits, labels), outputs


def of_micro_batch(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A `compute_loss_func` whose `num_items_in_batch` is the size of the micro-batch, as for the modular terms."""

    @functools.wraps(function)
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return function(outputs, labels, num_items_in_batch=None if labels is None else len(labels))

    return loss


def make_objective(name: str, alpha: float, beta: float, temperature: float) -> nn.Module:
    """The objective of a name in [`OBJECTIVE_DEFAULTS`]; each takes the weights that it has."""
    if name in ("mwt", "moda"):
        return CohesionCouplingLoss(alpha, beta)
    return {"contrastive": ContrastiveLoss, "nemo": NemoLoss}[name](alpha, temperature)


# Where an objective was published, its weights are those of the publication: no size term but MODA's, no warm-up. The
# share of mixed gates of the contrastive one depends on the model, see `mix_gates`.
OBJECTIVE_DEFAULTS: dict[str, dict[str, float]] = {
    "contrastive": {
        "alpha": 0.1,
        "beta": 0.0,
        "compactness": 2.0,
        "target_retention": 0.07,
        "modular_warmup_ratio": 0.25,
    },
    "nemo": {
        "alpha": 0.1,
        "beta": 0.0,
        "compactness": 0.0,
        "target_retention": 0.07,
        "modular_warmup_ratio": 0.0,
        "gate_mixing_ratio": 0.0,
    },
    "mwt": {
        "alpha": 0.5,
        "beta": 1.5,
        "compactness": 0.0,
        "target_retention": 0.07,
        "modular_warmup_ratio": 0.0,
        "gate_mixing_ratio": 0.0,
    },
    "moda": {
        "alpha": 1.0,
        "beta": 1.0,
        "compactness": 0.3,
        "target_retention": 0.0,
        "modular_warmup_ratio": 0.0,
        "gate_mixing_ratio": 0.0,
    },
}
