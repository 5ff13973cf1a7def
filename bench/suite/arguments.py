# SPDX-License-Identifier: Apache-2.0
"""Command lines whose faults are one line."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of all options."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")


def positive(text: str) -> int:
    """An argparse type."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    """An argparse type: a file that can be written, found out before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    folder = next(p for p in path.absolute().parents if p.exists())
    try:
        with open(path, "r+b") if path.exists() else tempfile.TemporaryFile(dir=folder):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
