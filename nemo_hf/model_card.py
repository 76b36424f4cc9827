# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""What the cards of modular models, modules and collections say; [`readme`] puts it into the file."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from .collection import ModuleEntry
from .files import atomic_path
from .metrics import count_parameters
from .readme import as_list, cell, parse_card, quoted, read_text, shorten, table, update_card


LIBRARY_NAME = "transformers"
CITATION = """```bibtex
@article{nemo2025,
  title  = {{NeMo}: A Neuron-Level Modularizing-While-Training Approach for Decomposing {DNN} Models},
  note   = {arXiv:2508.11348},
  year   = {2025}
}
```"""
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "text-classification": "AutoModelForSequenceClassification",
}
PROCESSORS = {  # the Auto class, and how `pipeline` calls its object
    "image-classification": ("AutoImageProcessor", "image_processor"),
    "audio-classification": ("AutoFeatureExtractor", "feature_extractor"),
    "text-classification": ("AutoTokenizer", "tokenizer"),
}
MASKS = {  # where they come from
    "statistics": "from the statistics of a modular model",
    "learnt": "learnt for a classifier that was trained already",
}
WITHOUT_NEMO_HF = """
Where nemo_hf is not installed, leave out its import and add `trust_remote_code=True`: this runs the `slim.py` of this
repository, which needs torch and transformers only.
"""
# Figures about cost or about the parent: rows of the table, but no results of this model.
COSTS = {"flops", "latency", "latency_ratio", "parameters", "bytes", "neuron_retention", "parameter_retention"}


def pipeline_task(model: PreTrainedModel) -> str:
    """The task name under which `pipeline` and the Hub know a classifier."""
    tasks = {"pixel_values": "image-classification", "input_values": "audio-classification"}
    return tasks.get(model.main_input_name, "text-classification")


def module_card(
    module: PreTrainedModel,
    metrics: Mapping[str, Any] | None = None,
    source: str = "path-or-repository",
    subfolder: str = "",
    has_processor: bool = True,
    has_code: bool = False,
    base_model: str | None = None,
    dataset: str | None = None,
) -> tuple[str, ModelCardData]:
    """
    The card of a module.

    Args:
        module (`PreTrainedModel`): made by [`~nemo_hf.extract_module`].
        metrics (`Mapping`, *optional*): measured results, name → value. `flops`, `latency` (in seconds) and any result
            are set against `parent_flops`, `parent_latency`, … where these are given.
        source (`str`, *optional*): repository or folder that the loading snippet names.
        subfolder (`str`, *optional*): of the module in it.
        has_processor (`bool`, *optional*, defaults to `True`): whether a processor lies beside the module.
        has_code (`bool`, *optional*, defaults to `False`): whether `slim.py` lies beside the module.
        base_model (`str`, *optional*): the parent on the Hub, if the module does not know it.
        dataset (`str`, *optional*): the data set on the Hub that the parent was trained on and the results are of.

    Returns:
        The Markdown, and the metadata for the Hub.
    """
    nemo, task = module.config.nemo, pipeline_task(module)
    parent = base_model or parent_on_hub(module)
    parent_class = nemo["parent"]["class"]
    kept = kept_neurons(nemo["neurons"])
    share = nemo["neuron_retention"]
    labels = list(module.config.id2label.values())  # other ones than it was cut for, if it was tuned for another task
    rows = [
        ("labels", ", ".join(map(str, labels))),
        *([(f"groups of `{nemo['grouped_by']}`", ", ".join(map(str, nemo["groups"])))] if "groups" in nemo else []),
        ("parent", f"{parent} ({parent_class})" if parent else parent_class),
        ("neurons kept", f"{kept:,} of {round(kept / share):,} ({share:.1%})" if share else "none"),
        ("parameters kept", f"{count_parameters(module):,} ({nemo['parameter_retention']:.1%} of the parent's)"),
        ("gates", {"mean": "class-mean gates folded into the weights", "binary": "0 or 1"}[nemo["gates"]]),
        ("masks", MASKS.get(str(nemo.get("masks")), "chosen by hand")),
        *([] if nemo["threshold"] is None else [("threshold", f"{nemo['threshold']:g}")]),
        ("layout", nemo["layout"]),
        *_metric_rows(metrics or {}),
    ]
    owner = "groups of samples" if "groups" in nemo else "labels"
    whole = "modular model" if nemo.get("masks") == "statistics" else "classifier"
    text = f"""# Module for {shorten(nemo.get("groups", labels))}

The part of a {whole} that these {owner} need, cut out as a small dense network by
[nemo_hf](https://arxiv.org/abs/2508.11348). It needs neither masks nor its parent.

{table(rows)}

## How to use

{_snippet(task, nemo["layout"], source, subfolder, has_processor)}
{WITHOUT_NEMO_HF if has_code else ""}
## Versions

{versions()}

## Citation

{CITATION}
"""
    name = subfolder or source.rstrip("/").rpartition("/")[2]
    return text, _metadata(task, ["module"], parent, dataset, name, _results(metrics or {}, task, dataset))


def collection_card(
    source: str, entries: Mapping[str, ModuleEntry], task: str, has_code: bool = False, dataset: str | None = None
) -> tuple[str, ModelCardData]:
    """
    The card of a repository that holds many modules.

    Args:
        source (`str`): the repository.
        entries (`Mapping[str, ModuleEntry]`): name → module, as [`~nemo_hf.list_modules`] gives them.
        task (`str`): what `pipeline` calls it.
        has_code (`bool`, *optional*, defaults to `False`): whether `slim.py` lies in the root.
        dataset (`str`, *optional*): the data set on the Hub that the accuracies are of.

    Returns:
        The Markdown, and the metadata for the Hub.
    """
    lines = ["| module | subfolder | labels | neurons | parameters | bytes | accuracy |", f"|{'---|' * 7}"]
    for name, entry in entries.items():
        accuracy = "" if entry.accuracy is None else f"{entry.accuracy:.4g}"
        cells = [name, f"`{entry.folder}`", shorten(entry.groups or entry.labels), f"{entry.neuron_retention:.1%}"]
        cells += [f"{entry.parameters:,} ({entry.parameter_retention:.1%})", f"{entry.bytes:,}", accuracy]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    first = next(iter(entries.values()))
    text = f"""# Modules

Parts of a classifier, each cut out for some of its labels as a small dense network by
[nemo_hf](https://arxiv.org/abs/2508.11348). A module needs neither masks nor its parent, and downloads alone.

{chr(10).join(lines)}

## How to use

{_snippet(task, first.layout, source, first.folder, False)}
{WITHOUT_NEMO_HF if has_code else ""}
```python
from nemo_hf import list_modules

for name, entry in list_modules({quoted(source)}).items():
    print(name, entry.folder, entry.parameters, entry.accuracy)
```

## Versions

{versions()}

## Citation

{CITATION}
"""
    parents = sorted({entry.parent for entry in entries.values() if entry.parent})
    results = [
        _result("accuracy", entry.accuracy, task, dataset, f"accuracy ({name})")
        for name, entry in entries.items()
        if entry.accuracy is not None
    ]
    base_model = parents[0] if len(parents) == 1 else parents or None
    return text, _metadata(
        task, ["module", "module-collection"], base_model, dataset, source.rpartition("/")[2], results
    )


def write_modular_card(
    path: str | os.PathLike,
    model: PreTrainedModel,
    log_history: list[dict[str, float]],
    hyperparameters: Mapping[str, Any],
    source: str,
) -> None:
    """
    Complete the card that `Trainer` wrote for a modular model: what it is, how it loads, what was measured.

    Args:
        path (`str` or `os.PathLike`): the folder with the card.
        model (`PreTrainedModel`): the modular model.
        log_history (`list[dict]`): of the trainer; the last evaluation is listed.
        hyperparameters (`Mapping`): those of modular training; `group_column` is the column of the groups that neurons
            belong to, if not to labels.
        source (`str`): repository or folder that the loading snippet names.
    """
    readme = Path(path) / "README.md"
    nemo, task = model.config.nemo, pipeline_task(model)
    names, group_column = list(model.config.id2label.values()), hyperparameters.get("group_column")
    evaluation = next((logs for logs in reversed(log_history) if "eval_neuron_retention" in logs), {})
    results = {name: value for name, value in evaluation.items() if name.startswith("eval_") and _is_result(name)}
    parameters = count_parameters(model)
    generators = sum(p.numel() for name, p in model.named_parameters() if ".mask_generator." in name)
    rows = [
        ("labels", f"{len(names)}: {shorten(names)}"),
        ("parameters", f"{parameters - generators:,}, and {generators:,} of mask generators"),
        *((name, _row(name, value)[1]) for name, value in results.items()),
        *((name, _row(name, value)[1]) for name, value in hyperparameters.items() if value is not None),
    ]
    owner = "label" if group_column is None else f"group of samples (column `{group_column}`)"
    # In the string of a label, what would end the block of code or our section is written as an escape.
    shown = repr(names[:2]).replace("`", "\\x60").replace("<!--", "<\\x21--")
    chosen = f"labels={shown}" if group_column is None else "groups=masks.labels[:2]"
    section = f"""## Modular model

Trained with [nemo_hf](https://arxiv.org/abs/2508.11348) so that every {owner} has its own neurons: masks on
`{nemo["target_modules"]}`, {nemo["skip_first_blocks"]} unmasked block(s), {nemo["gate"]} gates. Labels:
{shorten(names)}.

```python
from nemo_hf import AutoModularModel, NeuronStatistics, extract_module

model = AutoModularModel.from_pretrained({quoted(source)})  # the stock Auto class would ignore the mask generators
masks = NeuronStatistics.from_pretrained({quoted(source)}).module_masks()
module = extract_module(model, masks, {chosen})
```

{table(rows)}

{versions()}

{CITATION}
"""
    old = read_text(readme)
    data = _modular_metadata(parse_card(old or "", str(readme)).data, task, results, Path(path).resolve().name)
    with atomic_path(readme) as temporary:
        temporary.write_bytes(update_card(old, section, data, str(readme)).encode())


def check_card(path: str | os.PathLike) -> None:
    """Raise a [`~nemo_hf.errors.CheckpointError`] if the card in a folder cannot be read."""
    readme = Path(path) / "README.md"
    parse_card(read_text(readme) or "", str(readme))


def parent_on_hub(module: PreTrainedModel) -> str | None:
    """The repository of a module's parent; a local folder means nothing to a reader."""
    name = module.config.nemo["parent"]["name_or_path"] or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name) else None


def shown_source(path: str | os.PathLike) -> str:
    """A folder as a loading snippet names it: as given, but without where it lies on this machine."""
    path = Path(path)
    return path.name if path.is_absolute() else path.as_posix()


def kept_neurons(packed: Mapping[str, str]) -> int:
    """How many neurons the packed bits of a module's provenance keep."""
    return sum(int.from_bytes(base64.b64decode(bits, validate=True), "big").bit_count() for bits in packed.values())


def versions() -> str:
    """The versions of the libraries, as one line."""
    names = ("nemo_hf", "transformers", "torch")
    return ", ".join(f"{name} {version(name)}" for name in names)


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON holds them: numbers of NumPy and PyTorch become Python's, NaN and infinity are left out."""
    values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    return {
        name: value for name, value in values.items() if not (isinstance(value, float) and not math.isfinite(value))
    }


def accuracy_of(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy among some metrics."""
    return metrics.get("accuracy", metrics.get("eval_accuracy"))


def _snippet(task: str, layout: str, source: str, subfolder: str, has_processor: bool) -> str:
    """Code that loads a module, ready to run."""
    auto_class, where = AUTO_CLASSES[task], quoted(source)
    there = f"{where}, subfolder={quoted(subfolder)}" if subfolder else where
    lines = ["import nemo_hf  # registers the slim model classes"] if layout == "ragged" else []
    processor, argument = PROCESSORS[task]
    if not has_processor:
        lines += [f"from transformers import {auto_class}", "", f"model = {auto_class}.from_pretrained({there})"]
    elif subfolder:
        lines += [
            f"from transformers import {', '.join(sorted((auto_class, processor)))}, pipeline",
            "",
            f"model = {auto_class}.from_pretrained({there})",
            f"{argument} = {processor}.from_pretrained({there})",
            f'classify = pipeline("{task}", model=model, {argument}={argument})',
        ]
    else:
        lines += [
            f"from transformers import {auto_class}, pipeline",
            "",
            f"model = {auto_class}.from_pretrained({there})",
            f'classify = pipeline("{task}", model={where})',
        ]
    return "\n".join(["```python", *lines, "```"])


def _metadata(
    task: str,
    tags: list[str],
    base_model: str | Sequence[str] | None,
    dataset: str | None,
    name: str,
    results: list[EvalResult],
) -> ModelCardData:
    return ModelCardData(
        library_name=LIBRARY_NAME,
        pipeline_tag=task,
        tags=["nemo_hf", *tags, "modular-neural-network"],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _modular_metadata(written: ModelCardData, task: str, results: Mapping[str, float], name: str) -> ModelCardData:
    """What the card that `Trainer` wrote lacks."""
    dataset = next(iter(as_list(written.datasets)), None)
    found = [] if written.eval_results else _results(results, task, dataset)
    return _metadata(task, [], None, dataset, written.model_name or name, found)


def _results(metrics: Mapping[str, Any], task: str, dataset: str | None) -> list[EvalResult]:
    """The metrics that say how good the module is, for the Hub's model index."""
    named = {name.removeprefix("eval_"): value for name, value in plain_metrics(metrics).items() if _is_result(name)}
    return [
        _result(name, value, task, dataset)
        for name, value in named.items()
        if _is_number(value) and name not in COSTS and not name.startswith(("parent_", "loss_"))
    ]


def _result(kind: str, value: float, task: str, dataset: str | None, name: str | None = None) -> EvalResult:
    dataset = dataset or "unknown"
    return EvalResult(task, dataset, dataset, kind, value, metric_name=name or kind.replace("_", " "))


def _metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The measured values, each beside that of the parent where it is given."""
    rows = []
    for name, value in metrics.items():
        if name.startswith("parent_") and name.removeprefix("parent_") in metrics:
            continue
        title, text = _row(name, value)
        parent = metrics.get(f"parent_{name}")
        if name == "latency_ratio":
            title, text = "latency", f"{value:.2f} x the parent's"
        elif parent is not None:
            text = f"{text} (parent: {_row(name, parent)[1]})"
        rows.append((title, text))
    return rows


def _row(name: str, value: Any) -> tuple[str, str]:
    number = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_result(name: str) -> bool:
    return not name.endswith(("_runtime", "_per_second", "_preparation_time"))
