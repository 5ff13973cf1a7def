# SPDX-License-Identifier: Apache-2.0
"""Which implementation the public functions call: the compiled ops or the plain PyTorch reference."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import warnings
from collections.abc import Iterator

import torch

from groupmamba_ext import _explain, _load
from groupmamba_ext.transforms import forward_ad_active

CHOICES = ("auto", "native", "reference")


def _default() -> str:
    name = os.environ.get("GROUPMAMBA_BACKEND", "auto")
    if name not in CHOICES:
        raise ValueError(f"the environment variable GROUPMAMBA_BACKEND must be one of {CHOICES}, got {name!r}")
    return name


_DEFAULT = _default()
_current = contextvars.ContextVar("groupmamba_ext.backend", default=_DEFAULT)
# torch.compile guards on a context variable from torch 2.14 on; it sets none.
_GUARDS_CONTEXT = torch.__version__ >= (2, 14)  # type: ignore[operator]
_warned: set[str] = set()


class _Traced(threading.local):
    """What torch.compile reads, guards on and sets in place of the context variable; None for no block."""

    def __init__(self) -> None:
        self.choice: str | None = None


_traced = _Traced()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation inside a ``with`` block.

    ``"native"``: the compiled ops, an error where they cannot run. ``"reference"``: plain PyTorch (slow: it walks the
    tokens one by one). ``"auto"``, the default: the compiled ops; float64 on CUDA and forward-mode differentiation
    (:func:`torch.func.jvp`, ``jacfwd``, :mod:`torch.autograd.forward_ad`), which have none, go through the reference
    after one warning. The environment variable ``GROUPMAMBA_BACKEND`` sets the choice outside any block.

    The choice is a context variable: other threads and asyncio tasks keep their own. Compiled functions follow it (with
    torch before 2.14 that of the thread). A gradient is computed by what computed the result; what
    :func:`torch.utils.checkpoint.checkpoint` computes again, by the choice around the backward, on CUDA by the default.

    Raises:
        ValueError: if ``name`` is none of these.
    """
    if name not in CHOICES:
        raise ValueError(f"backend must be one of {CHOICES}, got {name!r}")
    if torch.compiler.is_compiling():
        before, _traced.choice = _traced.choice, name
        try:
            yield
        finally:
            _traced.choice = before
        return
    token = _current.set(name)
    if not _GUARDS_CONTEXT:
        _traced.choice = name
    try:
        yield
    finally:
        _current.reset(token)
        if not _GUARDS_CONTEXT:
            _traced.choice = _current.get()


def current_backend() -> str:
    """The name of the backend in force."""
    if torch.compiler.is_compiling():
        choice = _traced.choice
        if choice is not None:
            return choice
        if not _GUARDS_CONTEXT:
            return _DEFAULT
    return _current.get()


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, stacklevel=5)


def use_native(image: torch.Tensor, op: str) -> bool:
    """True where ``op`` on ``image`` goes to the compiled library; loads it, or raises what to do about it."""
    native = _use_native(image, op)
    if _explain.asked():
        _explain.note(f"{op}: {_implementation(image, native)}")
    return native


def _implementation(image: torch.Tensor, native: bool) -> str:
    kind = image.device.type
    if native:
        kernels = f"CPU kernels ({_load.build_info()['cpu_capability']})" if kind == "cpu" else f"{kind} kernels"
        return f"{kernels}, {image.dtype}"
    if current_backend() == "reference":
        why = "the backend is 'reference'"
    elif forward_ad_active():
        why = "the compiled ops have no forward-mode derivative"
    else:
        why = f"there is no compiled kernel for {image.dtype} on {kind}"
    return f"the plain PyTorch reference: {why}"


def _use_native(image: torch.Tensor, op: str) -> bool:
    choice = current_backend()
    if choice == "reference":
        return False
    if forward_ad_active():
        if choice == "native":
            raise RuntimeError(
                f"{op}: the compiled ops have no forward-mode derivative; the reference has one, use "
                "`with groupmamba_ext.backend('reference')`"
            )
        if not torch.compiler.is_compiling():
            _warn_once("forward-mode", f"{op}: forward-mode AD runs through the plain PyTorch reference, which is slow")
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


def takes_image(x: torch.Tensor) -> bool:
    """True where the ops that only CUDA has (of layers, of norms between them, of the entry) take an image ``x``: not
    empty, on CUDA, with the compiled ops."""
    return x.is_cuda and x.numel() > 0 and use_native(x, "grouped_mamba_layer")
