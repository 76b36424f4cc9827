# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""How the command line shows the figures of its commands."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .files import atomic_path, finite


def write_json(path: str, report: dict[str, Any]) -> None:
    """All figures as a JSON file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite(report), indent=2) + "\n")


def print_values(report: dict[str, Any]) -> None:
    """One figure per line; a dash for what there is not."""
    for name, value in report.items():
        shown = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:32}{shown}")


def print_modules(modules: Iterable[dict[str, Any]]) -> None:
    """The modules of a collection, one per line."""
    for module in modules:
        accuracy = f"  accuracy {module['accuracy']:.4g}" if "accuracy" in module else ""
        sizes = f"{module['neuron_retention']:.1%} of the neurons, {module['parameters']:,} parameters"
        print(f"  {module['name']:30}  --subfolder {module['folder']:30}  {sizes}{accuracy}")


def print_report(figures: dict[str, Any]) -> None:
    """The most important figures of `nemo-hf report`."""
    owner = "labels" if figures["grouped_by"] is None else "groups"
    values = {
        owner: len(figures[owner]),
        "modules in the table": len(figures["modules"]),
        f"neurons kept for one {owner[:-1]}": figures["neuron_retention"],
        "coupling": figures["coupling"],
    }
    if "evaluation" in figures:
        values["accuracy before cutting"] = figures["evaluation"]["modular_accuracy"]
    print_values(values)


def print_demo(report: dict[str, Any], output: str) -> None:
    """The table of `nemo-hf demo`."""
    other = {"mean": "binary", "binary": "mean"}[report["gates"]]
    header = ("labels", f"acc. {report['gates']}", f"acc. {other}", "acc. plain", "neurons", "parameters", "bytes")
    print("  ".join(f"{name:>11}" for name in (*header, "latency", "difference")))
    for module in report["modules"]:
        accuracies = (module["accuracy"], module["other_gates_accuracy"], module["plain_accuracy"])
        cells = [
            ",".join(map(str, module["labels"])),
            *("–" if value is None else f"{value:.1%}" for value in accuracies),
        ]
        cells += [f"{module['neuron_retention']:.1%}", f"{module['parameter_retention']:.1%}", f"{module['bytes']:,}"]
        cells += [f"{module['latency_ratio']:.2f} x", f"{module['logit_difference']:.1e}"]
        print("  ".join(f"{cell:>11}" for cell in cells))
    summary = {
        "plain model, all labels": f"{report['plain_accuracy']:.1%}",
        "modular model, all labels": f"{report['modular_accuracy']:.1%}",
        f"modules of label pairs, {report['gates']} gates": f"{report['pair_accuracy']:.1%}",
        f"modules of label pairs, {other} gates": f"{report['pair_other_gates_accuracy']:.1%}",
        "plain model, label pairs": f"{report['pair_plain_accuracy']:.1%}",
        "neurons kept for one label": f"{report['neuron_retention']:.1%}",
        "cohesion, coupling": f"{report['cohesion']:.2f}, {report['coupling']:.2f}",
        "largest logit difference to the parent": f"{report['max_logit_difference']:.1e}",
        "after reloading in a fresh process": f"{report['reload_difference']:.1e}",
    }
    print("\nModules are measured as cut, without fine-tuning.")
    for name, value in summary.items():
        print(f"{name:42}{value}")
    print(f"Saved to {output} in {report['seconds']:.0f} s.")
