# SPDX-License-Identifier: Apache-2.0
"""`feed_forward`: a block's second half on CUDA, norm, two products and a convolution between them, as one op."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from groupmamba_ext import layouts
from groupmamba_ext._checks import same_device
from groupmamba_ext.autocast import autocast_on_cuda
from groupmamba_ext.ops.depthwise_conv3x3 import TOKEN_FLOPS
from groupmamba_ext.registry import Op, call_alone, call_backward

NAME = "feed_forward"


class FeedForwardParameters(NamedTuple):
    """In the order of the compiled op's schema; C channels, ``hidden`` between the products."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor
    fc1_weight: Tensor  # (hidden, C)
    fc1_bias: Tensor  # (hidden,)
    conv_weight: Tensor  # (hidden, 1, 3, 3)
    conv_bias: Tensor  # (hidden,)
    fc2_weight: Tensor  # (C, hidden)
    fc2_bias: Tensor  # (C,)


_PARAMETERS = len(FeedForwardParameters._fields)
_SCALARS = 4  # eps, residual, drop_path_mask, drop_path_scale


def feed_forward(
    x: Tensor,
    parameters: FeedForwardParameters,
    *,
    eps: float,
    residual: bool = False,
    drop_path: tuple[Tensor, float] | None = None,
) -> Tensor:
    """``fc2(gelu(conv3x3(fc1(LayerNorm(x)))))``, with ``residual`` added to ``x``, where `takes_image`.

    Args:
        x: (batch, H, W, C).
        parameters: of dtypes as `x` or float32.
        eps: of the norm.
        residual: add ``x`` to the result.
        drop_path: with ``residual``, stochastic depth, (mask, scale): the mask (batch,) in float32, 1 for images whose
            result counts, ``scale`` times, and 0 for the others.

    Returns:
        (batch, H, W, C) in the dtype of ``x``, under autocast in its dtype; pixels lie C rounded up to a multiple of 8
        channels apart.

    Raises:
        RuntimeError: shapes or dtypes that the compiled op does not take; on a second derivative.
    """
    x = autocast_on_cuda(x)
    return call_alone(NAME, x, *parameters, float(eps), residual, *(drop_path or (None, 1.0)))


# Fakes and gradient ------------------------------------------------------------------------


def _inference_fake(x, *args):
    same_device(NAME, (x, *args))
    return layouts.empty_padded_image(x)


def _fake(x, *args):
    out = _inference_fake(x, *args)
    parameters = FeedForwardParameters(*args[:_PARAMETERS])
    *image, channels = x.shape
    saved = layouts.feed_forward_saved(math.prod(image), channels, parameters.fc1_weight.shape[0], x.dtype)
    return out, x.new_empty((saved,))


def _backward_fake(dout, x, *args):
    same_device(NAME, (dout, x, *args))
    return layouts.empty_padded_image(x), *map(layouts.empty_gradient, args[:_PARAMETERS])


def _setup(ctx, inputs, output):
    *tensors, eps, residual, mask, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:], mask)
    ctx.scalars = (eps, residual)
    ctx.drop_path_scale = scale


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * (1 + _PARAMETERS + _SCALARS)
    *saved, mask = ctx.saved_tensors
    grads = call_backward(NAME, dout, *saved, *ctx.scalars, mask, ctx.drop_path_scale)
    return (*grads, *(None,) * _SCALARS)


# FLOPs -------------------------------------------------------------------------------------


def _flops(x, *args, out_shape=None, **kwargs) -> int:
    hidden, channels = FeedForwardParameters(*args[:_PARAMETERS]).fc1_weight
    return x[0] * x[1] * x[2] * hidden * (4 * channels + TOKEN_FLOPS)


def _backward_flops(dout, x, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(x, *args)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake, _flops, _backward_flops, _inference_fake)
