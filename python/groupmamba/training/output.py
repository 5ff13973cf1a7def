# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its folder and shows on the terminal."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from groupmamba.training.option_table import Command
from groupmamba.training.options import plain

SUMMARY, STEPS, ARGS, CURVES = "summary.csv", "steps.csv", "args.yaml", "curves.png"
STEP_COLUMNS = ("step", "epoch", "loss", "lr")
_NOT_KEPT = ("config", "resume", "output")  # what args.yaml leaves out: where a run is, not what it is


def summary_columns(metrics: Sequence[str]) -> tuple[str, ...]:
    """Of summary.csv, with those of the task's metrics."""
    return ("epoch", "step", "train_loss", *metrics, "lr", "images_per_s", "seconds", "bad_images")


class Table:
    """A CSV file that grows by rows; the first column counts up."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns

    def begin(self, before: int) -> None:
        """Keeps the rows whose first column is less than ``before``; what a killed process wrote beyond is dropped."""
        rows = [row for row in self.rows() if int(row[self.columns[0]]) < before]
        beside = self.path.with_name(f".{self.path.name}")
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerows(rows)

    def rows(self) -> list[dict[str, str]]:
        """Complete rows; a line that a killed process began is none."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = csv.DictReader(lines)
        return [row for row in rows if None not in row.values() and (row[self.columns[0]] or "").isdecimal()]


def write_args(run: Path, args: argparse.Namespace, command: Command, total_batch: int) -> None:
    """args.yaml: what ``--config`` needs to train the same again; beside options as a comment the total batch."""
    import yaml

    values = {name: getattr(args, name) for name in ("data", *command.options) if name not in _NOT_KEPT}
    values = {name: plain(value) for name, value in values.items() if value is not None}
    text = f"# groupmamba {command.name} --config {ARGS}; {total_batch} images a step in all\n"
    text += yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    beside = run / f".{ARGS}"
    beside.write_text(text)
    os.replace(beside, run / ARGS)


class Panel(NamedTuple):
    """One plot of curves.png: its title, and by columns of summary.csv what their lines are called."""

    title: str
    lines: Mapping[str, str]


def draw_curves(run: Path, rows: Sequence[Mapping[str, str]], panels: Sequence[Panel]) -> None:
    """curves.png: loss and metrics by epoch; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for column, label in lines.items():
            points = [(int(row["epoch"]) + 1, float(row[column])) for row in rows if row[column]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", label=label)
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(run / f".{CURVES}", format="png", dpi=120)
    os.replace(run / f".{CURVES}", run / CURVES)


class Screen:
    """The terminal: a progress bar where it is one, else a line from time to time. Only the first process speaks."""

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.bar: Any = None
        self.held: list[str] | None = []  # until the run begins: an error before that is the only line
        self.began = time.monotonic()
        self.images = 0

    def say(self, text: str) -> None:
        """One line, in any process's name by the first one."""
        if not self.speaks:
            return
        if self.held is not None:
            self.held.append(text)
        elif self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """One line that only this process knows."""
        if self.speaks:
            self.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def release(self) -> None:
        """Says what was held back, and holds back nothing from now on."""
        held, self.held = self.held or [], None
        for text in held:
            self.say(text)

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        self.began, self.images = time.monotonic(), 0
        self.title = f"epoch {epoch + 1}/{epochs}"
        if self.speaks and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=done, desc=self.title, unit="step", dynamic_ncols=True, leave=False)

    def report(
        self, step: int, steps: int, new: int, images: int, loss: float, lr: float, device: torch.device
    ) -> None:
        """``new`` steps of ``images`` images in all are done, the ``step``-th of ``steps`` of the epoch the last."""
        self.images += images
        speed = self.speed
        memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        text = f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} img/s{memory}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(new)
        elif self.speaks:
            left = (steps - step) * images / max(new, 1) / max(speed, 1e-9)
            self.say(f"{self.title}, step {step}/{steps}: {text}, {left:,.0f} s left of the epoch")

    @property
    def speed(self) -> float:
        """Images a second of all processes since the epoch began."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.monotonic() - self.began

    def end_epoch(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()
            self.bar = None


class Board:
    """TensorBoard's file in the run's folder, where TensorBoard is installed."""

    def __init__(self, run: Path, speaks: bool):
        self.writer: Any = None
        if speaks:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.writer = SummaryWriter(str(run / "tensorboard"))

    def add(self, row: Mapping[str, Any]) -> None:
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, int(row["epoch"]) + 1)
            self.writer.flush()
