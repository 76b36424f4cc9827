# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 1: nothing changes unasked."""

import copy
import inspect

import pytest
import torch
from models import (
    BERT,
    DECODERS,
    VIT,
    assert_same_state,
    case_of,
    close,
    gated_by_hooks,
    module_masks,
    num_neurons,
    over_models,
    over_padded_models,
    over_two_models,
    state_copy,
)
from transformers.pytorch_utils import Conv1D

from nemo_hf import (
    ModularConfig,
    apply_masks,
    extract_module,
    hold_gates,
    list_maskable_layers,
    record_masks,
    remove_masks,
)
from nemo_hf.layers import GatedBatchNorm2d, MaskedConv2d, MaskedLayer
from nemo_hf.masking import masked_layers


@over_models
@torch.no_grad()
def test_apply_and_remove_masks_are_exact_inverses(case):
    model, inputs = case.model(), case.inputs()
    original, state = model(**inputs).logits, state_copy(model)
    signature, config = inspect.signature(model.forward), model.config.to_dict()
    hooks = {name: len(layer._forward_pre_hooks) for name, layer in model.named_modules()}

    assert apply_masks(model, ModularConfig(skip_first_blocks=0)) is model
    assert type(model) is case.model_class
    assert inspect.signature(model.forward) == signature
    assert set(state) < set(model.state_dict())
    assert all(".mask_generator." in name for name in set(model.state_dict()) - set(state))
    masked = model(**inputs).logits
    assert torch.equal(masked.argmax(-1), original.argmax(-1))
    if any(isinstance(layer, MaskedConv2d) for layer in model.modules()):
        close(masked, original, 0.05)  # gates start at 0.995, and no norm behind the last ones undoes it
    else:
        torch.testing.assert_close(masked, original, atol=2e-2, rtol=2e-2)
    assert not torch.equal(masked, original)

    assert remove_masks(model) is model
    assert torch.equal(model(**inputs).logits, original)
    assert_same_state(model.state_dict(), state)
    assert model.config.to_dict() == config
    assert not any(isinstance(layer, MaskedLayer) for layer in model.modules())
    assert {name: len(layer._forward_pre_hooks) for name, layer in model.named_modules()} == hooks
    assert not any(layer._forward_pre_hooks_with_kwargs for layer in model.modules())


def token_weights(case, model, inputs, tokens):
    """1 for real tokens, 0 for padding; a sound has fewer frames than amplitudes."""
    if case.sees == "sound":
        return model._get_feature_vector_attention_mask(tokens.shape[1], inputs["attention_mask"])
    return inputs.get("attention_mask", torch.ones(tokens.shape[:2]))


@over_models
@torch.no_grad()
def test_recorded_gates_are_those_that_multiplied_the_outputs(case):
    model, inputs = case.masked(), case.inputs()
    seen = {}

    def keep(layer, arguments, output):
        seen[layer.layer_name] = (arguments[0].clone(), output.clone())  # ResNet adds in place

    for layer in model.modules():
        if isinstance(layer, MaskedLayer | GatedBatchNorm2d):
            layer.register_forward_hook(keep)
    with record_masks(model) as gates:
        model(**inputs)

    assert list(gates) == list_maskable_layers(model)
    share = torch.cat([gate.flatten() for gate in gates.values()]).gt(0).float().mean()
    assert 0.1 < share
    assert share < 0.95 or any(isinstance(layer, MaskedConv2d) for layer in model.modules())
    for name, gate in gates.items():
        layer, (layer_input, output) = model.get_submodule(name), seen[name]
        generator = layer.mask_generator
        if isinstance(layer, MaskedConv2d):
            mean = layer_input.flatten(2).mean(-1)
            plain = torch.nn.functional.conv2d(
                layer_input, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            norm = model.get_submodule(layer.norm)
            scale = (norm.running_var + norm.eps).rsqrt() * norm.weight
            plain = (plain - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
            output, multiplied = seen[layer.norm][1], plain * gate[:, :, None, None]
            assert generator.reduce.bias is None  # as in the paper
        else:
            tokens = layer_input.reshape(4, -1, layer_input.shape[-1])  # Swin passes the windows of one image apart
            weights = token_weights(case, model, inputs, tokens)
            mean = torch.stack([sample[weight == 1].mean(0) for sample, weight in zip(tokens, weights, strict=True)])
            weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.T
            plain = tokens @ weight + (0 if layer.bias is None else layer.bias)
            multiplied = (plain * gate[:, None]).view(output.shape)
        bias = 0 if generator.reduce.bias is None else generator.reduce.bias
        hidden = (mean @ generator.reduce.weight.T + bias).clamp(min=0)
        expected = torch.tanh(hidden @ generator.expand.weight.T + generator.expand.bias).clamp(min=0)
        assert gate.shape == (4, num_neurons(model, name))
        assert gate.min() >= 0
        assert gate.max() <= 1
        close(gate, expected)
        close(output, multiplied)


@over_models
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_the_gradient_reaches_every_generator(case, gate):
    model = case.masked(gate=gate, paper=gate == "hard", skip_first_blocks=0)
    if gate == "hard":
        for layer in masked_layers(model).values():
            torch.nn.init.normal_(layer.mask_generator.expand.bias)  # else all gates of EfficientNet are open
    with record_masks(model) as gates:
        loss = model(**case.inputs()).logits.square().sum()
    assert list(gates) == list_maskable_layers(model)
    values = torch.cat([gate.flatten() for gate in gates.values()])
    if gate == "hard":
        assert set(values.unique().tolist()) == {0.0, 1.0}
    loss.backward()
    generators = {name: p for name, p in model.named_parameters() if ".mask_generator." in name}
    sizes = [3 if isinstance(layer, MaskedConv2d) and gate == "hard" else 4 for layer in masked_layers(model).values()]
    assert len(generators) == sum(sizes)
    assert [name for name, p in generators.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_closed_hard_gate_has_a_gradient():
    model = VIT.masked(gate="hard")
    with record_masks(model) as gates:
        model(**VIT.inputs())
    gate = next(iter(gates.values()))
    bias = next(layer for layer in model.modules() if isinstance(layer, MaskedLayer)).mask_generator.expand.bias
    (gradient,) = torch.autograd.grad(gate.sum(), bias)
    closed = (gate == 0).all(0)
    assert closed.any()
    assert (gradient[closed] > 0).all()


@over_models
@torch.no_grad()
def test_a_deep_copy_is_independent(case):
    model, inputs = case.masked(), case.inputs()
    expected = model(**inputs).logits
    clone = copy.deepcopy(model)
    with record_masks(clone) as of_clone, record_masks(model) as of_model:
        assert torch.equal(clone(**inputs).logits, expected)
        assert of_model == {}
    assert len(of_clone) == len(list_maskable_layers(model))
    with hold_gates(model, {name: torch.zeros(gate.shape[1]) for name, gate in of_clone.items()}):
        assert torch.equal(clone(**inputs).logits, expected)
    remove_masks(clone)
    assert not torch.equal(clone(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    with record_masks(model) as of_model:
        model(**inputs)
    assert all(torch.equal(of_model[name], of_clone[name]) for name in of_clone)


@over_padded_models
@torch.no_grad()
def test_padding_changes_neither_gates_nor_logits(case):
    model, inputs = case.masked(), case.inputs()
    with record_masks(model) as padded:
        padded_logits = model(**inputs).logits
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        single = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        with record_masks(model) as alone:
            logits = model(**single).logits
        torch.testing.assert_close(padded_logits[row], logits[0], atol=1e-5, rtol=1e-5)
        for name, gate in alone.items():
            torch.testing.assert_close(padded[name][row], gate[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", DECODERS, ids=str)
@torch.no_grad()
def test_padding_of_decoders_may_stand_on_either_side(case):
    model, inputs = case.masked(), case.inputs()
    lengths = inputs["attention_mask"].sum(1).tolist()
    left = {
        name: torch.stack([row.roll(-n) for row, n in zip(value, lengths, strict=True)])
        for name, value in inputs.items()
    }
    if case.config_class.model_type == "gpt2":  # the others have relative positions
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    module = extract_module(model, module_masks(model), ["cat", "elk"])
    with record_masks(model) as gates_right:
        logits = model(**inputs).logits
    with record_masks(model) as gates_left:
        torch.testing.assert_close(model(**left).logits, logits, atol=1e-5, rtol=1e-5)
    assert list(gates_left) == list(gates_right) == list_maskable_layers(model)
    for name, gate in gates_left.items():
        torch.testing.assert_close(gate, gates_right[name], atol=1e-5, rtol=1e-5)
    close(module(**left).logits, module(**inputs).logits)


@over_models
@torch.no_grad()
def test_a_sample_is_the_same_alone_and_in_a_batch(case):
    model, inputs = case.masked(), case.inputs()
    with record_masks(model) as together:
        logits = model(**inputs).logits
    for row in range(4):
        with record_masks(model) as alone:
            logits_alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        torch.testing.assert_close(logits_alone, logits[row : row + 1], atol=1e-5, rtol=1e-5)
        for name, gate in alone.items():
            torch.testing.assert_close(gate, together[name][row : row + 1], atol=1e-5, rtol=1e-5)


@over_padded_models
@torch.no_grad()
def test_a_positional_attention_mask_counts_too(case):
    model, inputs = case.masked(), case.inputs()
    expected = model(**inputs).logits
    names = list(inspect.signature(model.forward).parameters)
    between = [None] * (names.index("attention_mask") - 1)
    first, mask = inputs.values()
    assert torch.equal(model(first, *between, mask).logits, expected)
    assert not torch.equal(model(first).logits, expected)  # the last mask is forgotten


@over_models
def test_list_maskable_layers_is_the_same_before_and_after(case):
    config = ModularConfig(skip_first_blocks=0)
    model = case.model()
    before = list_maskable_layers(model, config)
    apply_masks(model, config)
    assert list_maskable_layers(model) == before
    masked = [name for name, layer in model.named_modules() if isinstance(layer, MaskedLayer)]
    assert sorted(masked) == sorted(before)
    assert list(masked_layers(model)) == before
    later = list_maskable_layers(model, ModularConfig())
    assert later == before[len(before) - len(later) :]
    assert 0 < len(later) < len(before)


VIT_ATTENTION = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"]
VIT_FFN = ["mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", VIT_ATTENTION + VIT_FFN),
        ("attention", VIT_ATTENTION),
        ("ffn", VIT_FFN),
        (["mlp.fc1"], ["mlp.fc1"]),
        (["fc2", "q_proj"], ["attention.q_proj", "mlp.fc2"]),
        ([f"vit.layers.{block}.mlp.fc1" for block in range(3)], ["mlp.fc1"]),
        (r".*\.(k|v)_proj", ["attention.k_proj", "attention.v_proj"]),
    ],
    ids=str,
)
def test_target_modules_select_layers(targets, expected):
    config = ModularConfig(target_modules=targets, skip_first_blocks=1)
    model = VIT.model()
    names = [f"vit.layers.{block}.{name}" for block in (1, 2) for name in expected]
    assert list_maskable_layers(model, config) == names
    apply_masks(model, config)
    assert list_maskable_layers(model) == names


@over_models
@torch.no_grad()
def test_hold_gates_multiplies_by_constants(case):
    model, inputs = case.masked(), case.inputs()
    names = list_maskable_layers(model)
    gates = {name: torch.rand(num_neurons(model, name)) for name in names}
    before = model(**inputs).logits
    with hold_gates(model, gates):
        held = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, before)
    plain = remove_masks(model)
    with gated_by_hooks(plain, gates):
        assert torch.equal(plain(**inputs).logits, held)


@over_two_models
def test_masks_follow_train_mode_device_and_dtype(case):
    model = apply_masks(case.model().to(torch.bfloat16).train())
    generators = [layer.mask_generator for layer in model.modules() if isinstance(layer, MaskedLayer)]
    assert all(generator.training for generator in generators)
    assert {p.dtype for generator in generators for p in generator.parameters()} == {torch.bfloat16}
    model.eval()
    assert not any(layer.training for layer in model.modules())
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in case.inputs().items()}
    assert model(**inputs).logits.dtype == torch.bfloat16


def test_config_round_trip_drops_options_of_newer_versions():
    config = ModularConfig(target_modules=["fc1"], skip_first_blocks=2, generator_hidden_size=None, gate="hard")
    assert ModularConfig.from_dict(config.to_dict()) == config
    assert ModularConfig.from_dict({**config.to_dict(), "from_the_future": 1}) == config


@pytest.mark.parametrize(
    "case", [VIT, BERT, case_of("LlamaForSequenceClassification"), case_of("SwinForImageClassification")], ids=str
)
def test_gradients_are_those_of_a_plain_multiplication(case):
    """Layers whose product is remembered anyway compute the gradient of their gates from it."""
    gradients = []
    for remembered in (True, False):
        model = case.masked(skip_first_blocks=0).double().train()
        layers = masked_layers(model).values()
        assert any(layer.remembered for layer in layers)
        for layer in layers:
            layer.remembered = layer.remembered and remembered
            layer.mask_generator.expand.bias.data.normal_(generator=torch.Generator().manual_seed(0))  # some closed
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs().items()}
        with record_masks(model) as gates, torch.random.fork_rng():
            torch.manual_seed(0)
            loss = model(**inputs).logits.square().sum() + sum(gate.square().sum() for gate in gates.values())
        assert any((gate == 0).any() for gate in gates.values())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-9)
