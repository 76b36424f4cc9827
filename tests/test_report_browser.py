# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
The page of a report in a real browser: slow, `pytest -m slow tests/test_report_browser.py`. Needs Debian's chromium
(`apt-get install chromium`) and playwright (`pip install playwright`, which uses that chromium); skipped without.
"""

import math
import shutil

import pytest
from models import LABELS
from test_report import HOSTILE, MANY, batches, checkpoint

from nemo_hf import NeuronStatistics, write_report


pytestmark = pytest.mark.slow


def expected_accuracy(evaluation, members):
    """The formula of docs/report.md."""
    count = len(evaluation["samples"])
    share = (len(members) - 2) / (count - 2)
    weighted = 0.0
    for a in members:
        others = [b for b in members if b != a]
        few = everything = 1 - sum(evaluation["errors_all"][a][b] for b in others)
        if evaluation["errors_pairs"] is not None:
            few = math.prod(1 - evaluation["errors_pairs"][a][b] for b in others)
        weighted += evaluation["samples"][a] * ((1 - share) * few + share * everything)
    return weighted / sum(evaluation["samples"][a] for a in members)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    executable = shutil.which("chromium") or pytest.skip("apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that writes a report and opens it; console, page errors and requests must stay silent."""
    noise = []

    def open_report(names, scheme="light", **options):
        checkpoint(tmp_path / "model", names, **options)
        data = None if options else batches(len(names), size=len(names))
        figures = write_report(tmp_path / "model", tmp_path / "report", data)
        address = (tmp_path / "report" / "report.html").as_uri()
        tab = browser.new_page(color_scheme=scheme)
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("request", lambda request: request.url == address or noise.append(request.url))
        tab.goto(address)
        return tab, figures

    yield open_report
    assert noise == []


def test_browser_sorts_and_filters_the_table(opened):
    tab, figures = opened(LABELS)
    column = [f"{100 * module['neuron_retention']:.1f} %" for module in figures["modules"]]
    read = lambda: tab.locator("#modules tbody td:nth-child(2)").all_text_contents()  # noqa: E731
    assert read() == column
    head = tab.get_by_role("button", name="neurons kept")
    head.press("Enter")
    assert read() == sorted(column, key=lambda text: -float(text[:-2]))
    assert tab.locator("#modules th").nth(1).get_attribute("aria-sort") == "descending"
    head.press("Enter")
    assert read() == sorted(column, key=lambda text: float(text[:-2]))
    tab.locator("#table-kind").select_option("two")
    tab.locator("#table-filter").fill("elk")
    assert len(read()) == 4


@pytest.mark.parametrize("names", [LABELS, HOSTILE, MANY], ids=["five", "hostile", "hundred"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_picks_labels(opened, names, scheme, tmp_path):
    tab, figures = opened(names, scheme)
    masks = NeuronStatistics.from_pretrained(tmp_path / "model").module_masks()
    boxes = tab.locator("#picks input")
    assert boxes.count() == len(names)
    for i in (0, 2, 4):
        boxes.nth(i).focus()
        tab.keyboard.press("Space")
    union = masks.union([names[i] for i in (0, 2, 4)])
    shown = tab.locator("#union .result").all_inner_texts()
    assert f"{100 * union.retention:.1f} %" in shown[0]
    assert f"{sum(int(mask.sum()) for mask in union.values()):,} of {figures['neurons']:,}: exact" in shown[0]
    assert "estimate" in shown[1]
    assert "estimate, not a measurement" in shown[2]
    assert f"≈ {100 * expected_accuracy(figures['evaluation'], [0, 2, 4]):.1f} %" in shown[2]
    boxes.nth(4).uncheck()
    module = next((module for module in figures["modules"] if module["labels"] == [names[0], names[2]]), None)
    if module is not None:
        shown = tab.locator("#union .result").all_inner_texts()
        assert f"{module['parameters']:,}: exact" in shown[1]
        assert f"{100 * module['accuracy']:.1f} %" in shown[2]
    assert tab.title() == f"Modules of {tmp_path / 'model'}"  # no label was run as a script


def test_browser_heat_map_by_mouse_and_keyboard(opened):
    tab, figures = opened(LABELS)
    canvas, readout = tab.locator("#overlap canvas"), tab.locator("#overlap .readout")
    canvas.focus()
    tab.keyboard.press("ArrowRight")
    assert readout.inner_text() == f"ant and bee: overlap {figures['overlap'][0][1]:.2f}"
    tab.keyboard.press("Enter")
    assert tab.locator("#picks input:checked").count() == 2
    size = canvas.bounding_box()
    canvas.hover(position={"x": size["width"] - 15, "y": size["height"] - 15})
    assert readout.inner_text() == "elk and elk: overlap 1.00"
    tab.locator("#overlap-sorted").check()
    assert tab.locator("#overlap canvas").count() == 1
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_browser_says_groups(opened):
    tab, _ = opened(LABELS, grouped_by="domain", groups=["news", "mail", "chat"])
    assert tab.get_by_role("heading", name="Pick groups").is_visible()
    tab.locator("#picks input").nth(1).check()
    assert "--groups 'mail'" in tab.locator("#command").inner_text()
    assert not tab.locator("#scatter-section").is_visible()  # no accuracies
