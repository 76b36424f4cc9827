# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Promise 6: several processes train as one process does with the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


# Trains in every process of its group; the first one saves the weights and the log.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
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
args = arguments(
    sys.argv[2], per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
    lr_scheduler_type="constant", alpha=0.7, temperature=0.5, modular_warmup_ratio=0.0, gate_mixing_ratio=0.0,
    **options,
)
model = case.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(dtype)
data = [
    {name: value.to(dtype) if value.is_floating_point() else value for name, value in Samples(case, size)[i].items()}
    for i in range(size)
]
if "group_column" in options:
    for i, row in enumerate(data):
        row[options["group_column"]] = i % 2
trainer = ModularTrainer(model, args, modular_config=ModularConfig(generator_init="paper"), train_dataset=data)
trainer.train()
statistics = trainer.collect_statistics(data[:13])
if trainer.is_world_process_zero():
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, Path(sys.argv[2]) / "weights.safetensors")
    logs = [entry for entry in trainer.state.log_history if "loss_task" in entry]
    (Path(sys.argv[2]) / "facts.json").write_text(json.dumps([logs, statistics.open_counts.tolist()]))
assert trainer.accelerator.num_processes == processes
"""


UNEVEN = {"split_batches": True, "even_batches": False}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def run(tmp_path, processes, **options):
    """Weights, logs and statistics of a training in several processes."""
    folder = tmp_path / str(processes)
    folder.mkdir(parents=True)
    (folder / "script.py").write_text(SCRIPT)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    command = [sys.executable, *launcher, folder / "script.py", Path(__file__).parent, folder, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    logs, open_counts = json.loads((folder / "facts.json").read_text())
    return load_file(folder / "weights.safetensors"), logs, open_counts


def check_equal(one, several, tolerance):
    for name, weight in one[0].items():
        torch.testing.assert_close(several[0][name], weight, atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(one[1], several[1], strict=True):
        for name in ("loss_task", "loss_contrastive", "loss_compactness", "neuron_retention"):
            assert theirs[name] == pytest.approx(mine[name], abs=1e-5)
    assert several[2] == one[2]


@pytest.mark.parametrize(
    ("processes", "options", "tolerance"),
    [
        (2, {"case": "vit", "dtype": "float64"}, 1e-10),
        slow(2, {"case": "bert", "dtype": "float32", "objective": "nemo"}, 1e-5),
        slow(4, {"case": "bert", "dtype": "float64", "group_column": "domain"}, 1e-10),
        # 21 samples in batches of 8: of the last 5 one process gets 4 and the other 1, of a label that is alone there.
        slow(2, {"case": "vit", "dtype": "float64", "size": 21, "accelerator_config": UNEVEN}, 1e-10),
    ],
    ids=["two", "two, reference loss", "four, groups", "uneven"],
)
def test_several_processes_train_as_one(tmp_path, processes, options, tolerance):
    one, several = (run(tmp_path, number, **options) for number in (1, processes))
    check_equal(one, several, tolerance)
