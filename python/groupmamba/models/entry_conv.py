# SPDX-License-Identifier: Apache-2.0
"""A convolution of stride 2 over few channels, in the shape that tensor cores take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba_ext.ops import pixels_to_channels as on_cuda
from groupmamba_ext.ops.narrow_conv import narrow_conv, takes_narrow_conv

MOST_CHANNELS = 4  # of an image: with more, cuDNN has kernels for the convolution as it is


def pixel_blocks(x: Tensor, conv: nn.Conv2d) -> Tensor | None:
    """`pixels_to_channels` of ``x`` where the convolution ``conv`` is faster on that, by `taps_to_channels` of its
    weight; None elsewhere.

    For half and bfloat16 on CUDA and at most 4 channels. ``conv`` has stride 2, a kernel of 3, 7, 11, ... and half of
    that as padding, and no bias. (For 3 channels cuDNN otherwise falls back to a kernel without tensor cores: 0.78 ms
    in place of 0.40 for 128 x 224 x 224 on an H100, and 0.55 in place of 0.24 for the gradient of the weight.)
    """
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
    if not x.is_cuda or dtype not in (torch.float16, torch.bfloat16) or conv.in_channels > MOST_CHANNELS:
        return None
    return pixels_to_channels(x, conv.kernel_size[0], dtype)


def conv_on_blocks(blocks: Tensor, weight: Tensor) -> Tensor:
    """The convolution by ``weight``, (out, C, K, K), of the image whose `pixel_blocks` are given."""
    weight = taps_to_channels(weight)
    if takes_narrow_conv(blocks, weight, 0):
        return narrow_conv(blocks, weight, 0)
    return F.conv2d(blocks, weight.to(blocks.dtype))


def _channels(n: int) -> int:
    """Of a pixel, with the zeros behind them that make a 2x2 block a multiple of 8."""
    return n + n % 2


def pixels_to_channels(x: Tensor, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """(batch, C, H, W) to blocks of 2x2 pixels, zeros around them: (batch, 4 C', ceil(H / 2) + k, ceil(W / 2) + k).

    C' is C rounded up to even, k = (kernel_size - 1) / 2; channels-last, in ``dtype``.
    """
    if on_cuda.takes_pixels_to_channels(x, dtype):
        return on_cuda.pixels_to_channels(x, kernel_size, dtype)
    batch, channels, height, width = x.shape
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    before, more = (kernel_size + 1) // 4, (kernel_size - 1) // 2
    blocks = x.new_zeros((batch, rows + more, columns + more, 2, 2, _channels(channels)), dtype=dtype)
    pixels = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 3, 5, 1)
    blocks[:, before : before + rows, before : before + columns, ..., :channels].copy_(pixels)
    return blocks.flatten(3).permute(0, 3, 1, 2)


def taps_to_channels(weight: Tensor) -> Tensor:
    """The kernel (out, C, K, K) for :func:`pixels_to_channels`: (out, 4 C', (K + 1) / 2, (K + 1) / 2)."""
    out, channels, taps, _ = weight.shape
    half = (taps + 1) // 2
    weight = F.pad(weight, (1, 0, 1, 0, 0, _channels(channels) - channels))
    weight = weight.unflatten(3, (half, 2)).unflatten(2, (half, 2)).permute(0, 2, 4, 3, 5, 1)
    return weight.flatten(3).permute(0, 3, 1, 2)
