# SPDX-License-Identifier: Apache-2.0
"""`depthwise_conv3x3`: 3x3 depthwise convolution of channels-last images, with bias and activation."""

from __future__ import annotations

import math

from torch import Tensor

from groupmamba_ext import layouts, reference
from groupmamba_ext._checks import Arguments, activation_code, choice, same_device
from groupmamba_ext.autocast import autocast
from groupmamba_ext.backend import use_native
from groupmamba_ext.registry import Op, call, call_backward

NAME = "depthwise_conv3x3"
ACTIVATIONS = (None, "silu", "gelu")  # the code of each in csrc/schemas.cpp is its place here
TOKEN_FLOPS = 18  # of a channel of a token: nine taps


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """3x3 depthwise convolution of a channels-last image with zero padding, bias and activation in one pass.

    Args:
        x: (batch, H, W, C), or (batch, H, W, G, D) for grouped storage; float32, float16, bfloat16 or float64.
        weight: (C, 3, 3) or (C, 1, 3, 3); (G, D, 3, 3) for grouped ``x``. dtype of ``x`` or float32.
        bias: (C,), or (G, D).
        activation: ``None``, ``"silu"`` or ``"gelu"`` (the erf form).

    Returns:
        Like ``x``, in its order of dimensions in memory. Cross-correlation, as :class:`torch.nn.Conv2d` with
        ``groups=C, padding=1``.

        Many images in 16 bits are convolved by tensor cores on GPUs of compute capability 9.0 (`explain` says where).
        Products there are of 16-bit numbers, added up in float32: float32 weights are rounded to bfloat16 (beside
        float16 images they are left to other kernels), and in the backward the gradients before the activation are
        rounded to the dtype of ``x``. A value that is not finite reaches the results of
        the eight adjacent channels that are computed with it, at the pixels around it.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
    """
    op = NAME
    args = Arguments(op, "x", x, (4, 5), "(batch, H, W, C) or (batch, H, W, G, D)")
    (x,) = autocast(x)
    args.image = x
    choice(args.owner, "activation", activation, ACTIVATIONS)
    if x.dim() == 5:
        groups, dim = x.shape[3:]
        args.parameter("weight", weight, (groups, dim, 3, 3), "(G, D, 3, 3)")
        args.parameter("bias", bias, (groups, dim), "(G, D)", optional=True)
    else:
        groups, dim = 1, x.shape[3]
        if isinstance(weight, Tensor) and weight.dim() == 4:
            args.parameter("weight", weight, (dim, 1, 3, 3), "(C, 1, 3, 3)")
        else:
            args.parameter("weight", weight, (dim, 3, 3), "(C, 3, 3)")
        args.parameter("bias", bias, (dim,), "(C,)", optional=True)
    if not use_native(x, op):
        return reference.depthwise_conv3x3(x, weight, bias, activation=activation)
    image = x if x.dim() == 5 else x.unsqueeze(3)
    y = call(
        NAME,
        image,
        weight.reshape(groups, dim, 3, 3),
        None if bias is None else bias.reshape(groups, dim),
        ACTIVATIONS.index(activation),
    )
    return y if x.dim() == 5 else y.squeeze(3)


# Fakes and gradient ------------------------------------------------------------------------


def _fake(x, weight, bias, activation):
    same_device(NAME, (x, weight, bias))
    activation_code(NAME, activation)
    return layouts.empty_image(x)


def _backward_fake(dy, x, weight, bias, activation):
    same_device(NAME, (dy, x, weight, bias))
    activation_code(NAME, activation)
    dbias = layouts.empty_absent(x) if bias is None else layouts.empty_like(bias)
    return layouts.empty_image(x), layouts.empty_like(weight), dbias


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = call_backward(NAME, dy, x, weight, bias, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None


# FLOPs -------------------------------------------------------------------------------------


def _flops(x, weight, *args, out_shape=None, **kwargs) -> int:
    return TOKEN_FLOPS * math.prod(x)


def _backward_flops(dy, x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * TOKEN_FLOPS * math.prod(x)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake, _flops, _backward_flops)
