# SPDX-License-Identifier: Apache-2.0
"""What the console commands share: whatever cannot be done is one line on stderr and an exit status, never a traceback.

The statuses are those that shells and argparse use: 1 for what cannot be done here, 2 for wrong arguments, 130 after
Ctrl-C, 141 when the reader of a pipe has gone. An exception that only a defect of this project raises keeps its
traceback.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from groupmamba_ext._load import check_device_supported

INTERRUPTED, CLOSED_PIPE = 130, 141


class CommandError(Exception):
    """The command cannot do what it was asked to do; the message, one line, is for its user."""

    status = 1


class UsageError(CommandError):
    """An argument has a value that is wrong on every machine."""

    status = 2


def one_line(error: object) -> str:
    """The text of an error as one line; torch's advice on environment variables and stack traces is left out."""
    first = str(error).strip().split("\n\n")[0].partition("CUDA kernel errors might be")[0]
    return " ".join(first.split())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that is not there, on the CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("DefaultCPUAllocator", "ut of memory")  # the second as csrc/host/tensor.h says it
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def run_command(name: str, command: Callable[[], int]) -> int:
    """The exit status of ``command``; what cannot be done is one line on stderr that begins with ``name``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no text, as stderr has it
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return CLOSED_PIPE
    except (CommandError, OSError) as error:
        status, message = getattr(error, "status", 1), one_line(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status, message = 1, f"out of memory: {one_line(error)[:160]}"
    print(f"{name}: {message}", file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk, say
        _drop_output()
    return status


def _drop_output() -> None:
    """What stdout still holds goes nowhere: Python flushes it again at its exit, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_out(out: Path) -> None:
    """CommandError where the picture cannot be written to ``out``, before any work."""
    if out.exists() and not out.is_file():
        raise CommandError(f"--out must be a file, got {'the folder ' if out.is_dir() else ''}{out}")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, as the picture is a PNG file, got {out}")
    if not out.parent.is_dir():
        raise CommandError(f"--out must be in an existing folder, got {out}")
    try:
        if out.exists():
            with out.open("ab"):  # changes nothing
                return
        with tempfile.TemporaryFile(dir=out.parent):
            return
    except OSError as error:
        raise CommandError(f"--out cannot be written: {out}: {error.strerror}") from error


def check_folder(option: str, folder: Path) -> None:
    """CommandError where ``folder``, the value of ``option``, can't be made or written to, before any work."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CommandError(f"{option} must be a folder, got {folder}: {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise CommandError(f"{option} can't be written: {folder}: {error.strerror}") from error


def gpu_problem(*, ops: bool = True) -> str | None:
    """Why torch, or with ``ops`` this build's ops, cannot use a GPU here, one line; None where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old, say
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    try:
        if not available:
            torch.cuda.init()  # raises the reason
            return one_line(caught[0].message) if caught else "torch.cuda.is_available() is False"
        if ops:
            check_device_supported(torch.cuda.current_device())
    except (AssertionError, RuntimeError) as error:
        return one_line(error)
    return None


def gpu_usable(*, ops: bool = True) -> bool:
    """Whether `gpu_problem` finds none; for a GPU that is there and cannot be used it says why on stderr."""
    problem = gpu_problem(ops=ops)
    if problem is not None and torch.cuda.device_count() > 0:
        print(f"without the GPU: {problem}", file=sys.stderr)
    return problem is None


def require_gpu(*, ops: bool = True) -> None:
    """CommandError where ``--device cuda`` was asked for and `gpu_problem` finds one."""
    problem = gpu_problem(ops=ops)
    if problem is not None:
        raise CommandError(f"--device cuda: {problem}")
