# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Modules of groups of samples keep the whole head."""

import pytest
import torch
from models import BERT, LABELS, VIT, close, gated_by_hooks, naive_gates, over_two_models, random_masks

from nemo_hf import ModuleMasks, NemoValueError, extract_module, save_module


def masks_by_domain(parent):
    """Masks and gates of two domains, named and numbered."""
    masks, gates = random_masks(parent)
    renamed = {"ant": "news", "bee": 7}
    return [{renamed[label]: layers[label] for label in renamed} for layers in (masks, gates)]


@over_two_models
@pytest.mark.parametrize("groups", [["news"], [7, "news"]], ids=str)
@torch.no_grad()
def test_a_module_of_groups_is_exact_and_keeps_all_labels(case, groups, tmp_path):
    parent = case.model()
    masks, gates = masks_by_domain(parent)
    module = extract_module(parent, ModuleMasks(masks, gates, grouped_by="domain"), groups=groups)
    with gated_by_hooks(parent, naive_gates(masks, gates, groups)):
        expected = parent(**case.inputs()).logits
    close(module(**case.inputs()).logits, expected)
    assert list(module.config.id2label.values()) == LABELS
    assert module.config.nemo["groups"] == groups
    assert module.config.nemo["grouped_by"] == "domain"
    save_module(module, tmp_path)
    reloaded = case.auto_class.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**case.inputs()).logits, module(**case.inputs()).logits)
    card = (tmp_path / "README.md").read_text()
    assert "# Module for " + ", ".join(map(str, groups)) in card
    assert "groups of `domain`" in card


def test_masks_made_by_hand_need_no_column():
    parent = VIT.model()
    masks, _ = masks_by_domain(parent)
    assert extract_module(parent, ModuleMasks(masks), groups=["news"]).config.num_labels == len(LABELS)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({}, "Give either labels or groups"),
        ({"labels": ["ant"], "groups": ["news"]}, "Give either labels or groups"),
        (
            {"labels": ["ant"]},
            r"by groups of 'domain', not by label. Choose with groups=, such as groups=\['news', 7\]",
        ),
        ({"groups": ["fiction"]}, "no mask for the group of 'domain' 'fiction'"),
        ({"groups": []}, "groups must be a non-empty list"),
        ({"groups": "news"}, "groups must be a non-empty list"),
        ({"groups": [7, 7]}, "A group is given twice"),
    ],
    ids=str,
)
def test_wrong_choices_are_refused(chosen, text):
    parent = BERT.model()
    masks, _ = masks_by_domain(parent)
    with pytest.raises(NemoValueError, match=text):
        extract_module(parent, ModuleMasks(masks, grouped_by="domain"), **chosen)
