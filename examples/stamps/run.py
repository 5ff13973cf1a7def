#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Trains detectors and segmenters on drawn scenes, by backbone and seed: what is not finished. See docs/stamps.md."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import torch

    from groupmamba.training.command import check_packages
    from groupmamba.training.option_table import number
    from groupmamba_ext._command import CommandError, run_command
except ImportError as problem:
    sys.exit(f"run.py: needs this project installed: pip install '.[train]' ({problem})")

from stamps.runs import BACKBONES, FINISHED, TASKS, Run, Settings, all_runs, arguments, write_finished  # noqa: E402

QUICK = {"steps": 2, "batch": 2, "size": 64, "workers": 0}
PAUSE, PATIENCE = 0.2, 60.0  # seconds: between looks at the runs, and for a run to stop by itself


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    whole, rate = number(1, whole=True), number(0, above=True)
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="what draw.py has drawn")
    parser.add_argument("--output", type=Path, required=True, metavar="RUNS", help="folder of the runs")
    parser.add_argument("--minutes", type=rate, metavar="X", help="stop cleanly after so long; start again to go on")
    parser.add_argument("--jobs", type=whole, default=1, metavar="N", help="runs at once, on one GPU [1]")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="default: both")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES[:2]), help="default: two")
    parser.add_argument("--seeds", type=whole, default=3, metavar="N", help="of each [3]")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="two steps each, of small images: to try the program")
    for field in dataclasses.fields(Settings):
        if field.name in ("steps", "batch", "size", "workers"):
            parser.add_argument(f"--{field.name}", type=number(0, whole=True), metavar="N", help=f"[{field.default}]")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line says, and defaults."""
    given = {name: getattr(args, name) for name in QUICK if getattr(args, name) is not None}
    return Settings(**{**(QUICK if args.quick else {}), **given})  # type: ignore[arg-type]


def facts() -> dict[str, Any]:
    """Of the machine, for the report."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def start(run: Run, settings: Settings, args: argparse.Namespace) -> subprocess.Popen:
    """A process that trains; what it says goes into RUNS/NAME.log."""
    argv = [sys.executable, "-m", "groupmamba", *arguments(run, settings, args.data, args.output)]
    if args.device is not None:
        argv += ["--device", args.device]
    with open(args.output / f"{run.name}.log", "a") as log:
        return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)


def stop(running: dict[Run, subprocess.Popen]) -> None:
    """Ends them; each goes on from its last checkpoint the next time."""
    for process in running.values():
        process.send_signal(signal.SIGINT)
    for process in running.values():
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    args = parse(argv)
    return run_command("run.py", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    """Trains what is not finished; 0, also where the time is over before.

    Raises:
        CommandError: a run could not be trained.
    """
    check_packages(("segmentation_models_pytorch", "torchmetrics", "pycocotools"))
    settings, end = settings_of(args), time.monotonic() + 60 * (args.minutes or 1e9)
    args.output.mkdir(parents=True, exist_ok=True)
    runs = all_runs(args.tasks, args.backbones, args.seeds)
    left = [run for run in runs if not (args.output / run.name / FINISHED).is_file()]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished", flush=True)
    running: dict[Run, subprocess.Popen] = {}
    shared = min(args.jobs, len(left)) > 1
    try:
        while (left or running) and time.monotonic() < end:
            while left and len(running) < args.jobs:
                running[left[0]] = start(left[0], settings, args)
                left.pop(0)
            for run, process in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[run]
                log = args.output / f"{run.name}.log"
                if status:
                    lines = log.read_text().splitlines()
                    raise CommandError(f"{run.name} ended with status {status}: {lines[-1] if lines else log}")
                write_finished(run, settings, args.output / run.name, {**facts(), "shared": shared})
                print(f"{run.name} is finished", flush=True)
            time.sleep(PAUSE)
    finally:
        stop(running)
    if left or running:
        print(f"{len(left) + len(running)} runs are left: start again to go on", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
