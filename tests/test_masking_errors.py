# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 8 for masks: bad input gets a clear error."""

import dataclasses

import pytest
import torch
import transformers
from models import BERT, VIT, over_models
from torch import nn

from nemo_hf import (
    Architecture,
    ModularConfig,
    NemoRuntimeError,
    NemoValueError,
    UnsupportedModelError,
    apply_masks,
    hold_gates,
    list_maskable_layers,
    record_masks,
    register_architecture,
    remove_masks,
)
from nemo_hf.architectures import ARCHITECTURES


def test_targets_that_match_nothing_and_targets_that_are_all_skipped_differ():
    model = VIT.model()
    with pytest.raises(
        NemoValueError, match=r"\['classifier'\] matches no maskable layer.*layers.2.attention.q_proj.*other blocks"
    ):
        apply_masks(model, ModularConfig(target_modules=["classifier"]))
    with pytest.raises(NemoValueError, match="skip_first_blocks=3 excludes every layer.*the model has 3 blocks"):
        apply_masks(model, ModularConfig(skip_first_blocks=3))
    with pytest.raises(NemoValueError, match="matches no maskable layer"):
        list_maskable_layers(model, ModularConfig(target_modules="fc1"))  # a regex matches the whole name
    assert not hasattr(model.config, "nemo")


@over_models
def test_masks_go_on_once_and_come_off_once(case):
    model = apply_masks(case.model())
    with pytest.raises(NemoValueError, match="has masks already; call .remove_masks"):
        apply_masks(model)
    remove_masks(model)
    with pytest.raises(NemoValueError, match="has no masks. Put them on with .apply_masks"):
        remove_masks(model)
    with pytest.raises(NemoValueError, match="has no masks"), record_masks(model):
        model(**case.inputs())


def test_unknown_family_names_supported_nearest_and_remedy():
    config = transformers.YosoConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    config.model_type = "de-it"  # no family has this name, and one a similar one
    model = transformers.YosoForSequenceClassification(config)
    text = "'de-it' are not supported. Supported: .*beit, bert, .*, vit.*. Nearest: .*register_architecture"
    with pytest.raises(UnsupportedModelError, match=text) as caught:
        apply_masks(model)
    assert "deit" in str(caught.value).partition("Nearest:")[2]
    assert isinstance(caught.value, TypeError)


def test_models_without_a_head_and_other_objects_are_refused():
    with pytest.raises(UnsupportedModelError, match="ViTModel has no classification head.*ViTForImageClassification"):
        apply_masks(VIT.model().vit)
    with pytest.raises(UnsupportedModelError, match="Expected a transformers .PreTrainedModel., got Linear"):
        apply_masks(nn.Linear(2, 2))


def test_a_model_wrapped_in_adapters_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(VIT.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"This PeftModel has adapters.*merge_and_unload"):
        apply_masks(model)
    with pytest.raises(
        UnsupportedModelError, match="field 'attention.query' names 'vit.layers.0.attention.q_proj'.*mask the model"
    ):
        apply_masks(model.get_base_model())


def test_split_sequences_are_refused():
    model = VIT.model()
    model.config.chunk_size_feed_forward = 4
    with pytest.raises(UnsupportedModelError, match="chunk_size_feed_forward.*Set it to 0"):
        apply_masks(model)


def test_an_attention_mask_of_another_shape_is_refused():
    model, inputs = BERT.masked(), BERT.inputs()
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :]
    with pytest.raises(
        NemoValueError, match=r"attention_mask of shape \(batch_size, sequence_length\).*\(4, 1, 1, 9\)"
    ):
        model(**inputs)


def test_record_masks_does_not_nest_and_recovers():
    model = VIT.masked()
    with record_masks(model):
        with pytest.raises(NemoRuntimeError, match="does not nest"), record_masks(model):
            pass
        model(**VIT.inputs())
    with pytest.raises(KeyError, match="mine"), record_masks(model):
        raise KeyError("mine")
    with record_masks(model) as gates:
        model(**VIT.inputs())
    assert len(gates) == 12


def test_a_masked_layer_that_is_never_called_is_named(monkeypatch):
    model = VIT.masked()
    monkeypatch.setattr(model.vit.layers[2].mlp, "forward", lambda hidden_states: hidden_states)
    text = r"never called 2 masked layers.*vit.layers.2.mlp.fc1, vit.layers.2.mlp.fc2.*target_modules"
    with pytest.raises(NemoRuntimeError, match=text), record_masks(model):
        model(**VIT.inputs())


def test_hold_gates_wants_every_layer_in_its_size():
    model = VIT.masked()
    gates = {name: torch.ones(model.get_submodule(name).out_features) for name in list_maskable_layers(model)}
    name = "vit.layers.1.mlp.fc1"
    with (
        pytest.raises(NemoValueError, match=rf"shape \(64,\) for {name}"),
        hold_gates(model, gates | {name: torch.ones(3)}),
    ):
        pass
    del gates[name]
    with pytest.raises(NemoValueError, match=rf"shape \(64,\) for {name}"), hold_gates(model, gates):
        pass


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": "("}, "not a valid regular expression"),
        ({"target_modules": []}, "a non-empty list of strings"),
        ({"target_modules": [1]}, "a non-empty list of strings"),
        ({"skip_first_blocks": -1}, "skip_first_blocks must be an integer from 0 up, got -1"),
        ({"skip_first_blocks": True}, "skip_first_blocks must be an integer"),
        ({"generator_hidden_size": 0}, "generator_hidden_size must be an integer from 1 up"),
        ({"generator_init": "closed"}, "generator_init must be one of open, paper, got 'closed'"),
        ({"detach_generator_inputs": 1}, "detach_generator_inputs must be True, False or None, got 1"),
        ({"target_modules": None}, "a non-empty list of strings"),
        ({"gate": "soft", "activation_threshold": 0.3}, "activation_threshold=0.3 has no effect on gate='soft'"),
        ({"gate": "stiff"}, "gate must be one of soft, hard, activation, got 'stiff'"),
    ],
    ids=str,
)
def test_config_values_are_checked(options, text):
    with pytest.raises(NemoValueError, match=text):
        ModularConfig(**options)


def test_config_of_something_else_is_refused():
    with pytest.raises(NemoValueError, match="Expected the .config.nemo. of a modular model"):
        ModularConfig.from_dict({"kind": "module"})


def test_register_architecture_checks_its_entry(monkeypatch):
    entry = ARCHITECTURES["vit"]
    monkeypatch.setitem(ARCHITECTURES, "vit", entry)  # comes back after the test
    fields = {"attention": entry.attention, "feed_forward": entry.feed_forward, "blocks": entry.blocks}
    with pytest.raises(NemoValueError, match="'vit' is registered already; pass exist_ok=True"):
        register_architecture(entry)
    with pytest.raises(NemoValueError, match="no configuration with model type 'nonesuch'.*AutoConfig.register"):
        register_architecture(Architecture(model_type="nonesuch", heads=entry.heads, **fields))
    with pytest.raises(NemoValueError, match="names no model class"):
        register_architecture(Architecture(model_type="bit", heads={}, **fields))
    both = dataclasses.replace(entry.attention, rotary=True, own_value_size=True)
    with pytest.raises(NemoValueError, match="'vit' has both `rotary` and `own_value_size`.*Leave out"):
        register_architecture(dataclasses.replace(entry, attention=both), exist_ok=True)
    wrong = Architecture(model_type="vit", heads=entry.heads, **{**fields, "blocks": "vit.blocks"})
    register_architecture(wrong, exist_ok=True)
    with pytest.raises(
        UnsupportedModelError, match="'vit' does not fit this model: field 'blocks' names 'vit.blocks'"
    ):
        apply_masks(VIT.model())


def test_an_entry_that_names_no_layer_is_refused():
    with pytest.raises(NemoValueError, match=r"target_modules has 'mlp.fc3', which is neither the name of a maskable"):
        list_maskable_layers(VIT.model(), ModularConfig(target_modules=["mlp.fc1", "mlp.fc3"]))
    first_block = ModularConfig(target_modules=["layers.0.mlp.fc1", "layers.1.mlp.fc1"])  # skipped, but a name
    assert len(list_maskable_layers(VIT.model(), first_block)) == 1
