# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Pages that scripts write are up to date."""

import make_families


def test_the_page_of_families_is_up_to_date():
    assert make_families.page() == make_families.PAGE.read_text(encoding="utf-8"), "run python docs/make_families.py"
