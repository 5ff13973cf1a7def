# SPDX-License-Identifier: Apache-2.0
"""`batch_norm_relu`: BatchNorm with the statistics of the batch, and ReLU, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from groupmamba_ext import layouts
from groupmamba_ext._checks import same_device
from groupmamba_ext.backend import takes_image
from groupmamba_ext.layouts import BATCH_NORM_CHANNELS, PIXEL_UNIT
from groupmamba_ext.registry import Op, call, call_backward

NAME = "batch_norm_relu"


def takes_batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """True where `batch_norm_relu` takes an image ``x``, (batch, C, H, W), and a norm's parameters."""
    fits = x.dim() == 4 and x.shape[1] % PIXEL_UNIT == 0 and x.shape[1] <= BATCH_NORM_CHANNELS
    typed = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and typed and all(t.dtype in (x.dtype, torch.float32) for t in (weight, bias)) and takes_image(x)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``relu(BatchNorm(x))`` with the statistics of the batch, where `takes_batch_norm` and there are several pixels.

    Args:
        x: (batch, C, H, W), in ``torch.channels_last`` format, else it is copied.
        weight, bias: (C,).

    Returns:
        The image, channels-last in the dtype of ``x``, and (3, C) in float32: mean, variance by n - 1 as BatchNorm's
        running statistics take it, 1 / sqrt(variance by n + eps).
    """
    y, stats = call(NAME, x.permute(0, 2, 3, 1), weight, bias, float(eps))
    return y.permute(0, 3, 1, 2), stats


# Fakes and gradient ------------------------------------------------------------------------


def _fake(x, weight, bias, eps):
    same_device(NAME, (x, weight, bias))
    return layouts.empty_like(x), x.new_empty((3, x.shape[3]), dtype=torch.float32)


def _backward_fake(dy, x, weight, bias, stats, eps):
    same_device(NAME, (dy, x, weight, bias, stats))
    return layouts.empty_like(x), layouts.empty_like(weight), layouts.empty_like(bias)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _backward(ctx, dy, _dstats):
    if dy is None:
        return (None,) * 4
    return (*call_backward(NAME, dy, *ctx.saved_tensors, ctx.eps), None)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake)
