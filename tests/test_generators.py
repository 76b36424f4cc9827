# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Mask generators: what they cost and how they start."""

import cnns
import pytest
import torch
import transformers
from models import RESNET, VIT

from nemo_hf import ModularConfig, apply_masks, record_masks
from nemo_hf.layers import MaskedConv2d, MaskedLinear, MaskGenerator
from nemo_hf.masking import masked_layers
from nemo_hf.metrics import count_parameters


SIZES = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
DISTILBERT_SIZES = {"dim": 384, "n_heads": 6, "hidden_dim": 1536, "n_layers": 6}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (transformers.ViTForImageClassification, transformers.ViTConfig(**SIZES)),
        (transformers.DeiTForImageClassification, transformers.DeiTConfig(**SIZES)),
        (transformers.BertForSequenceClassification, transformers.BertConfig(**SIZES)),
        (transformers.DistilBertForSequenceClassification, transformers.DistilBertConfig(**DISTILBERT_SIZES)),
    ],
    ids=["vit", "deit", "bert", "distilbert"],
)
def test_default_generators_add_at_most_a_tenth(model_class, config):
    with torch.device("meta"):
        model = model_class(config)
        plain = count_parameters(model)
        apply_masks(model, ModularConfig(skip_first_blocks=0))
    assert plain < count_parameters(model) <= 1.1 * plain


def test_paper_width_makes_the_paper_s_model():
    """METHOD.md 2: the 21.3 M parameters of ViT-S grow by 53.6 M, over 38,016 neurons."""
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**{**SIZES, "num_attention_heads": 12}, image_size=32, patch_size=4, num_labels=10)
        )
        plain = count_parameters(model)
        apply_masks(model, ModularConfig(generator_hidden_size=None))
    assert plain == pytest.approx(21.3e6, rel=0.005)
    assert count_parameters(model) - plain == pytest.approx(53.6e6, rel=0.005)


@pytest.mark.parametrize(("neurons", "width"), [(7, 7), (3072, 3072), (3073, 1536)])
def test_paper_width_halves_from_3073_up(neurons, width):
    generator = MaskGenerator(4, neurons, None, "paper", "soft", device=torch.device("meta"))
    assert generator.reduce.out_features == generator.expand.in_features == width


def test_paper_initialisation_has_biases_of_one_and_mostly_open_gates():
    generator = MaskGenerator(256, 256, None, "paper", "soft")
    assert (generator.reduce.bias == 1).all()
    assert (generator.expand.bias == 1).all()
    for weight in (generator.reduce.weight, generator.expand.weight):
        torch.testing.assert_close(weight.std(), torch.tensor((2 / 256) ** 0.5), atol=2e-3, rtol=0)
    share = (generator(torch.randn(64, 256)) > 0).float().mean()
    assert 0.6 < share < 0.9  # METHOD.md 2: about 75 % > 0


def test_open_initialisation_is_nearly_one_but_not_identical():
    gates = MaskGenerator(32, 64, 16, "open", "soft")(torch.randn(8, 32))
    assert gates.min() > 0.98
    assert gates.std(0).min() > 0  # identical gates would be a saddle of the contrastive loss


def test_width_is_that_of_the_config():
    model = apply_masks(VIT.model(), ModularConfig(generator_hidden_size=5))
    assert model.vit.layers[1].mlp.fc1.mask_generator.reduce.weight.shape == (5, 32)
    assert model.vit.layers[1].mlp.fc1.mask_generator.expand.weight.shape == (64, 5)


@pytest.mark.parametrize(
    ("case", "detach", "detached"),
    [(VIT, None, True), (VIT, False, False), (RESNET, None, False), (RESNET, True, True)],
    ids=["linear", "linear attached", "convolutions", "convolutions detached"],
)
def test_gates_of_detached_generators_move_no_weights_of_the_model(case, detach, detached):
    """What depends on the gates alone, as the modular terms do, has a gradient for generators only."""
    model = case.masked(detach_generator_inputs=detach)
    with record_masks(model) as masks:
        model(**case.inputs())
    sum(gates.sum() for gates in masks.values()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("mask_generator" in name for name in moved)
    assert all("mask_generator" in name for name in moved) == detached


def test_the_task_trains_generators_and_weights_either_way():
    gradients = []
    for detach in (True, False):
        model = VIT.masked(detach_generator_inputs=detach)
        model(**VIT.inputs(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    last = f"vit.layers.{VIT.options['num_hidden_layers'] - 1}.mlp.fc2"
    for name in (f"{last}.weight", f"{last}.mask_generator.expand.weight"):  # no generator behind them
        torch.testing.assert_close(gradients[0][name], gradients[1][name])
    first = "vit.layers.0.mlp.fc1.weight"
    assert gradients[0][first].any()
    assert not torch.allclose(gradients[0][first], gradients[1][first])


def test_one_convolution_attaches_the_linear_layers_of_its_model_too():
    with torch.device("meta"):
        model = apply_masks(cnns.CifarVGGForImageClassification(cnns.CifarVGGConfig(width_multiplier=0.1)))
    kinds = {type(layer): layer.mask_generator.detach_inputs for layer in masked_layers(model).values()}
    assert kinds == {MaskedConv2d: False, MaskedLinear: False}
