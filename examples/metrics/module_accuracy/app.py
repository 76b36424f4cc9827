# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of the metric on the Hub. The usual widget cannot ask for `label_ids`."""

import json
from pathlib import Path

import evaluate
import gradio


metric = evaluate.load("module_accuracy.py")


def compute(predictions: str, references: str, label_ids: str) -> dict[str, float]:
    """The metric of lists in JSON."""
    return metric.compute(
        predictions=json.loads(predictions), references=json.loads(references), label_ids=json.loads(label_ids)
    )


page = gradio.Interface(
    fn=compute,
    inputs=[
        gradio.Textbox("[0, 1, 1, 0]", label="predictions: label ids of the module, or logits"),
        gradio.Textbox("[7, 3, 7, 5]", label="references: label ids of the parent"),
        gradio.Textbox("[7, 3]", label="label_ids: the parent's ids of the module's labels"),
    ],
    outputs=gradio.JSON(),
    title="Module accuracy",
    article=Path("README.md").read_text(encoding="utf-8").split("---\n", 2)[-1],
)
page.launch()
