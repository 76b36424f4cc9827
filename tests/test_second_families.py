# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The promises over the second list of families, and the rules of `docs/removing_neurons.md` that they need."""

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from nemo_hf import (
    ModularConfig,
    ModularTrainer,
    ModularTrainingArguments,
    ModuleMasks,
    apply_masks,
    extract_module,
    hold_gates,
    list_maskable_layers,
    record_masks,
    register_architecture,
    remove_masks,
    save_module,
)
from nemo_hf.architectures import ARCHITECTURES
from nemo_hf.errors import NemoValueError, UnsupportedModelError
from nemo_hf.extraction import constant_gates
from nemo_hf.layers import MaskedLayer
from nemo_hf.masking import masked_layers
from nemo_hf.resolution import maskable_layers
from nemo_hf.slim import layer_sizes


LABELS = ["ant", "bee", "cat", "dog", "elk"]
LENGTHS = (1.0, 0.6, 0.45, 0.3)  # real share of the samples of a padded batch


@dataclass(frozen=True)
class Case:
    """A tiny model: its name in transformers, its configuration, and what it sees."""

    name: str
    options: dict[str, Any]
    sees: str
    variant: str = ""

    def __str__(self):
        return f"{self.name}{'-' if self.variant else ''}{self.variant}"

    @property
    def task(self):
        return {"image": "Image", "text": "Sequence", "sound": "Sequence", "spectrogram": "Audio"}[self.sees]

    @property
    def auto_name(self):
        return f"AutoModelFor{'Audio' if self.sees in ('sound', 'spectrogram') else self.task}Classification"

    @property
    def model_class(self):
        return getattr(transformers, f"{self.name}For{self.task}Classification")

    def model(self, seed=0, **overrides):
        """A random model in evaluation mode, without trivial biases, norms and statistics."""
        torch.manual_seed(seed)
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        config = getattr(transformers, f"{self.name}Config")(**{**self.options, **names, **overrides})
        model = self.model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if "running_" in name:
                    buffer.normal_(0, 0.3) if "mean" in name else buffer.uniform_(0.1, 0.5)
        return model.eval()

    def masked(self, **options):
        return apply_masks(self.model(), ModularConfig(**{"generator_init": "paper", **options}))

    def inputs(self, size=4, seed=0, labels=None):
        """A batch; text and sound are padded. With labels it shows them, so that they can be learnt."""
        generator = torch.Generator().manual_seed(seed)
        shift = 0 if labels is None else labels.float()
        if self.sees in ("image", "spectrogram"):
            shape = (12, 8) if self.sees == "spectrogram" else (3, 32, 32)
            shift = shift if labels is None else shift.view(-1, *[1] * len(shape))
            name = "pixel_values" if self.sees == "image" else "input_values"
            return {name: torch.randn(size, *shape, generator=generator) + shift}
        length = 9 if self.sees == "text" else 200
        lengths = (torch.tensor(LENGTHS).repeat(size)[:size, None] * length).round()
        mask = (torch.arange(length) < lengths).long()
        if self.sees == "text":
            tokens = torch.randint(3, 30, (size, length), generator=generator)
            tokens = tokens + (0 if labels is None else 4 * labels[:, None])
            return {"input_ids": torch.where(mask == 1, tokens, 0), "attention_mask": mask}
        sound = torch.randn(size, length, generator=generator) + (shift if labels is None else shift[:, None])
        return {"input_values": sound * mask, "attention_mask": mask}


_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGE = {**_COMMON, "image_size": 32, "patch_size": 16}
_TEXT = {**_COMMON, "vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
# Grids of 8 and 4 tokens: their windows are padded, every second block shifts them.
_WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3, "image_size": 32}
_PYRAMID = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 32],
    "depths": [1, 2],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "patch_sizes": [3, 3],
    "strides": [4, 2],
}
_EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.025,
    "depth_coefficient": 1.0,
    "hidden_dim": 32,
    "in_channels": [32, 320, 640],
    "out_channels": [320, 640, 640],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 1],
    "num_block_repeats": [1, 2, 1],
    "expand_ratios": [1, 4, 4],
}
_DEBERTA = {
    **_TEXT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 4,
    "max_relative_positions": 20,
}
_SPEECH = {
    **_COMMON,
    "conv_dim": [16, 16],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",  # with a norm over time, padding changes the features themselves
    "classifier_proj_size": 24,
    "vocab_size": 20,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
_SPECTROGRAM = {"patch_size": 4, "num_mel_bins": 8, "max_length": 12, "frequency_stride": 4, "time_stride": 4}

CASES = [
    Case("ViTMSN", _IMAGE, "image"),
    Case("CLIP", {"vision_config": _IMAGE}, "image"),
    Case("Siglip", {"vision_config": _IMAGE}, "image"),
    Case("Swin", _WINDOWS, "image"),
    Case("Swinv2", _WINDOWS, "image"),
    Case("PvtV2", _PYRAMID, "image"),
    Case("PvtV2", {**_PYRAMID, "linear_attention": True}, "image", "linear"),
    Case("EfficientNet", _EFFICIENT, "image"),
    Case("DebertaV2", {**_DEBERTA, "share_att_key": True, "norm_rel_ebd": "layer_norm"}, "text", "shared"),
    Case("DebertaV2", {**_DEBERTA, "share_att_key": False, "conv_kernel_size": 3}, "text", "own"),
    Case("EuroBert", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}, "text"),
    Case("NomicBert", {**_TEXT, "head_dim": 8}, "text"),
    Case("AST", {**_COMMON, **_SPECTROGRAM}, "spectrogram"),
    Case("Wav2Vec2", _SPEECH, "sound"),
    Case("Hubert", {**_SPEECH, "do_stable_layer_norm": True}, "sound"),
    Case("WavLM", _SPEECH, "sound"),
]
CASE = {str(case): case for case in CASES}
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
padded = pytest.mark.parametrize("case", [case for case in CASES if case.sees in ("text", "sound")], ids=str)
# torch announces that the attention of WavLM, which transformers calls so, will refuse two kinds of masks.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


def maskable(model):
    return {layer.name: layer for layer in maskable_layers(model) if layer.reason is None}


def random_masks(model, keep=None, seed=1):
    """One boolean tensor and one of gates per maskable layer; `keep` fixes the share that is kept."""
    generator = torch.Generator().manual_seed(seed)
    masks, gates = {}, {}
    for i, name in enumerate(maskable(model)):
        neurons = layer_sizes(model.get_submodule(name))[1]
        share = (0.5, 0.2, 0.7, 0.35, 1.0)[i % 5] if keep is None else keep
        masks[name] = torch.rand(neurons, generator=generator) < share
        gates[name] = 0.1 + 0.9 * torch.rand(neurons, generator=generator)
    return masks, gates


@contextlib.contextmanager
def gated_by_hooks(model, held):
    """Multiply outputs of a plain model by constants, without any code of nemo_hf but the names."""
    hooks = []
    for name, gate in held.items():
        layer = model.get_submodule(maskable(model)[name].norm or name)
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            gate = gate.view(-1, 1, 1)
        hooks.append(layer.register_forward_hook(lambda _layer, _inputs, output, gate=gate: output * gate))
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def check_exact(model, inputs, masks, gates, labels=("dog", "bee")):
    """A module equals its parent with constant gates, up to 1e-5 · max(1, |logits|)."""
    named = dict.fromkeys(LABELS, masks)
    module_masks = ModuleMasks(named, None if gates is None else dict.fromkeys(LABELS, gates))
    module = extract_module(model, module_masks, labels)
    held = {name: mask.float() * (1 if gates is None else gates[name]) for name, mask in masks.items()}
    with gated_by_hooks(model, held):
        expected = model(**inputs).logits[:, [LABELS.index(label) for label in labels]]
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(module(**inputs).logits, expected, atol=limit, rtol=0)
    return module, expected


@over_cases
@pytest.mark.parametrize("labels", [["cat"], ["elk", "ant"], LABELS], ids=len)
def test_modules_are_exact(case, labels):
    model, inputs = case.model(), case.inputs()
    for seed in (1, 2):
        masks, gates = random_masks(model, seed=seed)
        module, expected = check_exact(model, inputs, masks, gates if seed == 1 else None, labels)
    assert not torch.allclose(expected, model(**inputs).logits[:, [LABELS.index(n) for n in labels]], atol=1e-3)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in model.parameters())


@over_cases
def test_empty_and_full_layers_are_exact(case):
    model, inputs = case.model(), case.inputs()
    everything, _ = random_masks(model, keep=2)
    module, _ = check_exact(model, inputs, everything, None, LABELS)
    assert module.config.nemo["shapes"] == {}
    check_exact(model, inputs, *random_masks(model, keep=-1))
    names = list(maskable(model))
    for name in names[-7:]:
        masks, gates = random_masks(model)
        masks[name][:] = False
        check_exact(model, inputs, masks, gates)
        check_exact(model, inputs, {name: masks[name]}, None)


@over_cases
def test_empty_heads_are_exact_and_leave_the_layer(case):
    model, inputs = case.model(), case.inputs()
    roles = [name for name in maskable(model) if "v_proj" in name or "value" in name]
    masks, gates = random_masks(model)
    for name in roles:
        masks[name][:] = True
        masks[name][: len(masks[name]) // 2] = False
    module, _ = check_exact(model, inputs, masks, gates)
    attention = module.config.nemo["shapes"].get("attributes", {})
    assert len(attention) == len(roles)
    for name in roles:
        assert layer_sizes(module.get_submodule(name))[1] <= len(masks[name]) // 2


@over_cases
@torch.no_grad()
def test_masks_come_off_without_a_trace(case):
    model, inputs = case.model(), case.inputs()
    original, state = model(**inputs).logits, {name: t.clone() for name, t in model.state_dict().items()}
    config = model.config.to_dict()
    apply_masks(model, ModularConfig(skip_first_blocks=0))
    masked = model(**inputs).logits
    assert not torch.equal(masked, original)
    torch.testing.assert_close(masked, original, atol=5e-2, rtol=5e-2)
    remove_masks(model)
    assert torch.equal(model(**inputs).logits, original)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not any(layer._forward_pre_hooks for layer in model.modules() if "Weight" not in str(type(layer)))


@over_cases
def test_gradient_reaches_every_generator(case):
    model = case.masked(gate="hard", skip_first_blocks=0)
    with record_masks(model) as gates:
        loss = model(**case.inputs()).logits.square().sum()
    assert list(gates) == list_maskable_layers(model)
    assert gates.keys() == masked_layers(model).keys()
    assert {gate.shape[0] for gate in gates.values()} == {4}
    loss.backward()
    generators = {name: p for name, p in model.named_parameters() if ".mask_generator." in name}
    assert [name for name, p in generators.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


@over_cases
@torch.no_grad()
def test_a_sample_has_the_same_gates_alone_and_in_a_batch(case):
    model, inputs = case.masked(), case.inputs()
    with record_masks(model) as gates:
        logits = model(**inputs).logits
        batch = dict(gates)
        for i in range(4):
            alone = model(**{name: value[i : i + 1] for name, value in inputs.items()}).logits
            torch.testing.assert_close(alone, logits[i : i + 1], atol=1e-5, rtol=1e-4)
            for name, gate in gates.items():
                torch.testing.assert_close(gate, batch[name][i : i + 1], atol=1e-5, rtol=1e-4)


@padded
@torch.no_grad()
def test_padding_does_not_change_gates(case):
    model, inputs = case.masked(), case.inputs()
    with record_masks(model) as gates:
        logits = model(**inputs).logits
        batch = dict(gates)
        for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            short = model(**{name: value[i : i + 1, :length] for name, value in inputs.items()}).logits
            torch.testing.assert_close(short, logits[i : i + 1], atol=1e-5, rtol=1e-4)
            for name, gate in gates.items():
                torch.testing.assert_close(gate, batch[name][i : i + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Swin", "Swinv2"])
@torch.no_grad()
def test_windows_of_an_image_share_one_gate(name):
    case = CASE[name]
    model, seen = case.masked(), {}
    for layer_name, layer in masked_layers(model).items():
        layer.register_forward_hook(lambda _layer, args, output, n=layer_name: seen.update({n: (args[0], output)}))
    with record_masks(model) as gates:
        model(**case.inputs())
    windows = {layer_name for layer_name in gates if seen[layer_name][0].shape[0] > 4}
    assert windows == {n for n in gates if maskable(model)[n].windowed}
    for layer_name in windows:
        layer, (inputs, outputs) = model.get_submodule(layer_name), seen[layer_name]
        per_image = inputs.view(4, -1, inputs.shape[-1])
        torch.testing.assert_close(gates[layer_name], layer.mask_generator(per_image.mean(1)), atol=1e-6, rtol=1e-5)
        plain = nn.functional.linear(per_image, layer.weight, layer.bias)
        expected = plain * gates[layer_name][:, None]
        torch.testing.assert_close(outputs.view(expected.shape), expected, atol=1e-6, rtol=1e-5)


class Samples(torch.utils.data.Dataset):
    """Labelled samples that can be learnt."""

    def __init__(self, case):
        labels = torch.arange(10) % 5
        self.columns = case.inputs(10, labels=labels) | {"labels": labels}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


@over_cases
def test_train_collect_extract(case, tmp_path):
    arguments = ModularTrainingArguments(
        str(tmp_path),
        objective="contrastive",
        max_steps=2,
        per_device_train_batch_size=10,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    samples = Samples(case)
    config = ModularConfig(generator_init="paper", skip_first_blocks=0)
    trainer = ModularTrainer(model=case.model(), args=arguments, modular_config=config, train_dataset=samples)
    trainer.train()
    masks = trainer.collect_statistics(samples).module_masks(threshold=0.5)
    parent, inputs = trainer.model.eval(), case.inputs()
    module = extract_module(parent, masks, ["cat", "ant"])
    held = constant_gates(parent, masks, ["cat", "ant"], "mean")
    with torch.no_grad(), hold_gates(parent, held):
        torch.testing.assert_close(module(**inputs).logits, parent(**inputs).logits[:, [2, 0]], atol=1e-5, rtol=1e-5)
    assert list(held) == list_maskable_layers(parent)


SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
import nemo_hf
root, results, facts = Path(sys.argv[1]), {}, {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    auto_name, inputs = (folder / "auto").read_text(), load_file(folder / "inputs")
    module, info = getattr(transformers, auto_name).from_pretrained(folder / "module", output_loading_info=True)
    parent = nemo_hf.AutoModularModel.from_pretrained(folder / "parent")
    with torch.no_grad():
        results[f"{folder.name}/module"] = module(**inputs).logits
        results[f"{folder.name}/parent"] = parent(**inputs).logits
    facts[folder.name] = {
        "loading": [name for name, value in info.items() if value],
        "class": type(module).__name__,
        "labels": list(module.config.id2label.values()),
        "model_type": module.config.model_type,
        "nested": [c.model_type for c in (getattr(module.config, "vision_config", None),) if c],
    }
save_file(results, root / "results")
(root / "facts.json").write_text(json.dumps(facts))
"""


def test_reloaded_in_a_fresh_process_bit_for_bit(tmp_path):
    expected = {}
    for case in CASES:
        folder, inputs = tmp_path / str(case), case.inputs()
        parent = case.masked()
        masks, gates = random_masks(parent)
        module = extract_module(
            parent, ModuleMasks(dict.fromkeys(LABELS, masks), dict.fromkeys(LABELS, gates)), ["elk"]
        )
        save_module(module, folder / "module")
        parent.save_pretrained(folder / "parent")
        save_file(inputs, folder / "inputs")
        (folder / "auto").write_text(case.auto_name)
        with torch.no_grad():
            expected[f"{case}/module"], expected[f"{case}/parent"] = module(**inputs).logits, parent(**inputs).logits
    (tmp_path / "reload.py").write_text(SCRIPT)
    run = subprocess.run([sys.executable, tmp_path / "reload.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results, facts = load_file(tmp_path / "results"), json.loads((tmp_path / "facts.json").read_text())
    assert [name for name in expected if not torch.equal(results[name], expected[name])] == []
    for case in CASES:
        assert f"import {case.auto_name}, pipeline" in (tmp_path / str(case) / "module" / "README.md").read_text()
        nested = {"CLIP": ["clip_vision_model"], "Siglip": ["siglip_vision_model"]}.get(case.name, [])
        assert facts[str(case)] == {
            "loading": [],
            "class": f"Slim{case.model_class.__name__}",
            "labels": ["elk"],
            "model_type": f"nemo_{case.model().config.model_type}",
            "nested": nested,
        }


@pytest.mark.parametrize(
    ("name", "roles", "text"),
    [
        ("PvtV2", ("query", "key", "value"), "as wide together as the residual stream"),
        ("DebertaV2-shared", ("query_proj", "key_proj"), "relative positions share it"),
        ("WavLM", ("q_proj", "k_proj", "v_proj", "out_proj"), "uses its weights without calling it"),
        ("EfficientNet", ("expand_conv",), "shares the gates of"),
    ],
)
def test_layers_that_are_never_masked_have_a_reason(name, roles, text):
    model = CASE[name].model()
    reasons = list_maskable_layers(model, ModularConfig(skip_first_blocks=0), reasons=True)
    because = {layer: reason for layer, reason in reasons.items() if reason and text in reason}
    assert because
    assert because.keys() == {layer for layer in reasons if layer.rpartition(".")[2] in roles}
    masks = {label: {next(iter(because)): torch.ones(8, dtype=torch.bool)} for label in LABELS}
    with pytest.raises(NemoValueError, match="cannot be cut"):
        extract_module(model, ModuleMasks(masks), ["cat"])
    if name == "WavLM":
        with pytest.raises(NemoValueError, match="uses its weights without calling it"):
            apply_masks(model, ModularConfig(target_modules="attention"))


def test_cosine_attention_keeps_units_that_only_q_or_only_k_has():
    model, inputs = CASE["Swinv2"].model(), CASE["Swinv2"].inputs()
    block = "swinv2.encoder.layers.1.blocks.1.attention"
    masks = {f"{block}.self.{role}": torch.ones(32, dtype=torch.bool) for role in ("query", "key")}
    masks[f"{block}.self.query"].view(4, 8)[:, :4] = False
    masks[f"{block}.self.key"].view(4, 8)[:, 2:6] = False
    masks[f"{block}.self.value"] = torch.arange(32) >= 16  # two of four heads
    module, _ = check_exact(model, inputs, masks, None)
    owner, parent = module.get_submodule(f"{block}.self"), model.get_submodule(f"{block}.self")
    assert (owner.num_attention_heads, owner.attention_head_size, owner.all_head_size) == (2, 8, 16)
    assert torch.equal(owner.logit_scale, parent.logit_scale[2:])
    bias = owner.continuous_position_bias_mlp[2]
    assert bias.out_features == 2
    assert torch.equal(bias.weight, parent.continuous_position_bias_mlp[2].weight[2:])
    neither = {name: mask.clone() for name, mask in masks.items()}
    neither[f"{block}.self.key"].view(4, 8)[:, :2] = False
    module, _ = check_exact(model, inputs, neither, None)
    assert module.get_submodule(f"{block}.self").attention_head_size == 8  # v has eight


def test_heads_take_their_bias_columns_along_in_swin():
    model, inputs = CASE["Swin"].model(), CASE["Swin"].inputs()
    block = "swin.encoder.layers.0.blocks.1.attention"
    module, _ = check_exact(model, inputs, {f"{block}.v_proj": torch.arange(16) < 8}, None)
    table = "relative_position_bias.relative_position_bias_table"
    assert torch.equal(module.get_parameter(f"{block}.{table}"), model.get_parameter(f"{block}.{table}")[:, :1])


@pytest.mark.parametrize("name", ["DebertaV2-shared", "DebertaV2-own"])
def test_values_of_deberta_have_a_size_of_their_own(name):
    model, inputs = CASE[name].model(), CASE[name].inputs()
    block = "deberta.encoder.layer.1.attention"
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[0, 1, 9, 30]] = True
    module, _ = check_exact(model, inputs, {f"{block}.self.value_proj": mask}, None)
    owner = module.get_submodule(f"{block}.self")
    assert layer_sizes(owner.query_proj) == (32, 24)  # three heads of eight units
    assert layer_sizes(owner.value_proj) == (32, 6)  # three heads of two units
    assert layer_sizes(module.get_submodule(f"{block}.output.dense")) == (6, 32)
    if name.endswith("own"):
        assert layer_sizes(owner.pos_key_proj) == layer_sizes(owner.pos_query_proj) == (32, 24)


def test_a_zeroed_unit_before_a_biased_depthwise_convolution_moves_into_the_bias():
    model, inputs = CASE["PvtV2"].model(), CASE["PvtV2"].inputs()
    block = "pvt_v2.encoder.layers.1.blocks.1.mlp"
    for kept in (0, 5):
        module, _ = check_exact(model, inputs, {f"{block}.dense1": torch.arange(64) < kept}, None)
        mlp = module.get_submodule(block)
        assert mlp.dwconv.dwconv.groups == mlp.dense1.out_features == mlp.dense2.in_features == max(1, kept)
        assert not torch.equal(mlp.dense2.bias, model.get_submodule(block).dense2.bias)


def test_expansion_depthwise_and_squeeze_excite_shrink_together():
    model, inputs = CASE["EfficientNet"].model(), CASE["EfficientNet"].inputs()
    block = "efficientnet.encoder.blocks.2"
    layers = ("expansion.expand_conv", "depthwise_conv.depthwise_conv", "squeeze_excite.expand")
    width = layer_sizes(model.get_submodule(f"{block}.{layers[0]}"))[1]
    depthwise = f"{block}.depthwise_conv.depthwise_conv"
    module, _ = check_exact(model, inputs, {depthwise: torch.arange(width) % 4 == 0}, None)
    assert {layer_sizes(module.get_submodule(f"{block}.{name}"))[1] for name in layers} == {width // 4}
    assert layer_sizes(module.get_submodule(f"{block}.squeeze_excite.reduce"))[0] == width // 4
    sigmoid = CASE["EfficientNet"].model(hidden_act="sigmoid")
    assert "whose output for zero is not zero" in list_maskable_layers(sigmoid, reasons=True)[depthwise]


def test_albert_is_refused_with_its_reason():
    model = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**_TEXT, embedding_size=16))
    with pytest.raises(UnsupportedModelError, match="'albert' cannot be supported: all its blocks are one layer"):
        apply_masks(model)


@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "WavLM"])
def test_layerdrop_is_refused(name):
    model = CASE[name].model(layerdrop=0.1)
    with pytest.raises(UnsupportedModelError, match=r"config.layerdrop=0.1.*Set it to 0"):
        apply_masks(model)
    assert not any(isinstance(layer, MaskedLayer) for layer in model.modules())


def test_entries_with_wrong_words_are_refused():
    entry, model = ARCHITECTURES["swinv2"], CASE["Swinv2"].model()
    wrong = replace(entry, attention=replace(entry.attention, reasons={"keys": "no"}))
    with pytest.raises(NemoValueError, match="must name query, key, value, output, got 'keys'"):
        register_architecture(wrong, exist_ok=True)
    wrong = replace(entry, attention=replace(entry.attention, head_rows=("attention.self.dropout",)))
    try:
        register_architecture(wrong, exist_ok=True)
        with pytest.raises(UnsupportedModelError, match="field 'attention.head_rows' names .*dropout"):
            apply_masks(model)
    finally:
        register_architecture(entry, exist_ok=True)
