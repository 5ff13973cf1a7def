# SPDX-License-Identifier: Apache-2.0
"""What the examples' reports share: a page of documentation, the addresses on it, files of runs, the look of curves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from groupmamba_ext._command import CommandError


def replace_block(text: str, new: str, begin: str, end: str) -> str:
    """``text`` with ``new`` between the markers ``begin`` and ``end``.

    Raises:
        CommandError: the markers are missing.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise CommandError(f"the page must hold the lines {begin} and {end}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def address(file: Path | None, page: Path | None) -> str | None:
    """The file as it is seen from the page; None where either is."""
    return None if page is None or file is None else Path(os.path.relpath(file, page.parent)).as_posix()


def write_runs(results: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Writes runs into one JSON file, a line each, by their names."""
    lines = ",\n".join(json.dumps(one) for one in sorted(results, key=lambda one: one["run"]))
    file.write_text(f"[\n{lines}\n]\n")


def finish(axes: Any) -> None:
    """The frame, grid and legend of a panel of curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
