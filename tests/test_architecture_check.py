# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""`check` of docs/add_an_architecture.md accepts right entries and finds wrong ones that no error names."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import LLAMA, case_of
from transformers import MptConfig, MptForSequenceClassification

from nemo_hf import Architecture, Attention, FeedForward, architectures, list_maskable_layers, register_architecture


PAGE = Path(__file__).parents[1] / "docs" / "add_an_architecture.md"
SWINV2, MPNET = case_of("Swinv2ForImageClassification"), case_of("MPNetForSequenceClassification")
GPT2 = case_of("GPT2ForSequenceClassification")


@pytest.fixture(scope="module")
def check():
    """The function as it is printed."""
    (block,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def check" in block
    ]
    names = {"list_maskable_layers": list_maskable_layers}
    exec(block.partition("\nernie = ")[0], names)
    return names["check"]


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))


def is_wrong(check, model, inputs):
    try:
        return not check(model, inputs) < 1e-5
    except RuntimeError:  # sizes that do not fit each other
        return True


@pytest.mark.parametrize("case", [LLAMA, SWINV2, MPNET, GPT2], ids=str)
def test_right_entries_pass(check, case):
    assert not is_wrong(check, case.model(), case.inputs())


WRONG = {
    "rotary": (LLAMA, False),
    "inline_scale": (MPNET, False),
    "shared_head_bias": (MPNET, None),
    "head_rows": (SWINV2, ()),
    "cosine": (SWINV2, False),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_the_attention_that_is_missing_is_found(check, field):
    case, without = WRONG[field]
    entry = architectures.ARCHITECTURES[case.config_class.model_type]
    register_architecture(
        replace(entry, attention=replace(entry.attention, **{field: without}), stock=None), exist_ok=True
    )
    assert is_wrong(check, case.model(), case.inputs())


def test_heads_that_differ_in_what_no_field_names_are_found(check):
    """Slopes that MPT makes from the numbers of the heads: right as long as no head goes."""
    entry = Architecture(
        model_type="mpt",
        heads={"MptForSequenceClassification": ("score",)},
        blocks="transformer.blocks.*",
        attention=Attention(
            layer="attn",
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            output="attn.out_proj",
            num_heads=("n_heads",),
            head_size=("head_dim",),
            all_head_size=("hidden_size",),
        ),
        feed_forward=FeedForward(up="ffn.up_proj", activation="ffn.act", down="ffn.down_proj"),
    )
    register_architecture(entry)
    config = MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=2, max_seq_len=16, num_labels=3, pad_token_id=0)
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert is_wrong(check, MptForSequenceClassification(config), inputs)
