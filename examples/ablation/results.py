# SPDX-License-Identifier: Apache-2.0
"""The files of a folder of runs: one JSON a finished run, locks of those in progress, checkpoints of those stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablation.arms import LEARNT, Run, Settings
from groupmamba_ext._command import CommandError, one_line

FAILED_BELOW = 50.0  # percent of the test images; a linear classifier gets 84


def failed(result: dict[str, Any]) -> bool:
    """Whether a training failed: its loss was not finite once, or it ends with less than half of the test images."""
    return result["not_finite_at"] is not None or result["accuracy"] < FAILED_BELOW


class Folder:
    """A folder of runs.

    Args:
        path: it is made where it is missing.
        settings: of its runs.
    """

    def __init__(self, path: Path, settings: Settings):
        self.path, self.settings = path, settings
        path.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, run: Run) -> Path:
        """Of a run that was stopped."""
        return self.path / f"{run.name}.pt"

    @property
    def teacher(self) -> Path:
        """The teacher's weights."""
        return self.path / "teacher.safetensors"

    def done(self, run: Run) -> bool:
        """Whether the run has been finished."""
        return self._file(run).is_file() and (run.kind != "teacher" or self.teacher.is_file())

    def result(self, run: Run) -> dict[str, Any]:
        """What a finished run says.

        Raises:
            CommandError: its file can't be read, or it had other settings.
        """
        result = read(self._file(run))
        if result["settings"] != self.settings.as_json():
            ours = self.settings.as_json()
            names = [name for name in ours if result["settings"].get(name) != ours[name]]
            differing = ", ".join(f"{name} {result['settings'].get(name)!r} and not {ours[name]!r}" for name in names)
            raise CommandError(f"{self._file(run)} is of a run with {differing}: choose another --output")
        return result

    def write(self, run: Run, result: dict[str, Any]) -> None:
        """Puts a finished run's file there, in one step."""
        beside = self.path / f".{run.name}.json"
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, self._file(run))
        self.checkpoint(run).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether this process alone may do the run, until the end of the block; a dead process holds nothing."""
        with open(self.path / f".{run.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield not self.done(run)

    def take(self, file: Path) -> None:
        """Puts the runs of a report's file there, but for those that are there, the teacher, whose weights the file
        lacks, and runs that learnt from it.

        Raises:
            CommandError: the file can't be read.
        """
        for name, result in _unpacked(file).items():
            target = self.path / f"{name}.json"
            if result["kind"] != "teacher" and result["arm"] not in LEARNT and not target.exists():
                target.write_text(json.dumps(result, indent=1) + "\n")

    def error(self, run: Run) -> Path:
        """The traceback of a run that raised one; others leave the run alone."""
        return self.path / f"{run.name}.error"

    def forget_errors(self) -> None:
        for path in self.path.glob("*.error"):
            path.unlink(missing_ok=True)

    def _file(self, run: Run) -> Path:
        return self.path / f"{run.name}.json"


def read(file: Path) -> dict[str, Any]:
    """A run's file.

    Raises:
        CommandError: it can't be read.
    """
    try:
        result = json.loads(file.read_text())
        if not {"run", "kind", "settings", "accuracy"} <= set(result):
            raise ValueError("it is no run's")
        return result
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{file} can't be read: {one_line(error)}") from error


def read_all(sources: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Finished runs by name, of folders and of reports' files; of equal names the last counts.

    Raises:
        CommandError: there is none, one can't be read, or they had different settings.
    """
    results: dict[str, dict[str, Any]] = {}
    for source in sources:
        if source.is_dir():
            results.update({path.stem: read(path) for path in sorted(source.glob("*.json"))})
        else:
            results.update(_unpacked(source))
    if not results:
        raise CommandError(f"{' '.join(map(str, sources))} holds no finished run")
    first = next(iter(results.values()))
    for name, result in results.items():
        if result["settings"] != first["settings"]:
            raise CommandError(f"{name} and {first['run']} had different settings")
    return results


def _unpacked(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return {result["run"]: result for result in json.loads(file.read_text())}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{file} can't be read: {one_line(error)}") from error
