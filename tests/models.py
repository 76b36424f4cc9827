# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The table of models over which the promises are tested, their inputs, and masks made by hand."""

import contextlib
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models  # of docs/
import torch
import transformers
from torch.utils.data import Dataset

from nemo_hf import (
    ModularConfig,
    ModularTrainingArguments,
    ModuleMasks,
    apply_masks,
    extract_module,
    list_maskable_layers,
)


LABELS = ["ant", "bee", "cat", "dog", "elk"]
# What the samples of a padded batch really hold: tokens, or amplitudes of a sound.
LENGTHS = {"text": (9, 5, 7, 1), "sound": (200, 120, 90, 60)}


@dataclass(frozen=True, eq=False)
class Case:
    """One model class with a tiny configuration; `variant` tells apart several of one class."""

    model_class: type
    config_class: type
    options: dict[str, Any]
    variant: str = ""

    def __str__(self):
        return f"{self.model_class.__name__}{'-' if self.variant else ''}{self.variant}"

    @property
    def sees(self):
        """`"image"`, `"text"`, `"sound"` or `"spectrogram"`."""
        if self.model_class.main_input_name == "input_values":
            return "spectrogram" if "ForAudio" in self.model_class.__name__ else "sound"
        return "image" if "ForImage" in self.model_class.__name__ else "text"

    @property
    def is_image(self):
        return self.sees == "image"

    @property
    def has_two_heads(self):
        return str(self).endswith("WithTeacher")

    @property
    def auto_class(self):
        task = {"image": "Image", "text": "Sequence", "sound": "Audio", "spectrogram": "Audio"}[self.sees]
        return getattr(transformers, f"AutoModelFor{task}Classification")

    @property
    def image_size(self):
        return self.options.get("vision_config", self.options).get("image_size", 16)

    def model(self, seed=0, **overrides):
        """A random model in evaluation mode. Noise on all parameters, so that no bias or norm is trivial."""
        torch.manual_seed(seed)
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        model = self.model_class(self.config_class(**{**self.options, **names, **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(std=0.3)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
        return model.eval()

    def masked(self, seed=0, paper=True, **options):
        """A masked model; with the paper's initialisation gates are mixed, many of them zero."""
        init = "paper" if paper else "open"
        return apply_masks(
            self.model(seed), ModularConfig(**{"generator_init": init, "skip_first_blocks": 1, **options})
        )

    def inputs(self, seed=0):
        """A batch of four samples; texts and sounds are padded."""
        generator = torch.Generator().manual_seed(seed)
        if self.sees == "image":
            return {"pixel_values": torch.randn(4, 3, self.image_size, self.image_size, generator=generator)}
        if self.sees == "spectrogram":
            return {"input_values": torch.randn(4, 12, 8, generator=generator)}
        lengths = LENGTHS[self.sees]
        mask = (torch.arange(lengths[0])[None] < torch.tensor(lengths)[:, None]).long()
        if self.sees == "sound":
            return {"input_values": torch.randn(4, lengths[0], generator=generator) * mask, "attention_mask": mask}
        pad = self.config_class(**self.options).pad_token_id
        tokens = torch.randint(3, 50, (4, lengths[0]), generator=generator)
        return {"input_ids": torch.where(mask == 1, tokens, pad), "attention_mask": mask}


# The configurations of `docs/families.md`: what the page calls tested is what is tested.
CASES = [
    Case(getattr(transformers, tiny.name), getattr(transformers, tiny.name).config_class, tiny.options, tiny.variant)
    for group in tiny_models.GROUPS.values()
    for tiny in group
]


def case_of(name):
    """The case of a name as the tests show it."""
    return next(case for case in CASES if str(case) == name)


VIT, DEIT = (case_of(f"{name}ForImageClassification") for name in ("ViT", "DeiT"))
DEIT_TEACHER = case_of("DeiTForImageClassificationWithTeacher")
BERT = case_of("BertForSequenceClassification")
RESNET = case_of("ResNetForImageClassification-bottleneck")
DECODERS = [case_of(f"{name}ForSequenceClassification") for name in ("Llama", "Gemma", "Qwen2", "Qwen3", "GPT2")]
LLAMA = case_of("LlamaForSequenceClassification")
over_models = pytest.mark.parametrize("case", CASES, ids=str)
over_padded_models = pytest.mark.parametrize("case", [case for case in CASES if case.sees in LENGTHS], ids=str)
over_two_models = pytest.mark.parametrize("case", [VIT, BERT], ids=str)


def logits_of(outputs):
    """All logits of a model side by side: two heads have three kinds."""
    names = [name for name in ("logits", "cls_logits", "distillation_logits") if name in outputs]
    return torch.stack([outputs[name] for name in names])


def close(actual, expected, tolerance=1e-5):
    """The promise of DESIGN.md: differences up to 1e-5 · max(1, |logits|)."""
    limit = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=limit, rtol=0)


@contextlib.contextmanager
def gated_by_hooks(model, gates):
    """Multiply the outputs of plain layers by constants, without any code of nemo_hf."""
    hooks = []
    for name, gate in gates.items():
        layer = model.get_submodule(name)
        if isinstance(layer, torch.nn.Conv2d):  # the gate multiplies the output of the norm behind it
            behind = itertools.dropwhile(lambda other, layer=layer: other is not layer, model.modules())
            layer = next(other for other in behind if isinstance(other, torch.nn.BatchNorm2d))
            gate = gate[:, None, None]
        hooks.append(layer.register_forward_hook(lambda _layer, _inputs, output, gate=gate: output * gate))
    yield
    for hook in hooks:
        hook.remove()


def naive_gates(masks, gates, labels):
    """The constant gates of a module, spelled out: union of the masks, times the mean gate if there are any."""
    held = {}
    for layer in masks[labels[0]]:
        union = torch.stack([masks[label][layer] for label in labels]).any(0).float()
        held[layer] = union if gates is None else union * sum(gates[label][layer] for label in labels) / len(labels)
    return held


def num_neurons(model, name):
    """Neurons of a layer; linear layers, those of GPT-2 and convolutions call them differently."""
    layer = model.get_submodule(name)
    return next(getattr(layer, size) for size in ("out_features", "out_channels", "nf") if hasattr(layer, size))


def random_masks(model, keep=(0.3, 0.5, 0.2, 0.6, 0.1), seed=1, skip_first_blocks=1):
    """Random masks and gates as plain dictionaries: label → layer → tensor; `keep` is the share kept per label."""
    generator = torch.Generator().manual_seed(seed)
    names = list_maskable_layers(model, ModularConfig(skip_first_blocks=skip_first_blocks))
    sizes = {name: num_neurons(model, name) for name in names}
    masks = {
        label: {name: torch.rand(size, generator=generator) < share for name, size in sizes.items()}
        for label, share in zip(LABELS, keep, strict=True)
    }
    gates = {
        label: {name: 0.1 + 0.9 * torch.rand(size, generator=generator) for name, size in sizes.items()}
        for label in LABELS
    }
    return masks, gates


def module_masks(model, with_gates=True, **options):
    """The same as [`ModuleMasks`]."""
    masks, gates = random_masks(model, **options)
    return ModuleMasks(masks, gates if with_gates else None)


@functools.cache
def plain_parent(case):
    """One unmasked model of a case for all tests that leave it as it is."""
    return case.model()


@functools.cache
def modular_parent(case):
    """The same with masks. Extraction changes no parent: test_extraction.py makes sure of that."""
    model = case.masked()
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".mask_generator." not in name}
    assert_same_state(weights, plain_parent(case).state_dict())
    return model


@torch.no_grad()
def check_exact(case, parent, masks, gates, labels, kind, tolerance=1e-5):
    """Compare a module with the plain model of its case, whose layers hooks multiply by gates computed here."""
    names, inputs = [LABELS[label] if isinstance(label, int) else label for label in labels], case.inputs()
    module = extract_module(parent, ModuleMasks(masks, gates), labels, gates=kind)
    held = naive_gates(masks, gates if kind == "mean" else None, names)
    reference = plain_parent(case)
    with gated_by_hooks(reference, held):
        expected = logits_of(reference(**inputs))[..., [LABELS.index(name) for name in names]]
    close(logits_of(module(**inputs)), expected, tolerance)
    return module


class Samples(Dataset):
    """Labelled samples that can be learnt: the class shows in the brightness or offset, or in the words."""

    def __init__(self, case, size=24, seed=0, labelled=True):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(size) % len(LABELS)
        if case.sees != "text":
            name, like = next(iter(case.inputs().items()))
            noise = 0.3 * torch.randn(size, *like.shape[1:], generator=generator)
            features = {name: noise + labels.view(-1, *[1] * (like.dim() - 1)).float() - 2}
        else:
            tokens = 3 + labels[:, None] * 5 + torch.randint(0, 5, (size, 8), generator=generator)
            features = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self.columns = features | ({"labels": labels} if labelled else {})

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def batch(self, *indices):
        index = torch.tensor(indices)
        return {name: column[index] for name, column in self.columns.items()}


def arguments(output_dir, **options):
    """Arguments of a short quiet training on the CPU."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return ModularTrainingArguments(str(output_dir), **{**defaults, **options})


def state_copy(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(actual, expected):
    """Bit for bit, in the same order."""
    assert list(actual) == list(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert different == []
