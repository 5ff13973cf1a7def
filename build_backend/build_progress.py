# SPDX-License-Identifier: Apache-2.0
"""Runs a Ninja build and says on the user's terminal how far it is: pip keeps the output of a build to itself."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

STEP = re.compile(r"\[(\d+)/(\d+)\] ")  # Ninja's status
SECONDS = 10.0  # between two lines


@contextlib.contextmanager
def user_terminal() -> Iterator[TextIO | None]:
    """The terminal that the user looks at, None where there is none, or where the build's output goes there anyway."""
    if sys.stdout.isatty():
        yield None
        return
    try:
        terminal = open("/dev/tty", "w")  # noqa: SIM115  closed below
    except OSError:
        yield None
        return
    with terminal:
        yield terminal


def run_with_progress(command: Sequence[str], env: Mapping[str, str], terminal: TextIO | None) -> None:
    """Runs ``command``, passes its output on, and writes a line to ``terminal`` every `SECONDS`.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    started = said = time.monotonic()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            step, now = STEP.match(line), time.monotonic()
            if terminal is not None and step and now >= said + SECONDS:
                said = now
                minutes, seconds = divmod(int(now - started), 60)
                print(
                    f"\rgroupmamba: {step[1]} of {step[2]} build steps done after {minutes} min {seconds:02} s",
                    file=terminal, flush=True,
                )  # fmt: skip
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
