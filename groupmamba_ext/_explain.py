# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call takes, and why not faster ones."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from groupmamba_ext import _load

_PRINTS = os.environ.get("GROUPMAMBA_EXPLAIN", "") not in ("", "0")
_lock = threading.Lock()  # one call is explained at a time
_recorded: list[str] = []
_printed: set[str] = set()
active = _PRINTS


def asked() -> bool:
    """Whether anybody asks for notes. A compiler that traces takes none."""
    return active and not torch.compiler.is_compiling()


def note(text: str) -> None:
    """Keeps ``text`` for who asks; call it behind ``if _explain.asked()``: nobody else pays for composing it."""
    if _lock.locked():
        _recorded.append(text)
    if _PRINTS and text not in _printed:
        _printed.add(text)
        print(f"groupmamba: {text}", file=sys.stderr)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """libgroupmamba, which takes notes of its own; None where it is not installed."""
    if not _load.native_available():
        return None
    library = _load.c_library()
    library.groupmamba_explained.restype = ctypes.c_char_p
    return library


class Explanation(NamedTuple):
    """What `explain` returns; as text, one note a line."""

    result: Any  # of the call
    notes: list[str]  # first those of Python, then those of the compiled ops, each in the order of the calls

    def __str__(self) -> str:
        return "\n".join(self.notes)


def explain(function: Callable, /, *args: Any, **kwargs: Any) -> Explanation:
    """Calls ``function`` and says which implementation and which kernels it took, and why not faster ones.

    For the scans, the depthwise convolution, the feed-forward network, the products of a layer and a model's first
    convolutions, and for layers of `groupmamba` whether they run as one op. For gradients give a function that computes
    them: ``print(ext.explain(lambda: layer(x).sum().backward()))``. The environment variable ``GROUPMAMBA_EXPLAIN=1``
    prints each different note once, of all calls, to stderr.

    Args:
        function: a public function of this package, a layer, a model, or anything that calls them.
        *args, **kwargs: what to call it with.

    Returns:
        The result and the notes, equal ones as one that says how many times. What other threads call meanwhile is in
        the notes too; what ``torch.compile`` or a CUDA graph replays is not.

    Raises:
        TypeError: ``function`` cannot be called.
        RuntimeError: in a call that is being explained.
    """
    global active
    if not callable(function):
        raise TypeError(f"explain: function must be callable, got {type(function).__name__}")
    if not _lock.acquire(blocking=False):
        raise RuntimeError("explain: another call is being explained")
    library = _library()
    try:
        _recorded.clear()
        active = True
        if library is not None:
            library.groupmamba_explain(1)
        result = function(*args, **kwargs)
        compiled = [] if library is None else library.groupmamba_explained().decode().splitlines()
        counts = Counter([*_recorded, *compiled])  # in the order of first calls
        return Explanation(result, [f"{text} ({n} times)" if n > 1 else text for text, n in counts.items()])
    finally:
        if library is not None:
            library.groupmamba_explain(0)
        active = _PRINTS
        _lock.release()
