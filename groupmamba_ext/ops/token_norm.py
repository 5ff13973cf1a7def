# SPDX-License-Identifier: Apache-2.0
"""`token_norm`: LayerNorm of channels-last images on CUDA."""

from __future__ import annotations

from torch import Tensor

from groupmamba_ext import layouts
from groupmamba_ext._checks import same_device
from groupmamba_ext.autocast import autocast_on_cuda
from groupmamba_ext.registry import Op, call, call_backward

NAME = "token_norm"


def token_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the channels of (batch, H, W, C), of any strides between pixels, where `takes_image`; dense, under
    autocast in its dtype. ``x_bias``, (C,), is added to ``x`` before: up to `BIASED_CHANNELS`."""
    return call(NAME, autocast_on_cuda(x), x_bias, weight, bias, float(eps))


# Fakes and gradient ------------------------------------------------------------------------


def _fake(x, x_bias, weight, bias, eps):
    same_device(NAME, (x, x_bias, weight, bias))
    return layouts.empty_like(x)


def _backward_fake(dy, x, x_bias, weight, bias, eps):
    same_device(NAME, (dy, x, x_bias, weight, bias))
    dx_bias = layouts.empty_absent(x) if x_bias is None else layouts.empty_like(x_bias)
    return layouts.empty_like(x), layouts.empty_like(weight), layouts.empty_like(bias), dx_bias


def _setup(ctx, inputs, output):
    x, x_bias, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, x_bias, weight, bias)


def _backward(ctx, dy):
    x, x_bias, weight, bias = ctx.saved_tensors
    dx, dweight, dbias, dx_bias = call_backward(NAME, dy, x, x_bias, weight, bias, ctx.eps)
    return dx, None if x_bias is None else dx_bias, dweight, dbias, None


OP = Op(NAME, _fake, _setup, _backward, _backward_fake)
