#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Trains the ablation's arms on Fashion-MNIST: every run that is not yet finished in --output. See docs/ablation.md."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import torch

    from groupmamba.training.command import check_packages
    from groupmamba_ext._command import CommandError, gpu_usable, one_line, require_gpu, run_command
except ImportError as problem:
    sys.exit(f"run.py: needs this project installed: pip install '.[train]' ({problem})")

from ablation.arms import ARMS, QUICK, Run, Settings, arm_runs, large_runs, teacher_run  # noqa: E402
from ablation.results import Folder, failed  # noqa: E402

PARTS = ("arms", "large")
WAIT = 0.5  # seconds between looks at what other processes do


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    from groupmamba.training.option_table import number

    whole, positive = number(1, whole=True), number(0, above=True)
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="RUNS", help="folder of the runs; those in it are kept"
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="folder of the four idx files (Debian's, if installed)"
    )
    parser.add_argument(
        "--minutes", type=positive, metavar="X", help="stop cleanly after so long; start again to go on"
    )
    parser.add_argument(
        "--earlier", type=Path, metavar="JSON", help="file of report.py --json, whose runs count as finished"
    )
    parser.add_argument("--only", choices=PARTS, help="the arms alone, or the large model at rising rates alone")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="NAME", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--workers", type=whole, metavar="N", help="processes; default: one for each GPU")
    parser.add_argument("--quick", action="store_true", help="models in little, a few steps: to try the program")
    parser.add_argument("--epochs", type=whole, metavar="N", help=f"of each run of an arm ({Settings.epochs})")
    parser.add_argument("--batch", type=whole, metavar="N", help=f"images a step ({Settings.batch})")
    parser.add_argument("--lr", type=positive, metavar="X", help=f"highest learning rate of the arms ({Settings.lr:g})")
    parser.add_argument("--seeds", type=number(2, whole=True), metavar="N", help=f"of each arm ({Settings.seeds})")
    rates = " ".join(f"{rate:g}" for rate in Settings.rates)
    parser.add_argument("--rates", type=positive, nargs="+", metavar="X", help=f"of the large model ({rates})")
    parser.add_argument("--large-steps", type=whole, metavar="N", help=f"of the large model ({Settings.large_steps})")
    # Of another run.py: until when, and how many share the GPU.
    parser.add_argument("--worker", type=float, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rates is not None:
        args.rates = tuple(args.rates)
        if list(args.rates) != sorted(set(args.rates)):
            parser.error(f"argument --rates: must rise, got {' '.join(map(str, args.rates))}")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line says, and defaults."""
    names = ("epochs", "batch", "lr", "seeds", "rates", "large_steps")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(QUICK if args.quick else Settings(), **given)


def plan(folder: Folder, args: argparse.Namespace) -> list[Run]:
    """All runs that are known to be needed, finished or not, in the order in which they are begun.

    The large model comes first, since its next rate depends on how the one before ended. A run that needs what could
    not be made is left out.
    """
    settings = folder.settings
    runs: list[Run] = []
    if args.only != "arms":
        for rate in settings.rates:
            rung = list(large_runs(settings, rate))
            runs += rung
            plain = [run for run in rung if not run.needs_teacher]
            if not all(map(folder.done, plain)) or all(failed(folder.result(run)) for run in plain):
                break
    if args.only != "large":
        runs += arm_runs(settings, tuple(name for name in ARMS if args.arms is None or name in args.arms))
    if any(run.needs_teacher for run in runs):
        teacher = teacher_run(settings)
        lost = folder.error(teacher).exists()
        runs = [run for run in runs if not run.needs_teacher] if lost else [teacher, *runs]
    return runs


def pending(folder: Folder, args: argparse.Namespace) -> list[Run]:
    """Those of :func:`plan` that are neither finished nor given up."""
    return [run for run in plan(folder, args) if not folder.done(run) and not folder.error(run).exists()]


class Screen:
    """A progress bar of runs on a terminal; elsewhere a line a run."""

    def __init__(self, folder: Folder, args: argparse.Namespace):
        from tqdm import tqdm

        self.folder, self.args, self.began = folder, args, time.monotonic()
        self.shown = {run.name for run in plan(folder, args) if folder.done(run)}
        self.bar = tqdm(initial=len(self.shown), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.refresh()

    def say(self, text: str) -> None:
        if self.bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    def step(self, run: Run, progress: Any) -> None:
        """What the only worker does now."""
        loss = "not finite" if progress.loss is None else f"{progress.loss:.3f}"
        text = f"{run.name}, step {progress.step}/{progress.steps}: loss {loss}, {progress.accuracy:.2f}%"
        self.bar.set_postfix_str(text)

    def refresh(self) -> None:
        """Says what has been finished since the last call, by any process."""
        runs = plan(self.folder, self.args)
        self.bar.total = len(runs)
        for run in runs:
            if run.name in self.shown or not self.folder.done(run):
                continue
            self.shown.add(run.name)
            result = self.folder.result(run)
            text = (
                f"{run.name}: {result['accuracy']:.2f}%, {result['seconds']:.0f} s, {result['images_per_s']:,.0f} img/s"
            )
            if not result["graph"]:
                text += f", without a CUDA graph ({result['no_graph']})"
            if run.kind == "large":
                text += ", failed" if failed(result) else ", trains"
            self.say(f"[{len(self.shown)}/{len(runs)}, {time.monotonic() - self.began:.0f} s] {text}")
            self.bar.update()
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def work(
    folder: Folder,
    args: argparse.Namespace,
    device: torch.device,
    deadline: float,
    screen: Screen | None,
    sharing: int = 1,
) -> None:
    """Does runs until none is left to do or the time is over.

    Args:
        folder: of the runs.
        args: the command line.
        device: for all of them.
        deadline: by ``time.time()``.
        screen: told what is done, or None.
        sharing: how many processes the device serves.

    Raises:
        CommandError: the data can't be read, or a run has left the device unusable.
    """
    from ablation import fashion, trainer

    torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    source = fashion.find(args.data)
    data = trainer.Data(*(fashion.read(source, split, device) for split in ("train", "t10k")))
    if folder.settings.batch > len(data.train):
        raise CommandError(f"--batch {folder.settings.batch}: there are {len(data.train)} images")
    teacher: torch.nn.Module | None = None

    def do(run: Run) -> None:
        nonlocal teacher
        if run.needs_teacher and teacher is None:
            teacher = trainer.load_teacher(folder.settings, folder.teacher, device)
        knows = teacher if run.needs_teacher else None
        training = trainer.Training(run, folder.settings, data, knows, folder.checkpoint(run), sharing)
        result = training.fit(deadline, lambda progress: None if screen is None else screen.step(run, progress))
        if result is None:
            return
        if run.kind == "teacher":
            trainer.save_teacher(training.model, folder.teacher)
        folder.write(run, result)

    while time.time() < deadline and (left := pending(folder, args)):
        for run in left:
            if run.needs_teacher and not folder.done(teacher_run(folder.settings)):
                continue
            with folder.claim(run) as mine:
                if mine:
                    try:
                        do(run)
                    except (RuntimeError, ValueError, TypeError) as error:
                        folder.error(run).write_text(traceback.format_exc())
                        _check_device(device, run, error)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    break
        else:
            time.sleep(WAIT)  # others hold what is left, or make what it needs
        if screen is not None:
            screen.refresh()


def _check_device(device: torch.device, run: Run, error: Exception) -> None:
    """CommandError where the device can't be used any more after the error of a run."""
    print(f"run.py: {run.name} failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
    try:
        torch.ones((), device=device).item()
    except RuntimeError:
        raise CommandError(f"{run.name} left the GPU unusable: {one_line(error)}") from error


def watch(
    folder: Folder, args: argparse.Namespace, argv: Sequence[str], count: int, deadline: float, cuda: bool
) -> int:
    """Starts ``count`` workers, each with one GPU, and says what they finish; how many ended with an error."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [] if not cuda else visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    sharing = -(-count // max(len(gpus), 1))
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--worker", repr(deadline), str(sharing)]
    screen = Screen(folder, args)
    workers: list[subprocess.Popen] = []
    try:
        for i in range(count):
            more = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
            workers.append(subprocess.Popen(command, env={**os.environ, **more}))
        while any(worker.poll() is None for worker in workers):
            time.sleep(WAIT)
            screen.refresh()
        screen.refresh()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
        screen.close()
    return sum(worker.returncode != 0 for worker in workers)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    return run_command("run.py", lambda: command(args, given))


def command(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts workers, or is one; the exit status.

    Raises:
        CommandError: what was asked for can't be done.
    """
    check_packages()
    if args.device == "cuda":
        require_gpu()
    cuda = (args.device or ("cuda" if gpu_usable() else "cpu")) == "cuda"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    folder = Folder(args.output, settings_of(args))
    if args.earlier is not None and args.worker is None:
        folder.take(args.earlier)
    for run in plan(folder, args):
        if folder.done(run):
            folder.result(run)  # raises where it had other settings
    if args.worker is not None:
        work(folder, args, device, args.worker[0], None, int(args.worker[1]))
        return 0
    deadline = float("inf") if args.minutes is None else time.time() + 60 * args.minutes
    folder.forget_errors()
    count = args.workers or (torch.cuda.device_count() if cuda else 1)
    broken = 0
    if count > 1:
        broken = watch(folder, args, argv, count, deadline, cuda)
    else:
        screen = Screen(folder, args)
        try:
            work(folder, args, device, deadline, screen)
        finally:
            screen.close()
    left = pending(folder, args)
    errors = sorted(path.stem for path in folder.path.glob("*.error"))
    known = plan(folder, args)
    state = f"{sum(map(folder.done, known))} of {len(known)} runs are finished in {folder.path}"
    if errors or broken:
        raise CommandError(f"{state}; with an error ended {', '.join(errors) or f'{broken} processes'}")
    print(f"{state}{': start again to go on' if left else ''}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
