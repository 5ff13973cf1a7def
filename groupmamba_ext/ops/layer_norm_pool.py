# SPDX-License-Identifier: Apache-2.0
"""`layer_norm_pool`: LayerNorm of an image and the mean of the result."""

from __future__ import annotations

from torch import Tensor

from groupmamba_ext import layouts, reference
from groupmamba_ext._checks import Arguments, same_device
from groupmamba_ext.autocast import autocast
from groupmamba_ext.backend import use_native
from groupmamba_ext.registry import Op, call, call_backward

NAME = "layer_norm_pool"


def layer_norm_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """LayerNorm over the channels of an image and the mean of the result over the image, in one read.

    Args:
        x: (batch, H, W, C); float32, float16, bfloat16 or float64.
        weight, bias: (C,), dtype of ``x`` or float32.
        eps: added to the variance.

    Returns:
        The normalised image like ``x``, and its mean over H and W, (batch, C) in float32 (float64 for float64), taken
        before rounding to the dtype of ``x``.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
    """
    op = NAME
    args = Arguments(op, "x", x, (4,), "(batch, H, W, C)")
    (x,) = autocast(x)
    args.image = x
    args.parameter("weight", weight, x.shape[-1:], "(C,)")
    args.parameter("bias", bias, x.shape[-1:], "(C,)")
    args.eps("eps", eps)
    if not use_native(x, op):
        return reference.layer_norm_pool(x, weight, bias, eps)
    return call(NAME, x, weight, bias, float(eps))


# Fakes and gradient ------------------------------------------------------------------------


def _fake(x, weight, bias, eps):
    same_device(NAME, (x, weight, bias))
    pooled = x.new_empty((x.shape[0], x.shape[3]), dtype=layouts.accumulate_dtype(x.dtype))
    return layouts.empty_like(x), pooled


def _backward_fake(dxn, dpooled, x, weight, bias, eps):
    same_device(NAME, (dxn, dpooled, x, weight, bias))
    return tuple(layouts.empty_like(t) for t in (x, weight, bias))


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, dxn, dpooled):
    return (*call_backward(NAME, dxn, dpooled, *ctx.saved_tensors, ctx.eps), None)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake)
