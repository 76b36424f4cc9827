# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Draws `how_it_works.png`: train, count, cut, load. Run as `python docs/make_figure.py`."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle


# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"cat": "#0072B2", "dog": "#E69F00", "bird": "#009E73"}
SHARED, INK, QUIET, LINE, PANEL, CLOSED = "#8A8F98", "#1F2933", "#52606D", "#C3CAD3", "#FFFFFF", "#EEF1F4"
BACKGROUND = "#F7F8FA"
WIDTH, HEIGHT, DPI = 16.0, 6.2, 100

# One entry per hidden neuron, by layer: the labels that use it.
NEURONS = [
    [("cat",), ("dog",), ("cat", "dog", "bird"), ("bird",), ("dog",), ("cat",)],
    [("bird",), ("cat",), ("dog",), ("cat", "dog", "bird"), ("bird",), ("dog",)],
]
LABELS = list(COLOURS)
MIDDLE = 3.05  # of the drawings in the cards, which the arrows share


def colour(uses: tuple[str, ...]) -> str:
    """A label's own colour, or grey for a neuron that several labels share."""
    return COLOURS[uses[0]] if len(uses) == 1 else SHARED


def panel(axes: Axes, left: float, width: float, step: int, title: str, caption: str) -> None:
    """A white card with a numbered title on top and a caption below."""
    axes.add_patch(
        FancyBboxPatch(
            (left, 0.3), width, 5.6, boxstyle="round,pad=0,rounding_size=0.14", facecolor=PANEL, edgecolor=LINE, lw=1.4
        )
    )
    axes.add_patch(Circle((left + 0.42, 5.42), 0.24, facecolor=INK, edgecolor="none"))
    axes.text(left + 0.42, 5.41, str(step), color="white", fontsize=16, weight="bold", ha="center", va="center")
    axes.text(left + 0.8, 5.41, title, color=INK, fontsize=19, weight="bold", va="center")
    axes.text(left + width / 2, 0.72, caption, color=QUIET, fontsize=15, ha="center", va="center")


def network(
    axes: Axes, columns: list[float], layers: list[list[tuple[str, ...]]], middle: float, gap: float, radius: float
) -> list[float]:
    """Layers of neurons, neighbouring layers fully connected; returns the heights of the last layer."""
    heights = [[middle + gap * ((len(layer) - 1) / 2 - i) for i in range(len(layer))] for layer in layers]
    for k in range(len(layers) - 1):
        for y in heights[k]:
            for z in heights[k + 1]:
                axes.plot(columns[k : k + 2], [y, z], color=LINE, lw=0.9, zorder=1)
    for x, ys, layer in zip(columns, heights, layers, strict=True):
        for y, uses in zip(ys, layer, strict=True):
            face = colour(uses) if uses else PANEL
            axes.add_patch(
                Circle((x, y), radius, facecolor=face, edgecolor="white" if uses else SHARED, lw=1.4, zorder=2)
            )
    return heights[-1]


def draw_parent(axes: Axes, left: float) -> None:
    """The trained network: inputs, two hidden layers with neurons coloured by label, one output per label."""
    columns = [left + 0.5, left + 1.35, left + 2.2, left + 3.05]
    layers = [[(), (), ()], *NEURONS, [(label,) for label in LABELS]]
    heights = network(axes, columns, layers, MIDDLE + 0.15, 0.53, 0.19)
    for label, height in zip(LABELS, heights, strict=True):
        axes.text(left + 3.34, height, label, color=INK, fontsize=15, va="center")
    axes.add_patch(Circle((left + 0.86, 1.33), 0.1, facecolor=SHARED, edgecolor="none"))
    axes.text(left + 1.06, 1.32, "shared by several labels", color=QUIET, fontsize=14, va="center")


def draw_masks(axes: Axes, left: float) -> None:
    """One row per label: how often its samples open each neuron; outlined where the mask keeps it."""
    rng = np.random.default_rng(3)
    neurons = [uses for layer in NEURONS for uses in layer]
    cell, start = 0.235, left + 0.72
    axes.text(start + 6 * cell, MIDDLE + 1.47, "neurons", color=QUIET, fontsize=14, ha="center", va="center")
    for row, label in enumerate(LABELS):
        y = MIDDLE + 0.67 - row * 0.78
        axes.text(start - 0.14, y + 0.27, label, color=INK, fontsize=15, ha="right", va="center")
        for column, uses in enumerate(neurons):
            x = start + column * cell
            share = rng.uniform(0.92, 1.0) if label in uses else rng.uniform(0.0, 0.22)
            face = colour(uses) if label in uses else SHARED
            axes.add_patch(Rectangle((x, y), cell, 0.54, facecolor=CLOSED, edgecolor="none"))
            axes.add_patch(Rectangle((x, y), cell, 0.54, facecolor=face, alpha=share, edgecolor="none"))
            axes.add_patch(Rectangle((x, y), cell, 0.54, facecolor="none", edgecolor="white", lw=1.6))
    axes.text(
        left + 1.95, 1.5, "kept: open for ≥ 90 %\nof a label's samples", color=QUIET, fontsize=14,
        ha="center", va="center", linespacing=1.35,
    )  # fmt: skip


def draw_modules(axes: Axes, left: float) -> None:
    """The modules of {cat} and of {cat, dog}: only the neurons in the union of their masks, dense."""
    for labels, middle, name in ((("cat",), MIDDLE + 1.12, "{cat}"), (("cat", "dog"), MIDDLE - 0.78, "{cat, dog}")):
        kept = [[uses for uses in layer if set(uses) & set(labels)] for layer in NEURONS]
        layers = [[(), (), ()], *kept, [(label,) for label in labels]]
        columns = [left + 0.42 + 0.56 * k for k in range(4)]
        network(axes, columns, layers, middle, 0.38, 0.14)
        axes.text(left + 2.4, middle, name, color=INK, fontsize=15, va="center")


def draw_loading(axes: Axes, left: float) -> None:
    """What a user of the module writes."""
    name = ('  "cat-dog")', COLOURS["cat"])
    code_block(axes, left, MIDDLE + 0.15, (("AutoModelFor…", INK), (".from_pretrained(", INK), name))
    code_block(axes, left, MIDDLE - 1.5, (("pipeline(task,", INK), name))


def code_block(axes: Axes, left: float, bottom: float, lines: tuple[tuple[str, str], ...]) -> None:
    """Lines of code on a tinted card."""
    height = 0.39 * len(lines) + 0.3
    axes.add_patch(
        FancyBboxPatch(
            (left + 0.25, bottom),
            2.8,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=CLOSED,
            edgecolor="none",
        )
    )
    for row, (text, ink) in enumerate(lines):
        y = bottom + height - 0.345 - 0.39 * row
        axes.text(left + 0.45, y, text, color=ink, fontsize=15, family="monospace", va="center")


def arrow(axes: Axes, left: float, right: float) -> None:
    """From one card to the next."""
    axes.add_patch(
        FancyArrowPatch(
            (left, MIDDLE),
            (right, MIDDLE),
            arrowstyle="-|>",
            mutation_scale=20,
            lw=2.4,
            color=INK,
            shrinkA=0,
            shrinkB=0,
        )
    )


def main() -> None:
    """Draw the four cards and write the picture beside this script."""
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=BACKGROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")
    cards = (
        (3.9, "Train", "ModularTrainer", draw_parent),
        (3.8, "Count", "collect_statistics", draw_masks),
        (3.8, "Cut", "extract_module", draw_modules),
        (3.3, "Use", "no masks, no parent", draw_loading),
    )
    gap = 0.33
    left = (WIDTH - sum(card[0] for card in cards) - gap * 3) / 2
    for step, (width, title, caption, draw) in enumerate(cards, start=1):
        panel(axes, left, width, step, title, caption)
        draw(axes, left)
        if step < len(cards):
            arrow(axes, left + width + 0.03, left + width + gap - 0.02)
        left += width + gap
    figure.savefig(Path(__file__).with_name("how_it_works.png"), facecolor=BACKGROUND)


if __name__ == "__main__":
    main()
