# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public functions: each error names the argument and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return value


class Arguments:
    """Checks the tensors of one call against its first image tensor, which sets the device and the dtype.

    Type and dtype problems raise TypeError; shape, device and value problems raise ValueError.
    """

    def __init__(self, op: str, name: str, image: object, dims: Sequence[int], layout: str):
        self.op = op
        self.first = name
        self.image = _tensor(op, name, image)
        if self.image.dtype not in IMAGE_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {self.image.dtype}")
        if self.image.dim() not in dims:
            raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(self.image.shape)}")

    def _place(self, name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{self.op}: {name} must be {layout} = {tuple(shape)}, got shape {tuple(tensor.shape)}")
        if tensor.device != self.image.device:
            raise ValueError(
                f"{self.op}: {name} must be on {self.image.device} like {self.first}, got device {tensor.device}"
            )

    def like_image(self, name: str, value: object, shape: Sequence[int], layout: str) -> None:
        """An image-sized tensor: exactly the image's dtype."""
        tensor = _tensor(self.op, name, value)
        if tensor.dtype != self.image.dtype:
            raise TypeError(
                f"{self.op}: {name} must have the dtype of {self.first} ({self.image.dtype}), got {tensor.dtype}"
            )
        self._place(name, tensor, shape, layout)

    def parameter(self, name: str, value: object, shape: Sequence[int], layout: str, *, optional: bool = False) -> None:
        """A parameter: the image's dtype or float32."""
        if value is None and optional:
            return
        tensor = _tensor(self.op, name, value)
        if tensor.dtype not in (self.image.dtype, torch.float32):
            allowed = "float32" if self.image.dtype == torch.float32 else f"{self.image.dtype} or torch.float32"
            raise TypeError(f"{self.op}: {name} must be {allowed}, got {tensor.dtype}")
        self._place(name, tensor, shape, layout)

    def boolean(self, name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be a bool, got {value!r}")

    def eps(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.op}: {name} must be a float, got {value!r}")
        if not value >= 0:
            raise ValueError(f"{self.op}: {name} must be at least 0, got {value!r}")

    def directions(self, value: object, count: int | None, choices: Sequence[str]) -> tuple[int, ...]:
        """Direction names to their codes, one a group, or with ``count`` None any number from 1 on."""
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{self.op}: directions must be a sequence of names from {tuple(choices)}, got {value!r}")
        if count is None and len(value) < 1:
            raise ValueError(f"{self.op}: directions must name at least one direction, got {tuple(value)!r}")
        if count is not None and len(value) != count:
            raise ValueError(f"{self.op}: directions must name one direction a group ({count}), got {tuple(value)!r}")
        for name in value:
            if name not in choices:
                raise ValueError(f"{self.op}: directions must be from {tuple(choices)}, got {name!r}")
        return tuple(choices.index(name) for name in value)


def last_size(op: str, name: str, value: object, dims: int, layout: str) -> int:
    """The last size of ``value`` after a check of its number of dimensions."""
    tensor = _tensor(op, name, value)
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(tensor.shape)}")
    return tensor.shape[-1]
