# SPDX-License-Identifier: Apache-2.0
"""`grouped_mamba_layer`: the layer of GroupMamba on CUDA as one op, with every image between its products padded."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from groupmamba_ext import layouts
from groupmamba_ext._checks import path_arguments, same_device
from groupmamba_ext.autocast import autocast_on_cuda
from groupmamba_ext.backend import takes_image
from groupmamba_ext.directions import Directions
from groupmamba_ext.layouts import FUSED_CHANNELS
from groupmamba_ext.ops.depthwise_conv3x3 import TOKEN_FLOPS
from groupmamba_ext.ops.grouped_selective_scan import grouped_scan_flops
from groupmamba_ext.registry import Op, call_alone, call_backward

NAME = "grouped_mamba_layer"


class LayerParameters(NamedTuple):
    """In the order of the compiled op's schema; C channels in G groups, E scanned channels a group, N states, R step
    features. Absent are fc1 and fc2 without a gate, and out_proj_weight with skip_scale in the fused variant."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor
    fc1_weight: Tensor | None  # (hidden, C)
    fc1_bias: Tensor | None  # (hidden,)
    fc2_weight: Tensor | None  # (C, hidden), or (G * E, hidden) without out_proj_weight
    fc2_bias: Tensor | None
    in_proj_weight: Tensor  # (G, 2E, C / G)
    conv_weight: Tensor  # (G, E, 3, 3)
    conv_bias: Tensor  # (G, E)
    x_proj_weight: Tensor  # (G, R + 2N, E)
    dt_weight: Tensor  # (G, E, R)
    dt_bias: Tensor  # (G, E)
    A_log: Tensor  # (G, E, N)
    D: Tensor  # (G, E)
    out_norm_weight: Tensor  # (G, E)
    out_norm_bias: Tensor
    out_proj_weight: Tensor | None  # (G, C / G, E)
    skip_scale: Tensor | None  # (1,)
    proj_weight: Tensor  # (C, C), or (C, G * E) without out_proj_weight
    proj_bias: Tensor  # (C,)


class LayerOptions(NamedTuple):
    """What the compiled op takes behind the parameters, in the order of its schema."""

    directions: Sequence[int]  # codes
    eps: float
    norm_eps: float
    chunk: int
    residual: bool
    drop_path_mask: Tensor | None
    drop_path_scale: float


_PARAMETERS = len(LayerParameters._fields)


class ScanPath(NamedTuple):
    """What follows from the directions and the width of the groups, for all calls of a layer."""

    codes: tuple[int, ...]
    chunk: int


def scan_path(directions: Directions, inner_dim: int, states: int) -> ScanPath:
    """Of one direction for each group of ``inner_dim`` scanned channels with ``states`` states each."""
    return ScanPath(directions.codes, _chunk(inner_dim, states))


def _chunk(inner_dim: int, states: int) -> int:
    return layouts.chunk_tokens(layouts.padded(inner_dim), states, "cuda")


def can_fuse(x: Tensor, inner_dim: int) -> bool:
    """True where `grouped_mamba_layer` takes an image ``x`` and groups of ``inner_dim`` scanned channels: what
    `takes_image`, and groups that a warp of the scan holds. Anything else goes through the ops one by one."""
    return inner_dim <= FUSED_CHANNELS and takes_image(x)


def grouped_mamba_layer(
    x: Tensor,
    parameters: LayerParameters,
    *,
    path: ScanPath,
    eps: float,
    norm_eps: float = 1e-5,
    residual: bool = False,
    drop_path: tuple[Tensor, float] | None = None,
) -> Tensor:
    r"""The layer of GroupMamba (arXiv 2407.13772) on CUDA, as the authors' code computes it or in one pass.

    .. code-block:: text

        xn = LayerNorm(x; norm, eps);  gate = sigmoid(fc2(relu(fc1(mean over H, W of xn))))
        u, z = split(in_proj_g(xn_g));  u = silu(conv3x3_g(u));  dt, B, C = split(x_proj_g(u))
        y = grouped_selective_scan(u, dt, -exp(A_log), B, C, D, dt_weight, dt_bias, z, out_norm)
        out = proj(LayerNorm(out_proj_g(y) * skip_scale * xn * gate; norm again))        with out_proj_weight
        out = proj(y * gate)                                                             without

    Args:
        x: (batch, H, W, C), float32, float16 or bfloat16, on CUDA; see `can_fuse`.
        parameters: of dtypes as `x` or float32.
        path: from `scan_path`.
        eps, norm_eps: of ``norm``, of ``out_norm``.
        residual: add ``x`` to the result.
        drop_path: as `feed_forward` takes it, with ``out_proj_weight`` only.

    Returns:
        (batch, H, W, C) in the dtype of ``x``, under autocast in its dtype; pixels lie C rounded up to a multiple of 8
        channels apart, so that products read and write aligned rows.

    Raises:
        RuntimeError: shapes or dtypes that the compiled op does not take.
    """
    x = autocast_on_cuda(x)
    codes, chunk = path
    return call_alone(NAME, x, *parameters, codes, eps, norm_eps, chunk, residual, *(drop_path or (None, 1.0)))


# Fakes and gradient ------------------------------------------------------------------------


def _split(args) -> tuple[LayerParameters, LayerOptions]:
    """Arguments of the compiled op from the parameters on, checked as far as a fake kernel has to."""
    parameters, options = LayerParameters(*args[:_PARAMETERS]), LayerOptions(*args[_PARAMETERS:])
    path_arguments(NAME, options.directions, options.chunk, _chunk(*parameters.A_log.shape[1:]))
    return parameters, options


def _inference_fake(x, *args):
    same_device(NAME, (x, *args))
    _split(args)
    return layouts.empty_padded_image(x)


def _fake(x, *args):
    out = _inference_fake(x, *args)
    parameters, options = _split(args)
    batch, height, width, channels = x.shape
    groups, inner, states = parameters.A_log.shape
    sizes = layouts.LayerSizes(
        batch, height, width, groups, channels, inner, states,
        rank=parameters.dt_weight.shape[2],
        hidden=0 if parameters.fc1_weight is None else parameters.fc1_weight.shape[0],
        merges=parameters.out_proj_weight is not None,
    )  # fmt: skip
    floats = layouts.count_of(x, lambda: layouts.layer_saved_floats(sizes, options.chunk))
    return out, x.new_empty((layouts.layer_saved_images(sizes),)), x.new_empty((floats,), dtype=torch.float32)


def _backward_fake(dout, x, *args):
    same_device(NAME, (dout, x, *args))
    parameters, (_saved, _saved_float, *options) = args[:_PARAMETERS], args[_PARAMETERS:]
    _split((*parameters, *options))
    absent = functools.partial(layouts.empty_absent, x, torch.float32)
    return layouts.empty_padded_image(x), *(absent() if t is None else layouts.empty_gradient(t) for t in parameters)


def _setup(ctx, inputs, output):
    *tensors, codes, eps, norm_eps, chunk, residual, mask, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:], mask)
    ctx.scalars = (codes, eps, norm_eps, chunk, residual)
    ctx.drop_path_scale = scale


def _backward(ctx, dout, *_):
    options = len(LayerOptions._fields)
    if dout is None:
        return (None,) * (1 + _PARAMETERS + options)
    *saved, mask = ctx.saved_tensors
    grads = call_backward(NAME, dout, *saved, *ctx.scalars, mask, ctx.drop_path_scale)
    grads = (g if t is not None else None for g, t in zip(grads, saved[: 1 + _PARAMETERS], strict=True))
    return (*grads, *(None,) * options)


# FLOPs -------------------------------------------------------------------------------------


def _parts_flops(x, args) -> tuple[int, int]:
    """Of what has two derivatives, and of the scan."""
    p = LayerParameters(*args[:_PARAMETERS])
    tokens = x[0] * x[1] * x[2]
    groups, inner, _ = p.A_log
    weights = [p.in_proj_weight, p.x_proj_weight, p.proj_weight, *([p.out_proj_weight] if p.out_proj_weight else [])]
    others = tokens * (2 * sum(map(math.prod, weights)) + TOKEN_FLOPS * groups * inner)
    if p.fc1_weight:
        others += 2 * x[0] * (math.prod(p.fc1_weight) + math.prod(p.fc2_weight))
    return others, grouped_scan_flops((tokens, groups, inner), p.A_log, p.D, p.dt_weight)


def _flops(x, *args, out_shape=None, **kwargs) -> int:
    return sum(_parts_flops(x, args))


def _backward_flops(dout, x, *args, out_shape=None, **kwargs) -> int:
    others, scan = _parts_flops(x, args)
    return 2 * others + 3 * scan


OP = Op(NAME, _fake, _setup, _backward, _backward_fake, _flops, _backward_flops, _inference_fake)
