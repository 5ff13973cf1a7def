# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the layers: each error names the argument and the value that came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupmamba_ext._checks import IMAGE_DTYPES, MAX_INT, dense_tensor, shown


def positive_int(name: str, value: object, most: int = MAX_INT) -> int:
    """``value`` if it is an int from 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return value


def rate(name: str, value: object) -> float:
    """``value`` if it is a number from 0 up to but not 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be from 0 up to but not 1, got {shown(value)}")
    return value


def sequence(name: str, value: object) -> Sequence:
    """``value`` if it is a list, a tuple or another sequence, but no text."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {shown(value)}")
    return value


def scaled_width(name: str, ratio: object, width: int) -> int:
    """``int(ratio * width)`` if that is at least 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(ratio)}")
    scaled = ratio * width
    if not -MAX_INT <= scaled <= MAX_INT:  # NaN, infinities, and what no tensor has
        raise ValueError(f"{name} must be finite and make at most {MAX_INT} channels of {width}, got {shown(ratio)}")
    if scaled < 1:
        raise ValueError(f"{name} must make at least one channel out of {width}, got {shown(ratio)}")
    return int(scaled)


def parameter_dtype(dtype: object) -> None:
    """Checks the dtype of a module's parameters, None for torch's default."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {shown(dtype)}")
    if dtype is not None and dtype not in IMAGE_DTYPES:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")


def image_input(x: Tensor, dim: int, parameter: Tensor | None, *, tokens: bool = False) -> None:
    """Checks a module's input (batch, dim, H, W) or (dim, H, W), with ``tokens`` (batch, H, W, dim), against its width
    and the dtype of a parameter, or of none where the module holds no floating-point one."""
    dense_tensor("", "x", x)
    if x.dtype not in IMAGE_DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
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
