# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public functions and the fake kernels: each error names the argument and what came."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INT = 2**31 - 1  # of a width, and of the tokens between two saved states: csrc/host/scan_args.h
_STRIDED, _FLOAT32 = torch.strided, torch.float32
_MAX_FLOAT = sys.float_info.max


def shown(value: object) -> str:
    """``repr(value)`` for a message; Python writes no int of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"{type(value).__name__} too long to be shown"


# Every call of an op makes some of these checks a dozen times: a message is put together where it is needed. ``owner``
# names whose argument it is, as "op: ", or is empty.


def dense_tensor(owner: str, name: str, value: object) -> Tensor:
    """``value`` if it is a tensor with strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not _STRIDED or value.is_nested:
        layout = f"a nested tensor of layout {value.layout}" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{owner}{name} must be a dense tensor of layout torch.strided, got {layout}")
    return value


def boolean(owner: str, name: str, value: object) -> None:
    """Checks a flag: ``True`` or ``False``, nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}{name} must be a bool, got {shown(value)}")


def choice(owner: str, name: str, value: object, choices: Sequence[str | None]) -> None:
    """Checks a name, or None, against those that there are."""
    if not (isinstance(value, str) or value is None):
        raise TypeError(f"{owner}{name} must be one of {tuple(choices)}, got {shown(value)}")
    if value not in choices:
        raise ValueError(f"{owner}{name} must be one of {tuple(choices)}, got {value!r}")


class Arguments:
    """Checks the tensors of one call against its first image tensor, which sets the device and the dtype.

    Type and dtype problems raise TypeError; shape, device and value problems raise ValueError.
    """

    def __init__(self, op: str, name: str, image: object, dims: Sequence[int], layout: str):
        self.op = op
        self.owner = f"{op}: "
        self.first = name
        self.image = dense_tensor(self.owner, name, image)
        self.device = self.image.device
        if self.image.dtype not in IMAGE_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {self.image.dtype}")
        if self.image.dim() not in dims:
            raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(self.image.shape)}")

    def tensor(self, name: str, value: object) -> Tensor:
        """A dense tensor of any dtype, shape and device."""
        return dense_tensor(self.owner, name, value)

    def _place(self, name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{self.op}: {name} must be {layout} = {tuple(shape)}, got shape {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(
                f"{self.op}: {name} must be on {self.device} like {self.first}, got device {tensor.device}"
            )

    def like_image(self, name: str, value: object, shape: Sequence[int], layout: str) -> None:
        """An image-sized tensor: exactly the image's dtype."""
        tensor = dense_tensor(self.owner, name, value)
        if tensor.dtype != self.image.dtype:
            raise TypeError(
                f"{self.op}: {name} must have the dtype of {self.first} ({self.image.dtype}), got {tensor.dtype}"
            )
        self._place(name, tensor, shape, layout)

    def parameter(self, name: str, value: object, shape: Sequence[int], layout: str, *, optional: bool = False) -> None:
        """A parameter: the image's dtype or float32."""
        if value is None and optional:
            return
        tensor = dense_tensor(self.owner, name, value)
        if tensor.dtype not in (self.image.dtype, _FLOAT32):
            allowed = "float32" if self.image.dtype == _FLOAT32 else f"{self.image.dtype} or torch.float32"
            raise TypeError(f"{self.op}: {name} must be {allowed}, got {tensor.dtype}")
        self._place(name, tensor, shape, layout)

    def boolean(self, name: str, value: object) -> None:
        boolean(self.owner, name, value)

    def eps(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.op}: {name} must be a float, got {shown(value)}")
        if not value >= 0:
            raise ValueError(f"{self.op}: {name} must be at least 0, got {value!r}")
        if value > _MAX_FLOAT:
            raise ValueError(f"{self.op}: {name} must be a finite float, got {shown(value)}")


def last_size(op: str, name: str, value: object, dims: int, layout: str) -> int:
    """The last size of ``value`` after a check of its number of dimensions."""
    tensor = dense_tensor(f"{op}: ", name, value)
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(tensor.shape)}")
    return tensor.shape[-1]


# What the fake kernels ask of the compiled ops' arguments. They also answer a call of an op with a tensor on the meta
# device among others, and what they allocate would pass for a result.


def same_device(op: str, tensors: Iterable[object]) -> None:
    """Raises where those of ``tensors`` that are tensors are on several devices."""
    devices = {t.device for t in tensors if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {sorted(map(str, devices))}")


def path_arguments(op: str, directions: Sequence[int], chunk: int, expected: int | None) -> None:
    """The codes of directions, and the tokens between two saved states, of which CUDA kernels take ``expected``."""
    if not 1 <= chunk <= MAX_INT:
        raise ValueError(f"{op}: chunk must be 1 to {MAX_INT}, got {chunk}")
    if expected is not None and chunk != expected:
        raise ValueError(f"{op}: chunk must be {expected} for this many channels on CUDA, got {chunk}")
    for code in directions:
        if not 0 <= code <= 3:
            raise ValueError(f"{op}: a direction must be 0 to 3, got {code}")


def activation_code(op: str, activation: int) -> None:
    """The code of a convolution's activation."""
    if not 0 <= activation <= 2:
        raise ValueError(f"{op}: activation must be 0, 1 or 2, got {activation}")
