# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 6: several processes train as one process does with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_hf import AutoModularModel, NeuronStatistics


# Trains in every process of its group; the first one saves the weights and the log.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import DistributedType, PartialState
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent / "docs")]
from models import BERT, VIT, Samples, arguments
from safetensors.torch import save_file
from nemo_hf import ModularConfig, ModularTrainer

torch.set_num_threads(1)
options = json.loads(sys.argv[3])
case = {"vit": VIT, "bert": BERT}[options.pop("case")]
dtype = getattr(torch, options.pop("dtype"))
size = options.pop("size", 24)
processes = int(os.environ.get("WORLD_SIZE", 1))
batch_size = 8 if options.get("accelerator_config") else 8 // processes  # split by Accelerate, or by us
sharded, resumes = "ACCELERATE_USE_FSDP" in os.environ and processes > 1, options.pop("resumes", False)
training = dict(
    per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
    lr_scheduler_type="constant", alpha=0.7, temperature=0.5, modular_warmup_ratio=0.0, gate_mixing_ratio=0.0,
)
data = [
    {name: value.to(dtype) if value.is_floating_point() else value for name, value in Samples(case, size)[i].items()}
    for i in range(size)
]
if "group_column" in options:
    for i, row in enumerate(data):
        row[options["group_column"]] = i % 2
def make():
    args = arguments(sys.argv[2], **{**training, **options})
    if sharded:  # accelerate shards models on GPUs only, torch does on CPUs as well
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = case.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(dtype)
    config = ModularConfig(generator_init="paper")
    return ModularTrainer(model, args, modular_config=config, train_dataset=data)

def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.accelerator.get_state_dict(trainer.model).items()}

trainer = make()
trainer.train()
statistics = trainer.collect_statistics(data[:13])
facts = [statistics.open_counts.tolist(), trainer.evaluate(data[:16])["eval_loss_task"]]
facts.append(trainer.predict(data[:13]).predictions.tolist())
for few in (data[:13], data[:1]):  # the last batch is filled up; there are fewer samples than processes
    evaluated = trainer.evaluate(few)
    split = "split_batches" in options.get("accelerator_config", {})
    assert split or abs(evaluated["eval_loss"] - evaluated["eval_loss_task"]) < 1e-6  # transformers weighs otherwise
    assert trainer.collect_statistics(few).num_samples.sum() == len(few)
weights = weights_of(trainer)
if trainer.is_world_process_zero():
    save_file(weights, Path(sys.argv[2]) / "weights.safetensors")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    (Path(sys.argv[2]) / "facts.json").write_text(json.dumps([logs, facts]))
assert trainer.accelerator.num_processes == processes
if sharded:
    from torch.distributed.tensor import DTensor
    from nemo_hf import AutoModularModel, UnsupportedModelError, extract_module
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    trainer.save_model(sys.argv[2] + "/saved")
    if trainer.is_world_process_zero():
        saved = AutoModularModel.from_pretrained(sys.argv[2] + "/saved", dtype=dtype).state_dict()
        assert all(torch.equal(saved[name], value) for name, value in weights.items())
    try:
        extract_module(trainer.model, statistics.module_masks(), ["cat"])
    except UnsupportedModelError as error:
        assert "sharded over processes" in str(error)
    else:
        raise AssertionError
if resumes:
    again = make()
    again.train(resume_from_checkpoint=sys.argv[2] + f"/checkpoint-{options['save_steps']}")
    resumed = weights_of(again)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
"""


UNEVEN = {"split_batches": True, "even_batches": False}
SPLIT = {"accelerator_config": {"split_batches": True}}
RESUMED = {"resumes": True, "save_strategy": "steps", "save_steps": 5, "max_steps": 7}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def run(tmp_path, processes, environment=None, **options):
    """Weights, logs, and facts about statistics, evaluation and prediction, of a training in several processes."""
    folder = tmp_path / str(processes)
    folder.mkdir(parents=True)
    (folder / "script.py").write_text(SCRIPT)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    command = [sys.executable, *launcher, folder / "script.py", Path(__file__).parent, folder, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    assert result.returncode == 0, result.stderr[-3000:]
    logs, facts = json.loads((folder / "facts.json").read_text())
    return load_file(folder / "weights.safetensors"), logs, facts


def check_equal(one, several, tolerance):
    for name, weight in one[0].items():
        torch.testing.assert_close(several[0][name], weight, atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(one[1], several[1], strict=True):
        for name in ("loss_task", "loss_contrastive", "loss_compactness", "neuron_retention"):
            assert theirs[name] == pytest.approx(mine[name], abs=1e-5)
    assert several[2][0] == one[2][0]
    for mine, theirs in zip(one[2][1:], several[2][1:], strict=True):
        assert torch.allclose(torch.tensor(theirs), torch.tensor(mine), atol=1e-4)


@pytest.mark.parametrize(
    ("processes", "options", "tolerance"),
    [
        (2, {"case": "vit", "dtype": "float64"}, 1e-10),
        slow(2, {"case": "bert", "dtype": "float32", "objective": "nemo"}, 1e-5),
        slow(4, {"case": "bert", "dtype": "float64", "group_column": "domain"}, 1e-10),
        # 21 samples in batches of 8: of the last 5 one process gets 4 and the other 1, of a label that is alone there.
        slow(2, {"case": "vit", "dtype": "float64", "size": 21, "accelerator_config": UNEVEN}, 1e-10),
        # Resumed in the second epoch: the order of the samples follows the epoch.
        slow(2, {"case": "vit", "dtype": "float64", "samples_per_label": 2, **SPLIT, **RESUMED}, 1e-10),
    ],
    ids=["two", "two, reference loss", "four, groups", "uneven", "balanced batches"],
)
def test_several_processes_train_as_one(tmp_path, processes, options, tolerance):
    one, several = (run(tmp_path, number, **options) for number in (1, processes))
    check_equal(one, several, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "block"), [("vit", "ViTLayer"), ("bert", "BertLayer")])
def test_sharded_models_train_resume_and_save_as_one_process_does(case, block, tmp_path):
    options = {"case": case, "dtype": "float64", "optim": "adamw_torch", "learning_rate": 1e-3, **RESUMED}
    one = run(tmp_path, 1, **options)
    several = run(tmp_path, 2, {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": block}, **options)
    check_equal(one, several, 1e-9)  # Adam divides by the square root of tiny gradients


def test_the_configurations_for_accelerate_can_be_read():
    from accelerate.commands.config.config_args import load_config_from_file

    for file in CONFIGS.glob("*.yaml"):
        config = load_config_from_file(str(file))
        assert config.num_processes > 1
        assert (config.distributed_type == "FSDP") == (file.stem == "fsdp2")


@pytest.mark.slow
def test_the_command_line_trains_under_accelerate_launch(tmp_path):
    from datasets import Image
    from test_cli import IMAGE_MODEL, TRAINING, draw, write_dataset

    (tmp_path / "data").mkdir()
    data = write_dataset(tmp_path / "data", "image", Image(), draw)
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / "ddp_cpu.yaml", "-m", "nemo_hf.cli"]
    train = ["train", *IMAGE_MODEL, "--dataset_name", data, "--output_dir", tmp_path / "model", *TRAINING, "--use_cpu"]
    result = subprocess.run([sys.executable, *launch, *train], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    statistics = NeuronStatistics.from_pretrained(tmp_path / "model")
    assert statistics.num_samples.tolist() == [8, 8, 8]
    assert AutoModularModel.from_pretrained(tmp_path / "model").config.num_labels == 3
    state = json.loads((tmp_path / "model" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # 24 samples in two processes, 8 each
