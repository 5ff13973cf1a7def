# SPDX-License-Identifier: Apache-2.0
"""The scan of one image along several directions, summed: argument checks, autocast, choice of implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from groupmamba_ext import reference
from groupmamba_ext._checks import Arguments, last_size
from groupmamba_ext.backend import use_native
from groupmamba_ext.dispatch import call, may_want_gradient
from groupmamba_ext.ops import (
    DIRECTIONS,
    FUSED_CHANNELS,
    MAX_STATES,
    _autocast,
    check_groups,
    chunk_tokens,
    saved_states,
)


def _slices(dim: int) -> list[int]:
    """Channels of the launches that scan ``dim`` channels on CUDA: csrc/ops/cross_scan_cuda.cpp."""
    count = -(-dim // FUSED_CHANNELS)
    width = dim if count == 1 else -(-dim // count // 4) * 4
    return [min(width, dim - first) for first in range(0, dim, width)]


def saved_chunk(dim: int, device_type: str) -> int:
    """Path tokens between two saved states; on CUDA those of the first slice."""
    return chunk_tokens(dim if device_type == "cpu" else _slices(dim)[0], device_type)


def saved_elements(u: Tensor, scans: int, states: int, chunk: int) -> int:
    """Elements of the states that a forward saves for its backward, ``chunk`` tokens apart; on CUDA in the first
    slice."""
    batch, height, width, groups, dim = u.shape
    kind = u.device.type
    if kind == "cpu":
        elements = saved_states(height, width, dim, kind, chunk) * dim
    else:
        elements = sum(saved_states(height, width, p, kind, chunk_tokens(p, kind)) * p for p in _slices(dim))
    return batch * groups * scans * states * elements


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
    its gradient of ``u``, is rounded to that dtype before the sum, which is in float32.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
        RuntimeError: on a second derivative, or where the compiled library is missing.
    """
    op = "cross_selective_scan"
    args = Arguments(op, "u", u, (4, 5), "(batch, H, W, D) or (batch, H, W, G, D)")
    u, dt, B, C = _autocast(u, dt, B, C)
    args.image = u
    codes = args.directions(directions, None, DIRECTIONS)
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
        return _native_cross(u, dt, A, B, C, D, dt_weight, dt_bias, codes, softplus)
    images = (t.unsqueeze(3) for t in (u, dt))
    A, D, dt_weight, dt_bias = (None if t is None else t.unsqueeze(0) for t in (A, D, dt_weight, dt_bias))
    B, C = B.unsqueeze(3), C.unsqueeze(3)
    return _native_cross(*images, A, B, C, D, dt_weight, dt_bias, codes, softplus).squeeze(3)


def _native_cross(u, dt, A, B, C, D, dt_weight, dt_bias, codes, softplus) -> Tensor:
    """With groups: u (batch, H, W, G, D), A (G, K, D, N)."""
    tensors = (u, dt, A, B, C, D, dt_weight, dt_bias)
    save_states = may_want_gradient(tensors)
    y, _ = call("cross_selective_scan", *tensors, codes, softplus, saved_chunk(u.shape[-1], u.device.type), save_states)
    return y
