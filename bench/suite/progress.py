# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal's stderr, by tqdm (`pip install 'groupmamba[bench]'`); elsewhere a line a case.

Where a case takes long, lines say in between what is being done.
"""

from __future__ import annotations

import importlib.util
import sys
import time

QUIET_SECONDS = 10


class Bar:
    """Counts cases; ``say`` shows what is done now.

    Args:
        total: how many cases there are.
    """

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.start = self.told = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="case", file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _tell(self, text: str) -> None:
        self.told = time.perf_counter()
        print(f"[{self.done}/{self.total}, {self.told - self.start:.0f} s] {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """What is done now."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif time.perf_counter() - self.told > QUIET_SECONDS:
            self._tell(text)

    def advance(self, title: str) -> None:
        """A case is done."""
        self.done += 1
        if self.bar is None:
            self._tell(title)
        else:
            self.bar.update()
