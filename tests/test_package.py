# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The house plan: a file imports from lower floors only; every public name is documented; nothing prints."""

import ast
import sys
from pathlib import Path

import pytest

import nemo_hf


FLOORS = [
    {"errors", "config", "distributed", "labels", "groups", "slim", "gating", "files"},
    {
        "metrics",
        "architectures",
        "layers",
        "objectives",
        "slicing",
        "collection",
        "readme",
        "remote",
        "reservoir",
        "task_data",
        "cli_output",
    },
    {"families", "heads", "resolution", "training_args", "module_masks", "model_card", "checkpoints", "replacing"},
    {"maskable", "sampler", "schedules", "term_averages"},
    {"cutting", "masking"},
    {"stock", "statistics", "mask_learning", "auto"},
    {"extraction", "trainer", "tasks", "hub", "inspection", "report_plots"},
    {"demo", "report_data"},
    {"report"},
    {"cli"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(Path(nemo_hf.__file__).parent.glob("*.py"))


def imported(tree):
    """Names of the files of the package that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module.split(".")[0]] if node.module else (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "nemo_hf":
            yield from node.module.split(".")[1:2] or (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nemo_hf."))


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "__init__"], ids=lambda file: file.stem)
def test_a_file_imports_from_lower_floors_only(file):
    assert file.stem in FLOOR_OF, "a new file needs a floor"
    tree = ast.parse(file.read_text())
    # A public name of the package itself: `__init__` imports all files but those of the top floor.
    top = len(FLOORS) - 1
    floors = {name: FLOOR_OF.get(name, top - 1) for name in imported(tree) if name != "errors"}
    above = {name for name, floor in floors.items() if floor >= FLOOR_OF[file.stem]}
    assert above == set()


def test_slim_travels_alone():
    tree = ast.parse((Path(nemo_hf.__file__).parent / "slim.py").read_text())
    optional = [node for node in tree.body if isinstance(node, ast.Try)]
    assert {name for node in optional for name in imported(node)} == {"errors"}  # where nemo_hf is installed
    tree.body = [node for node in tree.body if node not in optional]
    assert set(imported(tree)) == set()
    outside = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert outside <= {"torch", "transformers", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", nemo_hf.__all__)
def test_public_names_are_documented(name):
    documented = getattr(nemo_hf, name).__doc__
    assert documented
    assert not documented.startswith(f"{name}(")  # what dataclasses write by themselves


def test_only_the_command_line_prints():
    for file in FILES:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert file.stem in ("cli", "cli_output") or prints == [], file.name
