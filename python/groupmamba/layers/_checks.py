# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the layers: each error names the argument and the value that came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupmamba_ext.reference import DIRECTIONS


def positive_int(name: str, value: object) -> int:
    """``value`` if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def scaled_width(name: str, ratio: object, width: int) -> int:
    """``int(ratio * width)`` if that is at least 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{name} must be a number, got {ratio!r}")
    scaled = int(ratio * width)
    if scaled < 1:
        raise ValueError(f"{name} must make at least one channel out of {width}, got {ratio!r}")
    return scaled


def direction_names(value: Sequence[str], count: int | None) -> tuple[str, ...]:
    """``value`` as a tuple of ``count`` direction names, of any number from 1 on with ``count`` None."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"directions must be a sequence of names from {DIRECTIONS}, got {value!r}")
    right = len(value) >= 1 if count is None else len(value) == count
    if not right or any(name not in DIRECTIONS for name in value):
        raise ValueError(
            f"directions must be {'some' if count is None else count} names from {DIRECTIONS}, got {tuple(value)!r}"
        )
    return tuple(value)


def image_input(x: Tensor, dim: int, parameter: Tensor | None, *, tokens: bool = False) -> None:
    """Checks a module's input (batch, dim, H, W) or (dim, H, W), with ``tokens`` (batch, H, W, dim), against its width
    and the dtype of a parameter, or of none where the module holds no floating-point one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if tokens:
        if x.dim() != 4 or x.shape[-1] != dim:
            raise ValueError(f"x must be (batch, H, W, {dim}), got shape {tuple(x.shape)}")
    elif x.dim() not in (3, 4) or x.shape[-3] != dim:
        raise ValueError(f"x must be (batch, {dim}, H, W) or ({dim}, H, W), got shape {tuple(x.shape)}")
    if parameter is None or x.dtype == parameter.dtype:
        return
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        raise TypeError(f"x must have the module's dtype {parameter.dtype} outside autocast, got {x.dtype}")
