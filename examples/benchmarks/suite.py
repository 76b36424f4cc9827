# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Compare ways to get modules: the plain model, MwT, MODA, NeMo as published and nemo_hf, over models,
data sets and seeds. Every run is a process of its own; runs that are done are not repeated, so the same command goes
on where it was stopped. Writes results.json, results.md and plots.

Exit codes: 0 all runs are done, 1 a run failed, 75 the time limit came first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from methods import DEFAULT_METHODS, METHODS, ROW_RATE, Method
from recipes import DATASETS, SUITES, Row


# This process stays small: on Linux, what a process held counts into the peak memory of those that it starts.

UNFINISHED = 75
RUN_SCRIPT = Path(__file__).with_name("suite_run.py")


@dataclass
class PlannedRun:
    """
    A run and those whose results it starts from.

    Args:
        key (`tuple[str, str, int]`): row, method, seed.
        folder (`Path`): of its files.
        spec (`dict[str, Any]`): everything that determines its result, but for the place of the data.
        needs (`list[tuple[str, str, int]]`, *optional*): keys of other runs.
    """

    key: tuple[str, str, int]
    folder: Path
    spec: dict[str, Any]
    needs: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        row, method, seed = self.key
        return f"{row} {method} seed {seed}"

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists()

    def prepare(self) -> None:
        """Write the specification; refuse a folder with another one, whose results would get mixed up with these."""
        file = self.folder / "spec.json"
        text = json.dumps(self.spec, indent=1) + "\n"
        if file.exists() and file.read_text() != text:
            raise SystemExit(
                f"{self.folder} holds a run with other options. Take another --output_dir or --tag, or delete it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


class Plan:
    """
    The runs that were asked for and those that they need, in the order in which they start.

    Args:
        args (`argparse.Namespace`): the options.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rows = {name: self._recipe(row) for name, row in SUITES[args.suite].items()}
        self.methods = dict(METHODS)
        names = [self._tagged(name) for name in args.methods]
        self.runs: dict[tuple[str, str, int], PlannedRun] = {}
        for seed, row, method in itertools.product(args.seeds, args.rows or self.rows, names):
            self._add((row, method, seed))

    def _recipe(self, row: Row) -> Row:
        row = row.scaled(self.args.scale)
        limit = self.args.max_eval_samples
        return row if limit is None else replace(row, max_eval_samples=limit)

    def _tagged(self, name: str) -> str:
        """A method with overridden settings gets a name of its own."""
        overrides = {}
        for override in self.args.override:
            method, _, setting = override.partition(".")
            key, _, value = setting.partition("=")
            if method == name:
                overrides[key] = _parse(value)
        if not overrides:
            return name
        tagged = f"{name}@{self.args.tag}"
        method = METHODS[name]
        self.methods[tagged] = replace(method, settings={**method.settings, **overrides})
        return tagged

    def _add(self, key: tuple[str, str, int]) -> None:
        if key in self.runs:
            return
        row, name, seed = key
        method = self.methods[name]
        needs = {needed: (row, needed, seed) for needed in method.needs}
        teacher = self.rows[row].teacher
        if teacher is not None and method.kind in ("plain", "modular"):
            needs["teacher"] = (teacher, "standard", seed)
        for needed in needs.values():
            self._add(needed)
        folder = self._folder(key)
        places = {needed: os.path.relpath(self._folder(other), folder) for needed, other in needs.items()}
        self.runs[key] = PlannedRun(key, folder, self._spec(key, method, places), list(needs.values()))

    def _folder(self, key: tuple[str, str, int]) -> Path:
        row, method, seed = key
        return self.args.output_dir / "runs" / row.replace("/", "-") / method / f"seed{seed}"

    def _spec(self, key: tuple[str, str, int], method: Method, needs: dict[str, str]) -> dict[str, Any]:
        row, name, seed = key
        recipe = asdict(self.rows[row])
        base = name.partition("@")[0]
        # What was overridden wins over what the row says of the method.
        overridden = {k: v for k, v in method.settings.items() if METHODS[base].settings.get(k, ...) != v}
        settings = {**METHODS[base].settings, **recipe.pop("settings").get(base, {}), **overridden}
        settings = {k: recipe["learning_rate"] if v == ROW_RATE else v for k, v in settings.items()}
        return {
            "suite": self.args.suite,
            "row": row,
            "method": name,
            "kind": method.kind,
            "seed": seed,
            "recipe": recipe,
            "settings": settings,
            "gates": list(method.gates),
            "needs": needs,
            "validation": self.args.validation,
            "scale": self.args.scale,
            "num_subsets": self.args.num_subsets,
            "finetune_epochs": self.args.finetune_epochs,
        }


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text == "None" else text


class Runner:
    """
    Starts runs, some at a time, each after those that it needs.

    Args:
        runs (`dict[tuple[str, str, int], PlannedRun]`): the plan.
        args (`argparse.Namespace`): the options.
    """

    def __init__(self, runs: dict[tuple[str, str, int], PlannedRun], args: argparse.Namespace):
        self.runs, self.args = runs, args
        self.places = {**DATASETS, **dict(place.split("=", 1) for place in args.data)}
        self.deadline = time.monotonic() + args.time_limit
        self.failed: dict[tuple[str, str, int], str] = {}
        self.started = 0

    def run(self) -> int:
        """All that is missing; the exit code."""
        for run in self.runs.values():
            run.prepare()
        waiting = [run for run in self.runs.values() if not run.done]
        active: dict[Future[str], PlannedRun] = {}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            while waiting or active:
                for run in list(waiting):
                    lost = [self.runs[key].name for key in run.needs if key in self.failed]
                    if lost:
                        self.failed[run.key] = f"needs {lost[0]}"
                    elif len(active) >= self.args.jobs or not self._may_start(run):
                        continue
                    else:
                        active[pool.submit(self._one, run)] = run
                    waiting.remove(run)
                if not active:
                    break
                finished, _ = wait(active, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._report(active.pop(future), future.result())
        return self._summary()

    def _may_start(self, run: PlannedRun) -> bool:
        return time.monotonic() < self.deadline and all(self.runs[key].done for key in run.needs)

    def _one(self, run: PlannedRun) -> str:
        """Empty if all went well, or what went wrong."""
        self.started += 1
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [
            sys.executable,
            str(RUN_SCRIPT),
            str(run.folder),
            "--dataset",
            self.places[run.spec["recipe"]["dataset"]],
        ]
        if self.args.time_limit != float("inf"):
            command += ["--time_limit", str(max(1.0, self.deadline - time.monotonic()))]
        log = run.folder / "log.txt"
        start = time.monotonic()
        with log.open("a") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
        if code == 0:
            print(f"{run.name}: {time.monotonic() - start:.0f} s", flush=True)
            return ""
        if code == UNFINISHED:
            print(f"{run.name}: not done yet", flush=True)
            return ""
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return f"exit code {code}, {last} ({log})"

    def _report(self, run: PlannedRun, error: str) -> None:
        if error:
            self.failed[run.key] = error
            print(f"{run.name}: FAILED", flush=True)

    def _summary(self) -> int:
        for key, error in self.failed.items():
            print(f"Failed: {self.runs[key].name}: {error}")
        missing = [run for run in self.runs.values() if not run.done and run.key not in self.failed]
        print(f"{self.started} started, {len(self.failed)} failed, {len(missing)} left for the next call.")
        return 1 if self.failed else UNFINISHED if missing else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=SUITES, default="small", help="small: two cores; paper: one GPU (default: %(default)s)")
    add("--output_dir", type=Path, required=True, help="folder for runs, tables and plots")
    add("--seeds", type=int, nargs="+", default=[0], help="of weights and order of samples (default: 0)")
    add("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--rows", nargs="+", metavar="ROW", help="such as fashion_mnist/vit; all by default")
    add("--jobs", type=int, default=1, help="runs at a time; they share the cores (default: %(default)s)")
    add("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="data sets that are elsewhere than on the Hub")
    add("--num_subsets", type=int, default=20, help="label subsets of every size (default: %(default)s)")
    add("--max_eval_samples", type=int, help="measure modules on so many test samples, an equal share of every label")
    add("--finetune_epochs", type=float, default=0, help="also fine-tune a few modules so long (default: not)")
    add("--validation", action="store_true", help="evaluate on held-out training samples: to choose settings")
    add("--override", nargs="+", action="extend", default=[], metavar="METHOD.SETTING=VALUE", help="needs --tag")
    add("--tag", help="the name of overridden settings: nemo_hf becomes nemo_hf@TAG")
    add("--scale", type=float, default=1.0, help="with so small a share of everything, to try it (default: 1)")
    add("--time_limit", type=float, default=float("inf"), help="stop after so many seconds; the same command goes on")
    add("--report_only", action="store_true", help="write tables and plots of the runs that are there")
    args = parser.parse_args()
    unknown = set(args.rows or []) - set(SUITES[args.suite])
    if unknown:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; {args.suite} has {', '.join(SUITES[args.suite])}")
    if bool(args.override) != bool(args.tag):
        parser.error("--override and --tag, the name of the settings in the tables, go together")
    for override in args.override:
        method, _, setting = override.partition(".")
        if method not in args.methods or "=" not in setting:
            parser.error(
                f"--override takes METHOD.SETTING=VALUE with one of {', '.join(args.methods)}; got {override}"
            )
    for place in args.data:
        if place.partition("=")[0] not in DATASETS or "=" not in place:
            parser.error(f"--data takes NAME=FOLDER of {', '.join(DATASETS)}; got {place}")
    return args


def main() -> None:
    args = arguments()
    code = 0 if args.report_only else Runner(Plan(args).runs, args).run()
    from suite_report import write_report  # matplotlib is large

    write_report(args.output_dir)
    sys.exit(code)


if __name__ == "__main__":
    main()
