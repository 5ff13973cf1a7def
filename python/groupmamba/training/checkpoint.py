# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: folders ``checkpoints/step-00001234`` that are there as a whole or not at all.

    model.safetensors, ema.safetensors   weights; what they are for stands in the header, see :mod:`.card`, with a
                                         checksum of the file, see :mod:`groupmamba.checksum`
    state.pt                             optimizer, scaler, position; read with weights_only=True

A folder is written under another name, flushed to the disk, read back and compared, and then renamed. ``last`` and
``best`` weights are links beside it.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from groupmamba.checksum import check, with_checksum
from groupmamba.training.card import Card
from groupmamba_ext._command import CommandError, one_line

MODEL, EMA, STATE = "model.safetensors", "ema.safetensors", "state.pt"
_WRITING, _OLD = ".writing-", ".old-"


class Checkpoints:
    """The checkpoints of the run in folder ``run``."""

    def __init__(self, run: Path, keep: int):
        self.run, self.root, self.keep = run, run / "checkpoints", keep

    def found(self) -> list[Path]:
        """Complete checkpoints, the last first."""
        return sorted((path for path in self.root.glob("step-*") if path.is_dir()), reverse=True)

    def tidy(self, after: int | None = None) -> None:
        """Removes what a killed process was writing or removing, and checkpoints ``after`` a step."""
        for path in [*self.root.glob(f"{_WRITING}*"), *self.root.glob(f"{_OLD}*")]:
            shutil.rmtree(path)
        for path in self.found():
            if after is not None and _step(path) > after:
                self._remove(path)

    def check_space(self, weights: int, average: bool) -> None:
        """CommandError where the disk can't hold a checkpoint of a model of ``weights`` bytes."""
        needed = weights * (4 if average else 3)
        free = shutil.disk_usage(self.run).free
        if free < 2 * needed:
            raise CommandError(
                f"{self.run} has {free / 2**20:,.0f} MiB left on its disk; the two checkpoints that a run holds at "
                f"least take {2 * needed / 2**20:,.0f} MiB"
            )

    def write(
        self, step: int, model: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, card: Card, state: dict
    ) -> Path:
        """Writes one, and returns its folder.

        Raises:
            CommandError: weights that are not finite, or bytes that are not read back as they were written.
            OSError: such as for a full disk; what was there before is still there.
        """
        self._check_finite(step, model)
        self.root.mkdir(parents=True, exist_ok=True)
        target, beside = self.root / f"step-{step:08d}", self.root / f"{_WRITING}{step:08d}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            _write(beside / MODEL, _weights(model, card))
            if ema is not None:
                _write(beside / EMA, _weights(ema, card))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            _write(beside / STATE, buffer.getbuffer())
            _flush(beside)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        self._remove(target)
        os.rename(beside, target)
        _flush(self.root)
        self.link("last", target / MODEL)
        return target

    def _check_finite(self, step: int, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                found = self.found()
                good = f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"
                raise CommandError(f"weights are not finite after step {step} ({name}); {good}")

    def link(self, name: str, weights: Path) -> None:
        """``run/NAME.safetensors`` becomes the file ``weights``, in one step."""
        beside = self.run / f".{name}.safetensors"
        beside.unlink(missing_ok=True)
        try:
            os.link(weights, beside)
        except OSError:  # a file system without links
            shutil.copyfile(weights, beside)
        os.replace(beside, self.run / f"{name}.safetensors")
        beside.unlink(missing_ok=True)  # where both were links to one file, the system has done nothing

    def link_best(self, ranking: Mapping[int, tuple[float, str]]) -> None:
        """``best`` weights become those of the best epoch, if its checkpoint is in this run."""
        for step in _best(ranking)[:1]:
            if (weights := self.root / f"step-{step:08d}" / ranking[step][1]).is_file():
                self.link("best", weights)

    def prune(self, ranking: Mapping[int, tuple[float, str]]) -> None:
        """Keeps the last checkpoint and those of the best epochs.

        Args:
            ranking: by each epoch's last step its metric, and the name of its better weights.
        """
        held = _best(ranking)[: self.keep]
        for path in self.found()[1:]:
            if _step(path) not in held:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.exists():
            old = path.with_name(f"{_OLD}{path.name}")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
            shutil.rmtree(old)


def _best(ranking: Mapping[int, tuple[float, str]]) -> list[int]:
    """Steps from the best to the worst; of equals the earlier first."""
    return sorted(ranking, key=lambda step: (-ranking[step][0], step))


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _weights(state: Mapping[str, Tensor], card: Card) -> bytes:
    values = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    return with_checksum(safetensors.torch.save(values, card.header()))


def _write(path: Path, data: bytes | memoryview) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # The name is not always in the error of a write.
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)} (writing a checkpoint)", str(path)) from error
    if path.read_bytes() != data:
        raise CommandError(f"{path} is not read back as it was written: the disk can't be trusted")


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint's folder, on the CPU, after a look at the checksums of all its files.

    Raises:
        CommandError: it can't be read, or a file is damaged.
    """
    try:
        for weights in checkpoint.glob("*.safetensors"):
            check(weights)
        with zipfile.ZipFile(checkpoint / STATE) as archive:
            if damaged := archive.testzip():
                raise RuntimeError(f"{damaged} in {STATE} does not fit its CRC-32")
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many kinds on bytes that are no checkpoint
        raise CommandError(f"{checkpoint} is no checkpoint that can be read: {one_line(error)}") from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """Weights that :class:`Checkpoints` wrote.

    Raises:
        CommandError: they can't be read.
    """
    try:
        check(file)
        return safetensors.torch.load_file(file, device="cpu")
    except Exception as error:  # as above
        raise CommandError(f"{file} can't be read: {one_line(error)}") from error


def to_resume(source: str, output: Path, keep: int, say: Any) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its state; None to begin.

    Args:
        source: ``"auto"`` for the last one in ``output`` that can be read, ``"none"``, a run's folder, or a
            checkpoint's.
        output: the run's folder.
        keep: as for :class:`Checkpoints`.
        say: called with a line on each checkpoint that can't be read.

    Raises:
        CommandError: ``source`` holds no checkpoint, or none can be read.
    """
    if source == "none":
        return None
    path = output if source == "auto" else Path(source)
    if source != "auto" and not path.exists():
        raise CommandError(f"--resume {source} is not there")
    if (path / STATE).is_file():
        return path, read_state(path)
    found = Checkpoints(path, keep).found()
    for checkpoint in found:
        try:
            return checkpoint, read_state(checkpoint)
        except CommandError as error:
            say(one_line(error))
    if found or source != "auto":
        raise CommandError(f"{path} holds no checkpoint that can be read")
    return None
