# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks that are learnt for a trained model: the gates of a module in training, the size, and nothing left behind."""

import logging

import pytest
import torch
from models import (
    LABELS,
    RESNET,
    VIT,
    Samples,
    assert_same_state,
    close,
    over_models,
    over_two_models,
    plain_parent,
    state_copy,
)
from torch.utils.data import DataLoader, IterableDataset

from nemo_hf import (
    ModuleMasks,
    NemoRuntimeError,
    NemoValueError,
    UnsupportedModelError,
    extract_module,
    learn_masks,
    list_maskable_layers,
    remove_masks,
)
from nemo_hf.mask_learning import _batches, _LabelGates, _multiplied, _task_loss
from nemo_hf.maskable import maskable_layers
from nemo_hf.slim import layer_sizes


def loader(case, size=20):
    samples = Samples(case, size)
    return [samples.batch(*range(start, min(start + 8, size))) for start in range(0, size, 8)]


def learnt(case, model=None, **options):
    return learn_masks(model or case.model(), loader(case), disable_tqdm=True, **{"num_epochs": 1, **options})


def same(masks, others):
    return all(torch.equal(masks[label][name], others[label][name]) for label in masks.labels for name in masks.layers)


@over_models
@torch.no_grad()
def test_a_module_computes_what_its_labels_are_trained_with(case):
    """The gates of two selections in one batch, against the modules that are cut for them."""
    model, inputs = plain_parent(case), case.inputs()
    chosen = list_maskable_layers(model)
    layers = [layer for layer in maskable_layers(model) if layer.name in chosen]
    sizes = {layer.name: layer_sizes(model.get_submodule(layer.name))[1] for layer in layers}
    label_gates = _LabelGates(len(LABELS), sizes, model.device, seed=0)
    label_gates.logits.copy_(torch.where(torch.rand_like(label_gates.logits) < 0.4, 5.0, -5.0))  # whatever the noise
    for logits in label_gates.by_layer(label_gates.logits).values():
        logits[:, 0] = 5.0  # no layer is empty
    selections = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 0, 0]]).bool()
    with _multiplied(model, layers) as gates:
        gates.update(label_gates.of_modules(selections))
        outputs = model(**inputs).logits
    by_label = dict(zip(LABELS, label_gates.masks(), strict=True))
    for sample, labels in ((0, [1, 4]), (1, [0, 1, 2])):
        module = extract_module(model, ModuleMasks(by_label), labels)
        close(module(**inputs).logits[sample], outputs[sample, labels])


@over_two_models
def test_the_model_is_left_as_it_was(case):
    model = case.model().train()
    first, last = list(model.parameters())[0], list(model.parameters())[-1]
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    frozen_layer = model.get_submodule(list_maskable_layers(model)[0]).eval()
    state = state_copy(model)
    generator = torch.get_rng_state()

    def untouched():
        assert_same_state(model.state_dict(), state)
        assert [layer for layer in model.modules() if layer._forward_hooks or layer._forward_pre_hooks] == []
        assert [layer for layer in model.modules() if not layer.training] == [frozen_layer]
        assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [first]
        assert [p for p in model.parameters() if p.grad is not None] == [last]
        assert torch.equal(last.grad, torch.ones_like(last))
        assert torch.equal(torch.get_rng_state(), generator)

    with torch.no_grad():  # somebody may be evaluating
        learnt(case, model)
    untouched()
    with pytest.raises(NemoValueError, match="no 'labels'"):
        learn_masks(model, [*loader(case)[:1], case.inputs()], disable_tqdm=True)
    untouched()


def test_the_same_seed_gives_the_same_masks():
    options = {"num_epochs": 3, "target_retention": 0.5, "learning_rate": 0.5}
    masks = learnt(VIT, **options)
    assert same(masks, learnt(VIT, **options))
    assert not same(masks, learnt(VIT, seed=1, **options))
    assert masks.labels == LABELS
    assert (masks.has_gates, masks.threshold, masks.origin) == (False, None, "learnt")


def trained(case):
    """A model that tells apart what `Samples` shows."""
    model = case.model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        for batch in loader(case, 40):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def pair_accuracy(case, model, masks):
    """Mean accuracy of the modules of neighbouring labels, on new samples."""
    data, hits = Samples(case, 100, seed=1), []
    for pair in ([0, 1], [1, 2], [2, 3], [3, 4]):
        batch = data.batch(*[i for i in range(100) if i % 5 in pair])
        labels = batch.pop("labels")
        predicted = extract_module(model, masks, pair)(**batch).logits.argmax(-1) + pair[0]
        hits.append((predicted == labels).float().mean())
    return torch.stack(hits).mean().item()


@pytest.mark.parametrize("case", [VIT, RESNET], ids=str)
def test_masks_reach_the_target_and_beat_random_ones(case):
    model = trained(case)
    masks = learn_masks(model, loader(case, 40), target_retention=0.15, num_epochs=20, disable_tqdm=True)
    generator = torch.Generator().manual_seed(0)
    shuffled = ModuleMasks(
        {
            label: {name: mask[torch.randperm(len(mask), generator=generator)] for name, mask in masks[label].items()}
            for label in LABELS
        }
    )
    assert all(masks.retention([label]) < 0.2 for label in LABELS)
    assert masks.retention() > 0.05  # no more is given up than was asked for
    learnt_accuracy, random_accuracy = (pair_accuracy(case, model, each) for each in (masks, shuffled))
    assert learnt_accuracy > random_accuracy + 0.05


def test_a_target_that_was_missed_is_announced(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    assert learnt(VIT, compactness=0.0, num_epochs=2).retention() > 0.9
    assert "keep 100% of their neurons on average, but target_retention is 20%" in caplog.text
    caplog.clear()
    learnt(VIT, learning_rate=0.5, num_epochs=10)
    assert caplog.text == ""
    logging.getLogger("transformers").removeHandler(caplog.handler)


def test_gradients_of_a_union_go_to_the_labels_that_open_a_neuron():
    label_gates = _LabelGates(3, {"layer": 4}, torch.device("cpu"), seed=0)
    with torch.no_grad():
        label_gates.logits.copy_(torch.tensor([[4.0, 4, -4, -4], [4, -4, -4, 4], [-4, -4, 4, 4]]))
    union = label_gates.of_modules(torch.tensor([[True, True, False]]))["layer"]
    assert union.tolist() == [[1, 1, 0, 1]]
    union.sum().backward()
    slopes = label_gates.logits.grad / (1 - label_gates.logits.detach().tanh().square())
    assert (slopes[2] == 0).all()  # not of this module
    assert ((slopes[:2] > 0) == torch.ones(2, 4).bool()).all()  # closed ones may open again
    assert slopes[0, 0] < slopes[0, 1] * 2  # noise shifts slopes a little


def test_selections_hold_the_own_label_and_all_sizes():
    label_gates = _LabelGates(5, {"layer": 4}, torch.device("cpu"), seed=0)
    labels = torch.arange(1000) % 5
    selections = label_gates.draw_selections(labels)
    assert selections[torch.arange(1000), labels].all()
    sizes = selections.sum(1).bincount(minlength=6)
    assert sizes[:2].sum() == 0
    assert (sizes[2:] > 200).all()
    others = selections[labels == 0].float().mean(0)[1:]
    assert (others - others.mean()).abs().max() < 0.15


@torch.no_grad()
def test_the_task_is_to_tell_apart_the_selected_labels():
    model, batch = plain_parent(VIT), loader(VIT)[0]
    chosen = list_maskable_layers(model)
    layers = [layer for layer in maskable_layers(model) if layer.name in chosen]
    sizes = {layer.name: layer_sizes(model.get_submodule(layer.name))[1] for layer in layers}
    everything_open, same_draws = (_LabelGates(5, sizes, model.device, seed=0) for _ in range(2))
    everything_open.logits.fill_(10.0)
    with _multiplied(model, layers) as gates:
        loss = _task_loss(model, batch, batch["labels"], everything_open, gates)
    logits, selections = model(batch["pixel_values"]).logits, same_draws.draw_selections(batch["labels"])
    expected = [
        row[selection].logsumexp(0) - row[label]
        for row, selection, label in zip(logits, selections, batch["labels"], strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_an_empty_layer_keeps_its_neuron_with_the_largest_logit():
    label_gates = _LabelGates(2, {"first": 2, "second": 3}, torch.device("cpu"), seed=0)
    with torch.no_grad():
        label_gates.logits.copy_(torch.tensor([[1.0, -1, -3, -1, -2], [-1, 1, 1, 2, -1]]))
    kept = [{name: mask.tolist() for name, mask in layers.items()} for layers in label_gates.masks()]
    assert kept[0] == {"first": [True, False], "second": [False, True, False]}
    assert kept[1] == {"first": [False, True], "second": [True, True, False]}


def test_layers_are_selected_as_in_a_modular_config():
    masks = learnt(VIT, target_modules=["mlp.fc1"], skip_first_blocks=2)
    assert masks.layers == ["vit.layers.2.mlp.fc1"]
    assert learnt(VIT).layers == list_maskable_layers(VIT.model())


def test_labels_without_samples_have_no_mask():
    batch = Samples(VIT).batch(0, 1, 2, 5)
    masks = learn_masks(VIT.model(), [batch], num_epochs=1, disable_tqdm=True)
    assert masks.labels == LABELS[:3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype):
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in loader(VIT)[0].items()}
    assert learn_masks(VIT.model().to(dtype), [batch], num_epochs=1, disable_tqdm=True).labels == LABELS


@over_two_models
def test_labels_that_are_no_classes_are_refused(case):
    model, batch = case.model(), loader(case)[0]

    def learn(labels):
        learn_masks(model, [{**batch, "labels": labels}], disable_tqdm=True)

    with pytest.raises(NemoValueError, match=r"one label per sample, of shape \(batch_size,\).*of shape \(8, 5\)"):
        learn(torch.ones(8, 5))
    with pytest.raises(NemoValueError, match=r"from 0 to 4 .*at least two; got values from 0 to 5"):
        learn(torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]))
    with pytest.raises(NemoValueError, match="the batch has label -100, which stands for none"):
        learn(torch.tensor([0, 1, 2, 3, -100, 3, 0, 1]))
    with pytest.raises(NemoValueError, match="Regression targets have no classes"):
        learn(torch.rand(8))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_retention": 0}, r"target_retention is a share of neurons in \(0, 1\], got 0"),
        ({"target_retention": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"compactness": -1.0}, "compactness must not be negative, got -1.0"),
        ({"compactness": float("nan")}, "compactness must not be negative, got nan"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"num_epochs": 0}, "num_epochs must be an integer from 1 up, got 0"),
        ({"num_epochs": 1.5}, "num_epochs must be an integer from 1 up, got 1.5"),
        ({"skip_first_blocks": 9}, "excludes every layer"),
        ({"target_modules": ["fc9"]}, "matches no maskable layer"),
    ],
)
def test_values_outside_their_range_are_refused(options, text):
    with pytest.raises(NemoValueError, match=text):
        learnt(VIT, **options)


class Stream(IterableDataset):
    """Samples one by one: nobody knows how many."""

    def __iter__(self):
        return iter(Samples(VIT, 20))


@pytest.mark.parametrize("num_epochs", [1, 2, 4, 10])
@pytest.mark.parametrize("batches", [loader(VIT), DataLoader(Stream(), 8)], ids=["list", "stream"])
def test_the_weight_of_the_size_grows_by_batches_over_the_first_quarter(batches, num_epochs):
    shares = [share for share, _ in _batches(batches, num_epochs, disable_tqdm=True)]
    assert shares == pytest.approx([number / (3 * num_epochs) for number in range(1, 3 * num_epochs + 1)])


def test_data_that_ends_is_refused():
    with pytest.raises(NemoValueError, match="no batches in epoch 1. It is read once per epoch"):
        learn_masks(VIT.model(), [], disable_tqdm=True)
    with pytest.raises(NemoValueError, match="no batches in epoch 1.*pass a `DataLoader` or a list"):
        learn_masks(VIT.model(), iter(loader(VIT)), disable_tqdm=True)


def test_labels_of_one_name_are_refused():
    names = ["ant", "ant", "cat", "dog", "elk"]
    model = VIT.model(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    with pytest.raises(NemoValueError, match="Two labels have the same name: .'ant', 'ant', .*Give `config.id2label`"):
        learnt(VIT, model)


def test_models_that_cannot_have_learnt_masks_are_refused():
    with pytest.raises(NemoValueError, match="has mask generators.*collect_statistics.*remove_masks"):
        learnt(VIT, VIT.masked())
    assert learnt(VIT, remove_masks(VIT.masked())).labels == LABELS
    with pytest.raises(UnsupportedModelError, match="Expected a transformers `PreTrainedModel`, got Linear"):
        learnt(VIT, torch.nn.Linear(2, 2))
    module = extract_module(VIT.model(), learnt(VIT), labels=["ant", "bee"])
    with pytest.raises(UnsupportedModelError, match="is a module already"):
        learnt(VIT, module)


def test_layers_that_are_called_otherwise_are_refused():
    model = VIT.model()
    layer = model.vit.layers[1]
    forward, layer.forward = layer.forward, lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(NemoRuntimeError, match="never called 6 layers.*target_modules"):
        learnt(VIT, model)
    layer.forward = lambda hidden_states, *args, **kwargs: forward(forward(hidden_states, *args, **kwargs), *args)
    with pytest.raises(NemoRuntimeError, match="calls vit.layers.1.* twice"):
        learnt(VIT, model)
