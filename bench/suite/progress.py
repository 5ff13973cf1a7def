# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal's stderr, by tqdm (`pip install 'groupmamba[bench]'`); elsewhere one line a case."""

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
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="case", file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """What is done now."""
        if self.bar is not None:
            self.bar.set_description_str(text)

    def advance(self, title: str) -> None:
        """A case is done."""
        self.done += 1
        if self.bar is None:
            print(f"[{self.done}/{self.total}] {title}", file=sys.stderr, flush=True)
        else:
            self.bar.update()
