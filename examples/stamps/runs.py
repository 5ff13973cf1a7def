# SPDX-License-Identifier: Apache-2.0
"""The runs of the comparison: which there are, how each is started, and what a finished one has left."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groupmamba_ext._command import CommandError, one_line

BACKBONES = ("groupmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny")
TASKS = {"detector": "eval_mask_map", "segmenter": "eval_miou"}  # and the column that counts
FINISHED = "finished.json"


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    steps: int = 1500
    batch: int = 16
    size: int = 256
    detector_lr: float = 2e-4
    segmenter_lr: float = 3e-4
    drop_path: float = 0.1
    workers: int = 5


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    backbone: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.backbone}-{self.seed}"


def all_runs(tasks: Sequence[str], backbones: Sequence[str], seeds: int) -> list[Run]:
    """Seed by seed, so that what is there can be compared early."""
    return [Run(task, backbone, seed) for seed in range(seeds) for task in tasks for backbone in backbones]


def arguments(run: Run, settings: Settings, data: Path, output: Path) -> list[str]:
    """Of ``groupmamba``: random weights, the task's recipe, and what the short budget changes in it."""
    size = str(settings.size)
    argv = [f"train-{run.task}", str(data), "--output", str(output / run.name), "--model", run.backbone]
    argv += ["--seed", str(run.seed), "--steps", str(settings.steps), "-b", str(settings.batch)]
    argv += ["--drop-path", str(settings.drop_path), "-j", str(settings.workers), "--checkpoint-hist", "1"]
    argv += ["--warmup-steps", str(max(settings.steps // 15, 1)), "--clip-grad", "5"]
    if run.task == "detector":
        argv += ["--lr", str(settings.detector_lr), "--min-size", size, "--max-size", str(2 * settings.size)]
        return [*argv, "--validation-batch-size", "8"]
    return [*argv, "--lr", str(settings.segmenter_lr), "--img-size", size, "--short-side", size]


def write_finished(run: Run, settings: Settings, folder: Path, facts: dict[str, Any]) -> None:
    """The run's curve and what is known of it, beside its other files."""
    try:
        with open(folder / "summary.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        speeds = [float(row["images_per_s"]) for row in rows[1:] or rows]
        column = TASKS[run.task]
        history = [[int(row["step"]), float(row[column])] for row in rows if row[column]]
        losses = [[int(row["step"]), float(row["train_loss"])] for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise CommandError(f"{folder} holds no run that is finished: {one_line(error)}") from error
    result = {
        "run": run.name,
        **asdict(run),
        "settings": asdict(settings),
        "history": history,
        "losses": losses,
        "images_per_s": statistics.median(speeds),
        **facts,
    }
    (folder / FINISHED).write_text(json.dumps(result) + "\n")


def read_results(sources: Sequence[Path]) -> list[dict[str, Any]]:
    """Finished runs, of folders of runs and of files that hold a list of them.

    Raises:
        CommandError: there is none, one can't be read, or they had different settings.
    """
    results: list[dict[str, Any]] = []
    for source in sources:
        files = sorted(source.glob(f"*/{FINISHED}")) if source.is_dir() else [source]
        for file in files:
            try:
                content = json.loads(file.read_text())
                found = content if isinstance(content, list) else [content]
                if not all({"run", "task", "backbone", "seed", "history", "settings"} <= set(one) for one in found):
                    raise ValueError("it is no run's")
            except (OSError, ValueError, TypeError) as error:
                raise CommandError(f"{file} can't be read: {one_line(error)}") from error
            results += found
    if not results:
        raise CommandError(f"{' '.join(map(str, sources))} holds no finished run")
    for one in results:
        if one["settings"] != results[0]["settings"]:
            raise CommandError(f"{one['run']} and {results[0]['run']} had different settings")
    return list({one["run"]: one for one in results}.values())
