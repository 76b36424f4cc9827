# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Pages that scripts write are up to date."""

import importlib
from pathlib import Path

import models
import pytest


@pytest.fixture
def make_families(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    return importlib.import_module("make_families")


def test_the_page_of_families_is_up_to_date(make_families):
    assert make_families.page() == make_families.PAGE.read_text(encoding="utf-8"), "run python docs/make_families.py"


def test_the_page_of_families_shows_models_of_the_tests(make_families):
    tested = [(case.model_class.__name__, case.options) for case in models.CASES]
    shown = [(tiny.name, tiny.options) for tinies in make_families.GROUPS.values() for tiny in tinies]
    assert [tiny for tiny in shown if tiny not in tested] == []
