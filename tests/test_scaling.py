# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Precision, accumulation, compilation, batch sizes that are found, placement of weights."""

import pytest
import torch
from models import BERT, RESNET, VIT, Samples, arguments, assert_same_state, state_copy
from torch import nn

from nemo_hf import AutoModularModel, ModularConfig, ModularTrainer, record_masks
from nemo_hf.objectives import ContrastiveLoss


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
over_kinds = pytest.mark.parametrize("case", [VIT, BERT, RESNET], ids=str)


def without_dropout(model):
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.train()


def trainer_of(case, folder, model, size=24, dtype=torch.float32, **options):
    data = Samples(case, size)
    data.columns = {n: v.to(dtype) if v.is_floating_point() else v for n, v in data.columns.items()}
    config = ModularConfig(generator_init="paper")
    return ModularTrainer(model.to(dtype), arguments(folder, **options), train_dataset=data, modular_config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@over_kinds
def test_losses_are_in_single_precision_under_autocast(case, dtype, tmp_path):
    trainer = trainer_of(case, tmp_path, case.masked(), alpha=0.7, gate_mixing_ratio=0.0)
    model, batch = without_dropout(trainer.model), Samples(case).batch(*range(8))
    expected = trainer.compute_loss(model, dict(batch))
    averages = trainer._averages["train"].drain()
    with torch.autocast("cpu", dtype=dtype):
        with record_masks(model) as gates:
            model(**batch)
        loss = trainer.compute_loss(model, dict(batch))
    assert {gate.dtype for gate in gates.values()} == {dtype}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-2, rtol=1e-2)
    for name, value in trainer._averages["train"].drain().items():
        assert value == pytest.approx(averages[name], abs=1e-2)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("case", [VIT, BERT], ids=str)
def test_the_task_term_of_equal_micro_batches_is_that_of_the_whole_batch(case, tmp_path):
    options = {
        "alpha": 0.0,
        "compactness": 0.0,
        "gate_mixing_ratio": 0.0,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
    }
    states = []
    for size, steps in ((8, 1), (2, 4)):
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = trainer_of(case, tmp_path, case.model(**NO_DROPOUT), dtype=torch.float64, **options)
        trainer.train()
        assert trainer.state.global_step == 3
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-12, rtol=1e-12)


@over_kinds
def test_a_masked_forward_pass_compiles_into_one_graph(case):
    model, inputs = without_dropout(case.masked()), case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    labels, results = torch.tensor([0, 0, 1, 1]), []
    start = state_copy(model)
    for forward in (model, compiled):
        model.load_state_dict(start)  # running means of batch norms
        model.zero_grad()
        with record_masks(model) as gates:
            logits = forward(**inputs).logits
        (logits.sum() + ContrastiveLoss(1.0, 0.2)(gates, labels)["loss_contrastive"]).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **gates, **gradients})
    assert list(results[0]) == list(results[1])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", [VIT, BERT], ids=str)
def test_training_with_torch_compile_has_no_graph_breaks(case, tmp_path):
    logs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_of(case, tmp_path, case.model(**NO_DROPOUT), **options)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    for plain, compiled in zip(*logs, strict=True):
        for name in ("loss", "loss_contrastive", "neuron_retention"):
            assert compiled[name] == pytest.approx(plain[name], abs=1e-4)


class TooLarge(ModularTrainer):
    """Has memory for four samples."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_batch_size_that_fits_is_found(tmp_path):
    args = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer = TooLarge(VIT.model(), args, train_dataset=Samples(VIT))
    trainer.train()
    assert trainer.state.train_batch_size <= 4
    assert len([entry for entry in trainer.state.log_history if "loss_contrastive" in entry]) == 3


@over_kinds
@torch.no_grad()
def test_generators_are_placed_with_their_model(case, tmp_path):
    model, inputs = case.masked(), case.inputs()
    model.save_pretrained(tmp_path / "saved")
    expected = model(**inputs).logits
    children = [name for name, _ in model.named_children()]
    offloaded = dict.fromkeys(children, "cpu") | {children[0]: "disk"}
    for device_map in ("auto", {"": "cpu"}, offloaded):
        options = {"offload_folder": str(tmp_path / "offload")} if device_map is offloaded else {}
        loaded = AutoModularModel.from_pretrained(tmp_path / "saved", device_map=device_map, **options)
        generators = [p for name, p in loaded.named_parameters() if ".mask_generator." in name]
        assert {p.device.type for p in generators} == {"meta" if device_map is offloaded else "cpu"}
        assert torch.equal(loaded(**inputs).logits, expected)
        if device_map is not offloaded:
            assert_same_state(loaded.state_dict(), model.state_dict())
