# SPDX-License-Identifier: Apache-2.0
"""What a call is given and what it runs under: whether a graph may take it, and what graphs are told apart by."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from groupmamba_ext import _explain
from groupmamba_ext.backend import current_backend
from groupmamba_ext.transforms import watched

CONSTANTS = (bool, int, float, str, type(None))
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_thread = threading.local()  # `recording`: what runs inside a recording must not record


@contextmanager
def recording() -> Iterator[None]:
    """Calls of modules in here, the one that is recorded or others inside it, run as they are."""
    before = getattr(_thread, "recording", False)
    _thread.recording = True
    try:
        yield
    finally:
        _thread.recording = before


def something_looks_on() -> bool:
    """Where a call has to run as it is: something follows it, or records it."""
    return (
        getattr(_thread, "recording", False)
        or watched()
        or _explain.asked()
        or _get_current_dispatch_mode() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch.cuda.is_current_stream_capturing()
    )


def tensors_of(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments; none if they are not such as a graph can have."""
    values = (*args, *kwargs.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    others = (value for value in values if not isinstance(value, Tensor))
    graphable = all(fits(tensor) for tensor in tensors) and all(isinstance(value, CONSTANTS) for value in others)
    return tensors if graphable else []


def fits(tensor: Tensor) -> bool:
    """Whether a graph can have such an argument."""
    return tensor.is_cuda and is_plain(tensor)


def is_plain(tensor: Tensor) -> bool:
    """No subclass, in memory with strides, of real numbers."""
    return type(tensor) in PLAIN and tensor.layout == torch.strided and not tensor.is_complex()


def signature(values: Any) -> tuple[Hashable, ...]:
    """What a graph is made for, of some arguments."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.requires_grad)
        if isinstance(value, Tensor)
        else (type(value), value)
        for value in values
    )


def settings() -> tuple[Hashable, ...]:
    """What of torch's state decides which kernels run."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        current_backend(),
    )
