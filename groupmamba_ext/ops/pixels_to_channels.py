# SPDX-License-Identifier: Apache-2.0
"""`pixels_to_channels`: an image of few channels as blocks of 2x2 pixels, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from groupmamba_ext.backend import takes_image
from groupmamba_ext.registry import InferenceOp, call_inference
from groupmamba_ext.transforms import watched

NAME = "pixels_to_channels"
MOST_CHANNELS = 4


def takes_pixels_to_channels(x: Tensor, dtype: torch.dtype) -> bool:
    """True where `pixels_to_channels` takes an image ``x``, (batch, C, H, W), and a dtype, and no gradient is lost."""
    typed = dtype in (torch.float16, torch.bfloat16) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    learnt = torch.is_grad_enabled() and x.requires_grad
    return typed and x.shape[1] <= MOST_CHANNELS and not learnt and not watched() and takes_image(x)


def pixels_to_channels(x: Tensor, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """``groupmamba.models.entry_conv.pixels_to_channels`` in one launch where `takes_pixels_to_channels`.

    Args:
        x: (batch, C, H, W), of any strides.
        kernel_size: 3, 7, 11, ...
        dtype: float16 or bfloat16.

    Returns:
        (batch, 4 C', ceil(H / 2) + k, ceil(W / 2) + k), channels-last; C' is C rounded up to even, k = (kernel_size -
        1) / 2.
    """
    return call_inference(NAME, x, kernel_size, dtype == torch.float16).permute(0, 3, 1, 2)


def _fake(x, kernel_size, half):
    batch, channels, height, width = x.shape
    rows, columns = ((n + 1) // 2 + (kernel_size - 1) // 2 for n in (height, width))
    dtype = torch.float16 if half else torch.bfloat16
    return x.new_empty((batch, rows, columns, 4 * (channels + channels % 2)), dtype=dtype)


OP = InferenceOp(NAME, _fake)
