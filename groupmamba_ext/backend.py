# SPDX-License-Identifier: Apache-2.0
"""Which implementation the public functions call: the compiled ops or the plain PyTorch reference."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from groupmamba_ext import _load

CHOICES = ("auto", "native", "reference")


def _default() -> str:
    name = os.environ.get("GROUPMAMBA_BACKEND", "auto")
    if name not in CHOICES:
        raise ValueError(f"the environment variable GROUPMAMBA_BACKEND must be one of {CHOICES}, got {name!r}")
    return name


# One for the process, a plain global: torch.compile guards on it.
_current = _default()
_warned: set[str] = set()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation inside a ``with`` block.

    ``"native"``: the compiled ops, an error where they cannot run. ``"reference"``: plain PyTorch (slow: it walks the
    tokens one by one). ``"auto"``, the default: the compiled ops; float64 on CUDA goes through the reference after one
    warning. The environment variable ``GROUPMAMBA_BACKEND`` sets the choice outside any block. The choice holds for all
    threads of the process.

    Raises:
        ValueError: if ``name`` is none of these.
    """
    if name not in CHOICES:
        raise ValueError(f"backend must be one of {CHOICES}, got {name!r}")
    global _current
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before


def current_backend() -> str:
    """The name of the backend in force."""
    return _current


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, stacklevel=4)


def use_native(image: torch.Tensor, op: str) -> bool:
    """True where ``op`` on ``image`` goes to the compiled library; loads it, or raises what to do about it."""
    choice = _current
    if choice == "reference":
        return False
    kind = image.device.type
    if kind == "cuda" and image.dtype == torch.float64:
        if choice == "native":
            raise ValueError(f"{op}: the CUDA kernels take float32, float16 and bfloat16, got torch.float64")
        if not torch.compiler.is_compiling():
            _warn_once("float64", f"{op}: float64 on CUDA runs through the plain PyTorch reference, which is slow")
        return False
    if kind not in ("cpu", "cuda", "meta"):
        if choice == "native":
            raise ValueError(f"{op}: there is no compiled kernel for device type {kind!r}")
        if not torch.compiler.is_compiling():
            _warn_once(kind, f"{op}: no compiled kernel for device type {kind!r}; running the plain PyTorch reference")
        return False
    _load.load_ops()
    if kind == "cuda" and not torch.compiler.is_compiling():
        _load.check_device_supported(image.device.index if image.device.index is not None else 0)
    return True
