# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards of modular models and of modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .files import atomic_path


LIBRARY_NAME = "transformers"
CITATION = """```bibtex
@article{nemo2025,
  title  = {{NeMo}: A Neuron-Level Modularizing-While-Training Approach for Decomposing {DNN} Models},
  note   = {arXiv:2508.11348},
  year   = {2025}
}
```"""


def pipeline_task(model: PreTrainedModel) -> str:
    """The task name under which `pipeline` and the Hub know a classifier."""
    tasks = {"pixel_values": "image-classification", "input_values": "audio-classification"}
    return tasks.get(model.main_input_name, "text-classification")


def module_card(module: PreTrainedModel, metrics: Mapping[str, Any] | None = None) -> ModelCard:
    """
    The card of a module.

    Args:
        module (`PreTrainedModel`): made by [`~nemo_hf.extract_module`].
        metrics (`Mapping`, *optional*): measured results to list, name → value.

    Returns:
        `ModelCard`: with metadata for the Hub.
    """
    nemo = module.config.nemo
    auto_class = {
        "image-classification": "AutoModelForImageClassification",
        "audio-classification": "AutoModelForAudioClassification",
        "text-classification": "AutoModelForSequenceClassification",
    }[pipeline_task(module)]
    parent = nemo["parent"]["name_or_path"]
    parent = parent if parent and not os.path.exists(parent) else None  # a local folder means nothing to a reader
    rows = [
        ("labels", ", ".join(map(str, nemo["labels"]))),
        *([(f"groups of `{nemo['grouped_by']}`", ", ".join(map(str, nemo["groups"])))] if "groups" in nemo else []),
        ("parent", f"{parent} ({nemo['parent']['class']})" if parent else nemo["parent"]["class"]),
        ("neurons kept", f"{nemo['neuron_retention']:.1%} of the maskable neurons"),
        ("parameters kept", f"{nemo['parameter_retention']:.1%} ({module.num_parameters():,})"),
        ("gates", {"mean": "class-mean gates folded into the weights", "binary": "0 or 1"}[nemo["gates"]]),
        ("threshold", "chosen by hand" if nemo["threshold"] is None else f"{nemo['threshold']:g}"),
        *(
            (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
            for name, value in (metrics or {}).items()
        ),
    ]
    owner = "groups of samples" if "groups" in nemo else "labels"
    text = f"""# Module for {_shorten(nemo.get("groups", nemo["labels"]))}

The part of a modular model that these {owner} need, cut out as a small dense network by
[nemo_hf](https://arxiv.org/abs/2508.11348). It needs neither masks nor its parent.

{_table(rows)}

## How to use

```python
import nemo_hf  # registers the slim model classes
from transformers import {auto_class}, pipeline

model = {auto_class}.from_pretrained("path-or-repository")
classify = pipeline("{pipeline_task(module)}", model="path-or-repository")
```

## Citation

{CITATION}
"""
    data = ModelCardData(
        library_name=LIBRARY_NAME,
        pipeline_tag=pipeline_task(module),
        tags=["nemo_hf", "module", "modular-neural-network"],
        base_model=parent,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def write_modular_card(
    path: str | os.PathLike,
    model: PreTrainedModel,
    log_history: list[dict[str, float]],
    group_column: str | None = None,
) -> None:
    """
    Complete the card that `Trainer` wrote for a modular model: what it is, how it loads, what was measured.

    Args:
        path (`str` or `os.PathLike`): the folder with the card.
        model (`PreTrainedModel`): the modular model.
        log_history (`list[dict]`): of the trainer; the last evaluation is listed.
        group_column (`str`, *optional*): the column of the groups that neurons belong to, if not to labels.
    """
    readme = Path(path) / "README.md"
    card = ModelCard.load(readme)
    card.data.tags = sorted({*(card.data.tags or []), "nemo_hf", "modular-neural-network"})
    nemo = model.config.nemo
    evaluation = next((logs for logs in reversed(log_history) if "eval_neuron_retention" in logs), {})
    rows = [
        (name, f"{value:.4g}") for name, value in evaluation.items() if name.startswith("eval_") and _is_result(name)
    ]
    owner = "label" if group_column is None else f"group of samples (column `{group_column}`)"
    chosen = (
        f"labels={list(model.config.id2label.values())[:2]!r}" if group_column is None else "groups=masks.labels[:2]"
    )
    card.text = f"""{card.text.rstrip()}

## Modular model

Trained with [nemo_hf](https://arxiv.org/abs/2508.11348) so that every {owner} has its own neurons: masks on
`{nemo["target_modules"]}`, {nemo["skip_first_blocks"]} unmasked block(s), {nemo["gate"]} gates. Labels:
{_shorten(list(model.config.id2label.values()))}.

```python
from nemo_hf import AutoModularModel, NeuronStatistics, extract_module

model = AutoModularModel.from_pretrained("path-or-repository")  # the stock Auto class would ignore the mask generators
masks = NeuronStatistics.from_pretrained("path-or-repository").module_masks()
module = extract_module(model, masks, {chosen})
```
{f"{chr(10)}{_table(rows)}{chr(10)}" if rows else ""}
{CITATION}
"""
    with atomic_path(readme) as temporary:
        card.save(temporary)


def _is_result(name: str) -> bool:
    return not name.endswith(("_runtime", "_per_second", "_preparation_time"))


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)]
    )


def _shorten(labels: list[Any]) -> str:
    return ", ".join(map(str, labels[:8])) + (", …" if len(labels) > 8 else "")
