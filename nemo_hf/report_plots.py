# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The plots of a report as PNG files. matplotlib is needed for this alone and imported inside functions."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NemoRuntimeError
from .files import atomic_path


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind people
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "text.parse_math": False,  # a label may hold dollar signs
    "figure.dpi": 100,
}
LONGEST_NAME = 28


def check_matplotlib() -> None:
    """
    Raises:
        [`~nemo_hf.errors.NemoRuntimeError`]: if matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NemoRuntimeError("Plots need matplotlib, which is missing: pip install nemo_hf[report]") from error


def write_plots(figures: Mapping[str, Any], panels: Sequence[Mapping[str, Any]], output: Path) -> list[str]:
    """
    Draw what the figures allow: accuracies and training curves only if there are any.

    Args:
        figures (`Mapping`): from [`~nemo_hf.report_data.describe`], with accuracies or without.
        panels (`Sequence[Mapping]`): from [`~nemo_hf.report_data.training_panels`].
        output (`Path`): the folder.

    Returns:
        `list[str]`: names of the files.
    """
    drawings = {"kept_neurons.png": _kept_neurons, "overlap.png": _overlap}
    if "evaluation" in figures:
        drawings["accuracy_size.png"] = _accuracy_size
    written = []
    for name, draw in drawings.items():
        with _quiet_figure() as figure:
            draw(figure, figures)
            _save(figure, output / name)
        written.append(name)
    if panels:
        with _quiet_figure() as figure:
            _training(figure, panels)
            _save(figure, output / "training.png")
        written.append("training.png")
    return written


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


@contextlib.contextmanager
def _quiet_figure() -> Iterator[Figure]:
    """A figure outside pyplot: nothing global changes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # labels in scripts without a font
        yield Figure(layout="constrained")


def _kept_neurons(figure: Figure, figures: Mapping[str, Any]) -> None:
    owner, names = owners(figures)
    layers = figures["layers"]
    shares = [
        [kept / layer["neurons"] for kept, layer in zip(row, layers, strict=True)] for row in figures["kept_per_layer"]
    ]
    figure.set_size_inches(max(6.0, 2.6 + 0.2 * len(layers)), max(3.6, 2.4 + _row_height(len(names)) * len(names)))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_title(f"Neurons that each {owner[:-1]} keeps")
    axes.set_ylabel(owner[:-1])
    axes.set_xlabel("layer, in forward order")
    _name_rows(axes.yaxis, names, _row_height(len(names)))
    axes.set_xticks(range(len(layers)), short_layers(figures), rotation=90, fontsize=7)
    _colour_bar(figure, image, axes, "neurons kept (share of the layer)")


def _overlap(figure: Figure, figures: Mapping[str, Any]) -> None:
    owner, names = owners(figures)
    side = max(3.4, _row_height(len(names)) * len(names))
    figure.set_size_inches(side + 2.9, side + 1.8)
    axes = figure.add_subplot()
    image = axes.imshow(figures["overlap"], cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"Neurons that {owner} share")
    _name_rows(axes.yaxis, names, _row_height(len(names)))
    _name_rows(axes.xaxis, names, _row_height(len(names)))
    axes.tick_params(axis="x", labelrotation=90)
    if len(names) <= 12:
        for y, row in enumerate(figures["overlap"]):
            for x, value in enumerate(row):
                colour = "white" if value < 0.5 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    _colour_bar(figure, image, axes, "overlap (Jaccard index)")


def _accuracy_size(figure: Figure, figures: Mapping[str, Any]) -> None:
    """Every module that has an accuracy; without pairs, what the module of all labels makes of single ones."""
    owner, names = owners(figures)
    figure.set_size_inches(6.4, 4.4)
    axes = figure.add_subplot()
    has_pairs = any(len(module[owner]) == 2 for module in figures["modules"])
    one = "one label (recall in the module of all)" if owner == "labels" else "module of one group"
    kinds = {len(names): f"module of all {owner}", 2: f"module of two {owner}", 1: one}
    for number, (size, kind) in enumerate(kinds.items()):
        score = "recall" if size == 1 and owner == "labels" else "accuracy"
        points = [
            (module["parameter_retention"], module[score])
            for module in figures["modules"]
            if len(module[owner]) == size and module.get(score) is not None
        ]
        if points and not (score == "recall" and has_pairs):
            marker = {"color": OKABE_ITO[number], "marker": MARKERS[number], "s": 60 if size == len(names) else 18}
            axes.scatter(*zip(*points, strict=True), **marker, label=kind, alpha=0.8, linewidths=0)
    axes.axhline(figures["evaluation"]["modular_accuracy"], color="0.45", linestyle="--", label="modular model, uncut")
    axes.set_title("Accuracy and size of modules")
    axes.set_xlabel("parameters kept (% of the model)")
    axes.set_ylabel("accuracy on their own samples (%)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _training(figure: Figure, panels: Sequence[Mapping[str, Any]]) -> None:
    figure.set_size_inches(4.6 * len(panels), 4.6)
    figure.suptitle("Training", fontweight="bold")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, series in enumerate(panel["series"]):
            axes.plot(
                *zip(*series["points"], strict=True),
                color=OKABE_ITO[number % len(OKABE_ITO)],
                linestyle=("-", "--", ":")[number // len(OKABE_ITO) % 3],
                marker=MARKERS[number % len(MARKERS)] if len(series["points"]) <= 40 else None,
                markersize=3,
                label=series["name"],
            )
        axes.set_title(panel["title"])
        axes.set_xlabel(panel["x_label"])
        axes.set_ylabel(panel["y_label"])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def owners(figures: Mapping[str, Any]) -> tuple[str, list[str]]:
    """`"labels"` or `"groups"`, and their names, short enough for a picture."""
    owner = "labels" if figures["grouped_by"] is None else "groups"
    return owner, [_short(" ".join(str(name).split())) for name in figures[owner]]


def short_layers(figures: Mapping[str, Any]) -> list[str]:
    """The names of the layers without what all have in common."""
    names = [layer["name"].split(".") for layer in figures["layers"]]
    common = 0
    while len(names) > 1 and all(len(name) > common + 1 and name[common] == names[0][common] for name in names):
        common += 1
    return [".".join(name[common:]) for name in names]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _row_height(count: int) -> float:
    """Inches per label."""
    return 0.32 if count <= 20 else 0.2 if count <= 40 else 0.13


def _name_rows(axis: Any, names: Sequence[str], height: float) -> None:
    axis.set_ticks(range(len(names)), list(names), fontsize=min(9, height * 72 * 0.75))


def _colour_bar(figure: Figure, image: Any, axes: Axes, text: str) -> None:
    figure.colorbar(image, ax=axes, label=text, shrink=min(1.0, 4 / axes.figure.get_size_inches()[1] + 0.2))
