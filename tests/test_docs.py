# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Pages that scripts write are up to date, and the snippets of pages that stand alone run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import make_families
import pytest


DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_families_is_up_to_date():
    assert make_families.page() == make_families.PAGE.read_text(encoding="utf-8"), "run python docs/make_families.py"


@pytest.mark.parametrize("page", ["api.md", "objectives.md"])
def test_snippets_run_in_their_order(page, tmp_path):
    """In a process and a folder of their own."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    script = tmp_path / "snippets.py"
    script.write_text("\n\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
