# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The results of a suite as JSON, as tables in Markdown and as plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from methods import METHODS


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402 (after the choice of the backend)


SIZES = ("parameter_retention", "linear_retention", "neuron_retention", "flops_ratio")
COLUMNS = {
    "accuracy": "model",
    "module_accuracy": "modules",
    "module_parameters": "their parameters",
    "single_parameters": "one label: parameters",
    "single_linear": "linear layers only",
    "single_neurons": "neurons",
    "single_flops": "FLOPs",
    "cohesion": "cohesion",
    "coupling": "coupling",
    "overlap": "overlap",
    "seconds_ratio": "training time",
    "cpu_seconds_ratio": "processor time",
    "peak_memory_ratio": "memory",
}
NO_PERCENT = {"cohesion", "coupling", "overlap", "seconds_ratio", "cpu_seconds_ratio", "peak_memory_ratio"}
COLOURS = {
    "standard": "#7f7f7f",
    "magnitude": "#b08d57",
    "learned": "#17becf",
    "mwt": "#1f77b4",
    "moda": "#2ca02c",
    "nemo": "#9467bd",
}
OWN_COLOURS = ("#d62728", "#ff9896", "#e377c2", "#ff7f0e", "#bcbd22", "#8c564b")


def summarise(result: Mapping[str, Any], gates: str | None) -> dict[str, Any]:
    """
    The figures of one run with one kind of gates.

    Args:
        result (`Mapping[str, Any]`): what `suite_run.py` wrote.
        gates (`str`, *optional*): of the modules.

    Returns:
        `dict[str, Any]`: numbers by name; `by_size` has, for every number of labels, the means over label subsets.
    """
    modules = [module for module in result["modules"] if module["gates"] == gates]
    by_size: dict[int, dict[str, float]] = {}
    for size in sorted({len(module["labels"]) for module in modules}):
        of_size = [module for module in modules if len(module["labels"]) == size]
        by_size[size] = {name: _mean(module[name] for module in of_size) for name in ("accuracy", *SIZES)}
    several = [figures for size, figures in by_size.items() if size > 1]
    return {
        "accuracy": result["accuracy"],
        "module_accuracy": _mean(figures["accuracy"] for figures in several),
        "module_parameters": _mean(figures["parameter_retention"] for figures in several),
        **{
            f"single_{short}": by_size[1][name]
            for short, name in zip(("parameters", "linear", "neurons", "flops"), SIZES, strict=True)
        },
        **{name: result[name] for name in ("cohesion", "coupling", "overlap") if name in result},
        **{f"training_{name}": value for name, value in result["training"].items()},
        "by_size": by_size,
        "latencies": [entry for entry in result.get("latencies", []) if entry["gates"] == gates],
        "finetuned": [entry for entry in result.get("finetuned", []) if entry["gates"] == gates],
    }


def collect(folder: Path) -> list[dict[str, Any]]:
    """
    All results below a folder, those of one row, method and kind of gates together.

    Returns:
        `list[dict[str, Any]]`: `row`, `method`, `name` (with the gates if there are several), `measured` (where and on
        what), `seeds` and `runs`, one of [`summarise`] for each seed, with time and memory relative to the plain model
        of the same seed.
    """
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("runs/*/*/seed*/result.json"))]
    plain = {
        (r["spec"]["row"], r["spec"]["seed"]): r["training"] for r in results if r["spec"]["method"] == "standard"
    }
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        spec = result["spec"]
        for gates in spec["gates"] or [None]:
            name = spec["method"] if len(spec["gates"]) < 2 else f"{spec['method']}, {gates}"
            run = summarise(result, gates)
            reference = plain.get((spec["row"], spec["seed"]))
            if reference and result["training"]:
                run |= {f"{name}_ratio": value / reference[name] for name, value in result["training"].items()}
            empty = {"row": spec["row"], "method": spec["method"], "name": name, "measured": _conditions(result)}
            empty |= {"seeds": [], "runs": []}
            entry = entries.setdefault((spec["row"], name), empty)
            entry["seeds"].append(spec["seed"])
            entry["runs"].append(run)
    order = list(METHODS)
    return sorted(entries.values(), key=lambda entry: (entry["row"], order.index(entry["method"].partition("@")[0])))


def _conditions(result: Mapping[str, Any]) -> str:
    spec = result["spec"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    scale = "" if spec["scale"] == 1 else f", at {spec['scale']:g} of its size"
    samples = "held-out training samples" if spec["validation"] else "the test set"
    return f"on {samples}{scale}; {versions}; {result['device']}"


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(values: list[float | None], percent: bool) -> str:
    """Mean and standard deviation over seeds, as text."""
    known = [value for value in values if value is not None and value == value]
    if not known:
        return "–"
    scale, digits = (100, 1) if percent else (1, 2)
    text = f"{scale * _mean(known):.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {scale * _deviation(known):.{digits}f}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _main_table(entries: list[dict[str, Any]]) -> str:
    lines = []
    for entry in entries:
        cells = [_cell([run.get(column) for run in entry["runs"]], column not in NO_PERCENT) for column in COLUMNS]
        lines.append([entry["name"], *cells])
    header = [title if column in NO_PERCENT else f"{title}, %" for column, title in COLUMNS.items()]
    return _table(["method", *header], lines)


def _size_table(entries: list[dict[str, Any]], figure: str) -> str:
    sizes = sorted({size for entry in entries for run in entry["runs"] for size in run["by_size"]})
    sizes = [size for size in sizes if figure != "accuracy" or size > 1]
    lines = [
        [entry["name"], *(_cell([run["by_size"][size][figure] for run in entry["runs"]], True) for size in sizes)]
        for entry in entries
    ]
    return _table(["labels of the module", *map(str, sizes)], lines)


def _sample_table(entries: list[dict[str, Any]], kind: str, columns: Mapping[str, tuple[str, bool]]) -> str:
    """Of the modules that were looked at more closely: one line for each method and number of labels."""
    lines = []
    for entry in entries:
        modules = [module for run in entry["runs"] for module in run[kind]]
        for size in sorted({len(module["labels"]) for module in modules}):
            of_size = [module for module in modules if len(module["labels"]) == size]
            cells = [_cell([module[name] for module in of_size], percent) for name, percent in columns.values()]
            lines.append([entry["name"], str(size), *cells])
    return _table(["method", "labels", *columns], lines) if lines else ""


def _sections(entries: list[dict[str, Any]], plot: str) -> Iterable[str]:
    seeds = sorted({seed for entry in entries for seed in entry["seeds"]})
    yield f"## {entries[0]['row']}\n"
    for measured in dict.fromkeys(entry["measured"] for entry in entries):
        names = ", ".join(entry["name"] for entry in entries if entry["measured"] == measured)
        yield f"Seeds {', '.join(map(str, seeds))}, {measured}: {names}.\n"
    yield _main_table(entries)
    yield f"![Accuracy and size of modules]({plot})\n"
    yield "Accuracy of modules without fine-tuning, %:\n"
    yield _size_table(entries, "accuracy")
    yield "Their parameters, % of the plain model's:\n"
    yield _size_table(entries, "parameter_retention")
    latency = {
        "parameters, %": ("parameter_retention", True),
        "FLOPs, %": ("flops_ratio", True),
        "latency, %": ("latency_ratio", True),
    }
    table = _sample_table(entries, "latencies", latency)
    if table:
        yield "Latency of some modules, in turn with the plain model, batch of 32:\n"
        yield table
    tuned = {"before, %": ("accuracy", True), "after fine-tuning, %": ("finetuned_accuracy", True)}
    table = _sample_table(entries, "finetuned", tuned)
    if table:
        yield "Some modules before and after fine-tuning:\n"
        yield table


def _plot(entries: list[dict[str, Any]], file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    own = iter(OWN_COLOURS * len(entries))
    for entry in entries:
        colour = COLOURS.get(entry["method"]) or next(own)
        sizes = [size for size in entry["runs"][0]["by_size"] if size > 1]
        values = {
            name: [[100 * run["by_size"][size][name] for run in entry["runs"]] for size in sizes]
            for name in ("accuracy", "parameter_retention")
        }
        means = {name: [_mean(of_size) for of_size in of_sizes] for name, of_sizes in values.items()}
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.4}
        if entry["method"] == "standard":
            style |= {"linestyle": "--", "marker": "s"}
        errors = [_deviation(of_size) for of_size in values["accuracy"]]
        left.errorbar(means["parameter_retention"], means["accuracy"], errors, label=entry["name"], capsize=2, **style)
        right.errorbar(sizes, means["accuracy"], errors, capsize=2, **style)
    left.set_xlim(left=0)
    left.set(xlabel="parameters of the module, % of the plain model's", ylabel="accuracy of the module, %")
    right.set(xlabel="labels of the module")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{entries[0]['row']}: modules as they are cut, without fine-tuning")
    figure.legend(loc="outside lower center", ncols=min(4, len(entries)), frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def write_report(folder: Path) -> None:
    """
    Write `results.json`, `results.md` and a plot for every row.

    Args:
        folder (`Path`): of the suite.
    """
    entries = collect(folder)
    if not entries:
        print(f"There are no results in {folder} yet.")
        return
    (folder / "results.json").write_text(json.dumps(entries, indent=1) + "\n")
    parts = ["# Results\n"]
    for row in dict.fromkeys(entry["row"] for entry in entries):
        of_row = [entry for entry in entries if entry["row"] == row]
        plot = f"{row.replace('/', '-')}.png"
        _plot(of_row, folder / plot)
        parts += _sections(of_row, plot)
    (folder / "results.md").write_text("\n".join(parts))
    print(f"{folder / 'results.md'}: {len(entries)} lines of {len(parts)} parts.")
