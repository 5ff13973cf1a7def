# SPDX-License-Identifier: Apache-2.0
"""A progress bar on stderr: tqdm's where it is installed (`pip install 'groupmamba[bench]'`), else one line a step."""

from __future__ import annotations

import importlib.util
import sys


class Bar:
    """Counts cases; ``say`` shows what is done now.

    Args:
        total: how many cases there are.
    """

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.bar = None
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="case", file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """What is done now."""
        if self.bar is None:
            print(f"[{self.done + 1}/{self.total}] {text}", file=sys.stderr)
        else:
            self.bar.set_description_str(text)

    def advance(self) -> None:
        """A case is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
