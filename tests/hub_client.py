# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""A Python process that talks to the test server: huggingface_hub reads where the Hub is when it is imported."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

from hub_server import TOKEN


LOOP = """
import contextlib, io, json, sys, time
import torch, transformers
import nemo_hf
from nemo_hf import cli
torch.set_num_threads(1)
time.sleep = lambda seconds: None  # between the retries of huggingface_hub
names = dict(globals())
answers, sys.stdout = sys.stdout, io.StringIO()
for line in sys.stdin:
    answer, out, err = {}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            names.pop("result", None)
            exec(json.loads(line), names)
            answer["result"] = names.get("result")
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer.update(error=f"{type(error).__name__}: {error}", kinds=kinds)
    print(json.dumps({**answer, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)
"""


SETUP = """
from huggingface_hub import HfApi
from models import VIT, module_masks
from processors import image_processor
from nemo_hf import extract_module, list_modules, push_modules, save_module
from transformers import AutoModelForImageClassification as Auto

parent = VIT.masked()
masks = module_masks(parent)
processor = image_processor()
inputs = VIT.inputs()
cat, dog, both = (extract_module(parent, masks, labels) for labels in (["cat"], ["dog"], ["cat", "dog"]))

def same(model, other):
    with torch.no_grad():
        return torch.equal(model(**inputs).logits, other(**inputs).logits)
"""


class HubClient:
    """
    Runs code in the other process. There `transformers`, `nemo_hf`, `torch` and what was defined before are known;
    what the code puts into `result` comes back, or `error`.
    """

    def __init__(self, endpoint, folder):
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        here = str(Path(__file__).parent)
        environment = {
            **kept,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "huggingface"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(
                [here, os.path.join(here, "../docs"), *filter(None, [kept.get("PYTHONPATH")])]
            ),
        }
        self.errors = open(folder / "client.err", "w+")  # noqa: SIM115 (closed with the process)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP], env=environment, cwd=folder, text=True, bufsize=1, **pipes
        )

        self.run(SETUP)

    def __call__(self, code):
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(self.errors.read())
        return SimpleNamespace(**{"result": None, "error": None, "kinds": [], **json.loads(line)})

    def run(self, code):
        """The result of code that must not fail."""
        answer = self(code)
        assert answer.error is None, f"{answer.error}\n{answer.err}"
        return answer.result

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()
