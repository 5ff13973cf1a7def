# SPDX-License-Identifier: Apache-2.0
"""`cross_selective_scan`: one image scanned along several directions, and the results added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from groupmamba_ext import layouts, reference
from groupmamba_ext._checks import Arguments, last_size, path_arguments, same_device
from groupmamba_ext.autocast import autocast
from groupmamba_ext.backend import use_native
from groupmamba_ext.directions import DIRECTIONS, direction_codes
from groupmamba_ext.layouts import MAX_STATES
from groupmamba_ext.ops.grouped_selective_scan import NO_STATES, channel_flops, check_groups
from groupmamba_ext.registry import Op, call, call_backward, may_want_gradient

NAME = "cross_selective_scan"


class CrossScanInputs(NamedTuple):
    """The tensors of a cross scan, in the order of the compiled op's schema; shapes as in `cross_selective_scan` with
    groups: u (batch, H, W, G, D), A (G, K, D, N) and so on."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_weight: Tensor | None = None
    dt_bias: Tensor | None = None


_TENSORS = len(CrossScanInputs._fields)


def cross_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
) -> Tensor:
    r"""Scans an image along K directions, each with its own parameters, and adds the results: 4-D scanning for K = 4.

    .. code-block:: text

        step_kt = softplus(dt_weight_k dt_kt + dt_bias_k)                t the position on path k over the image
        h_kt = exp(step_kt A_k) h_k,t-1 + step_kt B_kt u_t
        y = sum over k of C_kt . h_kt + D_k u_t

    The cross scan of VMamba (arXiv 2401.10166) from the image to the merged result; the ablation of GroupMamba (arXiv
    2407.13772) calls it 4-D scanning. ``u`` may hold several groups of channels; each is scanned in all directions,
    with its own parameters.

    Args:
        u: input, (batch, H, W, D), or (batch, H, W, G, D) for G groups; any strides, no copy where channels are
            adjacent and rows follow one another.
        dt: low-rank step features (batch, H, W, K, R) with ``dt_weight``, else the step before bias and softplus,
            (batch, H, W, K, D). For G groups (batch, H, W, G, K, ...), and so on below: G before K.
        A: (K, D, N), negative. N up to 256.
        B, C: (batch, H, W, K, N).
        D: skip, (K, D).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        directions: K of ``"lr"`` (row-major), ``"rl"`` (its reverse), ``"tb"`` (column-major), ``"bt"`` (its reverse),
            K at least 1, in the order in which the parameters hold them. VMamba's weights need (lr, tb, rl, bt).
        softplus: apply softplus to the step.

    Returns:
        Like ``u``: its shape, dtype and order of dimensions in memory.

    u, dt, B and C share one dtype: float32, float16, bfloat16, or float64 (on CUDA through the reference). The other
    tensors have that dtype or float32. Under autocast the former are cast to its dtype. States are float32 (float64 for
    float64). Gradients have their input's dtype; results are bitwise repeatable. On CUDA each direction's result, and
    its gradient of ``u``, is rounded to that dtype before the sum, which is in float32. On CUDA of compute
    capability 9.0, with 16-bit images of more than 64 channels, tensor cores compute the gradients behind the steps,
    and from rank 15 on the steps too: they round ``dt_weight`` and the gradients of the steps to 11 bits (TF32).

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
        RuntimeError: on a second derivative, or where the compiled library is missing.
    """
    op = NAME
    args = Arguments(op, "u", u, (4, 5), "(batch, H, W, D) or (batch, H, W, G, D)")
    u, dt, B, C = autocast(u, dt, B, C)
    args.image = u
    codes = direction_codes(args.owner, directions, None)
    args.boolean("softplus", softplus)
    dim, count = u.shape[-1], len(codes)
    scans = (*u.shape[3:-1], count)  # (K,) or (G, K)
    k = "G, K" if u.dim() == 5 else "K"
    states = last_size(op, "A", A, len(scans) + 2, f"({k}, D, N)")
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"{op}: A must be ({k}, D, N) with N from 1 to {MAX_STATES}, got shape {tuple(A.shape)}")
    if 0 in u.shape[3:]:
        raise ValueError(f"{op}: u must have at least one group and one channel, got shape {tuple(u.shape)}")
    tokens = (*u.shape[:3], *scans)
    if dt_weight is None:
        args.like_image("dt", dt, (*tokens, dim), f"(batch, H, W, {k}, D) without dt_weight")
    else:
        rank = last_size(op, "dt_weight", dt_weight, len(scans) + 2, f"({k}, D, R)")
        args.parameter("dt_weight", dt_weight, (*scans, dim, rank), f"({k}, D, R)")
        args.like_image("dt", dt, (*tokens, rank), f"(batch, H, W, {k}, R)")
        if rank < 1:
            raise ValueError(f"{op}: dt_weight must be ({k}, D, R) with R at least 1, got {tuple(dt_weight.shape)}")
    args.parameter("A", A, (*scans, dim, states), f"({k}, D, N)")
    args.like_image("B", B, (*tokens, states), f"(batch, H, W, {k}, N)")
    args.like_image("C", C, (*tokens, states), f"(batch, H, W, {k}, N)")
    args.parameter("D", D, (*scans, dim), f"({k}, D)", optional=True)
    args.parameter("dt_bias", dt_bias, (*scans, dim), f"({k}, D)", optional=True)

    if not use_native(u, op):
        return reference.cross_selective_scan(
            u, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, directions=directions, softplus=softplus
        )
    check_groups(op, u, math.prod(scans), "groups times directions")
    if u.dim() == 5:
        return _native(CrossScanInputs(u, dt, A, B, C, D, dt_weight, dt_bias), codes, softplus)
    u, dt, B, C = (t.unsqueeze(3) for t in (u, dt, B, C))
    A, D, dt_weight, dt_bias = (None if t is None else t.unsqueeze(0) for t in (A, D, dt_weight, dt_bias))
    return _native(CrossScanInputs(u, dt, A, B, C, D, dt_weight, dt_bias), codes, softplus).squeeze(3)


def _native(inputs: CrossScanInputs, codes: Sequence[int], softplus: bool) -> Tensor:
    u = inputs.u
    save_states = may_want_gradient(inputs)
    chunk = layouts.cross_chunk(u.shape[-1], inputs.A.shape[-1], u.device.type)
    y, _ = call(NAME, *inputs, codes, softplus, chunk, save_states)
    return y


# Fakes and gradient ------------------------------------------------------------------------


def _check_path(inputs: CrossScanInputs, directions: Sequence[int], chunk: int) -> None:
    kind = inputs.u.device.type
    expected = layouts.cross_chunk(inputs.u.shape[4], inputs.A.shape[-1], kind) if kind == "cuda" else None
    path_arguments(NAME, directions, chunk, expected)


def _fake(*args):
    inputs = CrossScanInputs(*args[:_TENSORS])
    directions, _softplus, chunk, save_states = args[_TENSORS:]
    u = inputs.u
    same_device(NAME, inputs)
    _check_path(inputs, directions, chunk)

    def count() -> int:
        return layouts.cross_saved_elements(u, len(directions), inputs.A.shape[3], chunk)

    states = layouts.count_of(u, count) if save_states else 0
    return layouts.empty_image(u), u.new_empty((states,), dtype=layouts.accumulate_dtype(u.dtype))


def _backward_fake(dy, *args):
    inputs = CrossScanInputs(*args[:_TENSORS])
    states, directions, _softplus, chunk = args[_TENSORS:]
    u = inputs.u
    same_device(NAME, (dy, *inputs, states))
    _check_path(inputs, directions, chunk)
    others = (layouts.empty_absent(u) if t is None else layouts.empty_like(t) for t in inputs[1:])
    return layouts.empty_image(u), *others


def _setup(ctx, inputs, output):
    *tensors, directions, softplus, chunk, save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.scalars = (directions, softplus, chunk)
    ctx.saved_states = save_states


def _backward(ctx, dy, _dstates):
    if dy is None:
        return (None,) * (_TENSORS + 4)
    if not ctx.saved_states:
        raise RuntimeError(NO_STATES.format(NAME))
    *tensors, states = ctx.saved_tensors
    grads = call_backward(NAME, dy, *tensors, states, *ctx.scalars)
    return (*(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None, None, None)


# FLOPs -------------------------------------------------------------------------------------


def cross_scan_flops(
    u_shape: Sequence[int],
    A_shape: Sequence[int],
    D_shape: Sequence[int] | None = None,
    dt_weight_shape: Sequence[int] | None = None,
) -> int:
    """Of one forward cross scan, from the shapes of its arguments: as many grouped scans as directions, and an addition
    a direction but the first."""
    count = A_shape[-3]
    return math.prod(u_shape) * (count * channel_flops(A_shape, D_shape, dt_weight_shape) + count - 1)


def _flops(u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    return cross_scan_flops(u, A, D, dt_weight)


def _backward_flops(dy, u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    return 3 * cross_scan_flops(u, A, D, dt_weight)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake, _flops, _backward_flops)
