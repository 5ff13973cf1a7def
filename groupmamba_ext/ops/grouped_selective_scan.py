# SPDX-License-Identifier: Apache-2.0
"""`grouped_selective_scan`: every channel group of an image scanned along its own direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groupmamba_ext import _explain, layouts, reference
from groupmamba_ext._checks import Arguments, last_size, path_arguments, same_device
from groupmamba_ext.autocast import autocast
from groupmamba_ext.backend import use_native
from groupmamba_ext.directions import DIRECTIONS, direction_codes
from groupmamba_ext.layouts import FUSED_CHANNELS, MAX_GROUPS, MAX_STATES
from groupmamba_ext.registry import Op, call, call_backward, may_want_gradient

NAME = "grouped_selective_scan"
NO_STATES = (
    "{}: this forward saved nothing for a backward (save_states=False): it was traced where nothing required a gradient"
)
_IMAGE = "(batch, H, W, G, D)"


class ScanInputs(NamedTuple):
    """The tensors of a scan, in the order of the compiled op's schema; shapes as in `grouped_selective_scan`."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_weight: Tensor | None = None
    dt_bias: Tensor | None = None
    z: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    gate: Tensor | None = None


_TENSORS = len(ScanInputs._fields)


def check_groups(op: str, image: Tensor, count: int, what: str) -> None:
    """ValueError where kernels on CUDA would have to scan more than `MAX_GROUPS` groups at once."""
    if image.device.type == "cuda" and count > MAX_GROUPS:
        raise ValueError(f"{op}: u must have at most {MAX_GROUPS} {what} on CUDA, got {count}")


def grouped_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
) -> Tensor:
    r"""Scans every channel group of an image by its own selective state-space model along its own direction.

    For group g, with t the position on its path over the image:

    .. code-block:: text

        step_t = softplus(dt_weight dt_t + dt_bias)
        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t
        y_t = C_t . h_t + D u_t
        out = LayerNorm(y_t; norm_weight, norm_bias) * silu(z_t) * gate          (each factor only if given)

    in one pass over the image: flips, step projection, scan, norm and gates write nothing in between. Backward
    recomputes the states from saved chunk boundaries. GroupMamba (arXiv 2407.13772), grouped Mamba operator and
    channel affinity modulation.

    Args:
        u: input, (batch, H, W, G, D); any strides, no copy where channels are adjacent and rows follow one another.
            (16-bit images on sm_90 with N = 1, ``z`` and a norm are copied too where D or the strides of
            pixels, groups or images are no multiples of 8, and so are ``z``, the result and their gradients.)
        dt: low-rank step features (batch, H, W, G, R) with ``dt_weight``, else the step before bias and softplus,
            (batch, H, W, G, D).
        A: (G, D, N), negative. N up to 256.
        B, C: (batch, H, W, G, N).
        D: skip, (G, D).
        dt_weight: (G, D, R).
        dt_bias: (G, D).
        z: gate branch, like ``u``.
        norm_weight, norm_bias: (G, D); LayerNorm over D with ``norm_eps``. ``norm_bias`` needs ``norm_weight``.
        gate: channel affinity, (batch, G, D).
        directions: one of ``"lr"`` (row-major), ``"rl"`` (its reverse), ``"tb"`` (column-major), ``"bt"`` (its
            reverse) for each group. The default is the paper's order; the released code's is (lr, tb, rl, bt).
        softplus: apply softplus to the step.

    Returns:
        (batch, H, W, G, D), dtype of ``u`` and its order of dimensions in memory (group-major in, group-major out).

    u, dt, B, C and z share one dtype: float32, float16, bfloat16, or float64 (on CUDA through the reference). The
    other tensors have that dtype or float32. Under autocast the former are cast to its dtype. Arithmetic is float32
    (float64 for float64). Gradients have their input's dtype; results are bitwise repeatable.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
        RuntimeError: on a second derivative, or where the compiled library is missing.
    """
    op = NAME
    args = Arguments(op, "u", u, (5,), _IMAGE)
    u, dt, B, C, z = autocast(u, dt, B, C, z)
    args.image = u
    batch, height, width, groups, dim = u.shape
    codes = direction_codes(args.owner, directions, groups)
    args.boolean("softplus", softplus)
    args.eps("norm_eps", norm_eps)
    states = last_size(op, "A", A, 3, "(G, D, N)")
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"{op}: A must be (G, D, N) with N from 1 to {MAX_STATES}, got shape {tuple(A.shape)}")
    if dim < 1 or groups < 1:
        raise ValueError(f"{op}: u must have at least one group and one channel, got shape {tuple(u.shape)}")
    tokens = (batch, height, width, groups)
    if dt_weight is None:
        args.like_image("dt", dt, (*tokens, dim), "(batch, H, W, G, D) without dt_weight")
    else:
        rank = last_size(op, "dt_weight", dt_weight, 3, "(G, D, R)")
        args.parameter("dt_weight", dt_weight, (groups, dim, rank), "(G, D, R)")
        args.like_image("dt", dt, (*tokens, rank), "(batch, H, W, G, R)")
        if rank < 1:
            raise ValueError(f"{op}: dt_weight must be (G, D, R) with R at least 1, got {tuple(dt_weight.shape)}")
    args.parameter("A", A, (groups, dim, states), "(G, D, N)")
    args.like_image("B", B, (*tokens, states), "(batch, H, W, G, N)")
    args.like_image("C", C, (*tokens, states), "(batch, H, W, G, N)")
    for name, value in (("D", D), ("dt_bias", dt_bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        args.parameter(name, value, (groups, dim), "(G, D)", optional=True)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight, got norm_weight=None")
    if z is not None:
        args.like_image("z", z, u.shape, _IMAGE)
    args.parameter("gate", gate, (batch, groups, dim), "(batch, G, D)", optional=True)

    if not use_native(u, op):
        return reference.grouped_selective_scan(
            u, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, z=z, norm_weight=norm_weight,
            norm_bias=norm_bias, norm_eps=norm_eps, gate=gate, directions=directions, softplus=softplus,
        )  # fmt: skip
    check_groups(op, u, groups * (-(-dim // FUSED_CHANNELS)), "groups, or tiles of 128 channels,")
    inputs = ScanInputs(u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate)
    scan = _tiled if u.device.type == "cuda" and dim > FUSED_CHANNELS else _native
    return scan(inputs, codes, softplus, norm_eps)


def _native(inputs: ScanInputs, codes: Sequence[int], softplus: bool, norm_eps: float) -> Tensor:
    save_states = may_want_gradient(inputs)
    u = inputs.u
    chunk = layouts.chunk_tokens(u.shape[-1], inputs.A.shape[-1], u.device.type)
    y, _ = call(NAME, *inputs, codes, softplus, float(norm_eps), chunk, save_states)
    return y


def _tiled(inputs: ScanInputs, codes: Sequence[int], softplus: bool, norm_eps: float) -> Tensor:
    """Groups wider than a warp holds: equal tiles of channels scanned as groups of their own, then norm and gates.

    In float32, so that nothing is rounded before the norm.
    """
    u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate = inputs
    batch, height, width, groups, dim = u.shape
    tiles = -(-dim // FUSED_CHANNELS)
    if _explain.asked():
        _explain.note(
            f"grouped_selective_scan: {tiles} scans a group in float32, norm and gates by torch: a group has {dim} "
            f"channels, a warp holds {FUSED_CHANNELS}"
        )
    tile = -(-dim // tiles)
    pad = tiles * tile - dim

    def split(t: Tensor | None) -> Tensor | None:  # (..., G, D) -> (..., G * tiles, tile)
        return None if t is None else F.pad(t.float(), (0, pad)).reshape(*t.shape[:-2], groups * tiles, tile)

    def split_rows(t: Tensor) -> Tensor:  # (G, D, K) -> (G * tiles, tile, K)
        # Channels that do not exist take the rows of the last one: their steps are finite where its steps are. A
        # dt_weight of 0 would make NaN of a feature of -inf, which masks a token.
        t = t.float()
        if pad > 0:
            t = torch.cat([t, t[:, -1:].detach().expand(groups, pad, t.shape[-1])], 1)
        return t.reshape(groups * tiles, tile, t.shape[-1])

    def repeat(t: Tensor) -> Tensor:  # (batch, H, W, G, K) -> (batch, H, W, G * tiles, K)
        t = t.float().unsqueeze(4).expand(*t.shape[:4], tiles, t.shape[4])
        return t.reshape(batch, height, width, groups * tiles, t.shape[-1])

    tiled = ScanInputs(
        u=split(u),
        dt=split(dt) if dt_weight is None else repeat(dt),
        A=split_rows(A),
        B=repeat(B),
        C=repeat(C),
        D=split(D),
        dt_weight=None if dt_weight is None else split_rows(dt_weight),
        dt_bias=split(dt_bias),
    )
    y = _native(tiled, tuple(code for code in codes for _ in range(tiles)), softplus, norm_eps)
    y = y.reshape(batch, height, width, groups, tiles * tile)[..., :dim]
    if norm_weight is not None:
        y = F.layer_norm(y, (dim,), eps=norm_eps) * norm_weight
        if norm_bias is not None:
            y = y + norm_bias
    if z is not None:
        y = y * F.silu(z.float())
    if gate is not None:
        y = y * gate[:, None, None]
    return y.to(u.dtype)


# Fakes and gradient ------------------------------------------------------------------------


def _check_path(inputs: ScanInputs, directions: Sequence[int], chunk: int) -> None:
    kind = inputs.u.device.type
    expected = layouts.chunk_tokens(inputs.u.shape[4], inputs.A.shape[-1], kind) if kind == "cuda" else None
    path_arguments(NAME, directions, chunk, expected)


def _fake(*args):
    inputs = ScanInputs(*args[:_TENSORS])
    directions, _softplus, _norm_eps, chunk, save_states = args[_TENSORS:]
    u = inputs.u
    same_device(NAME, inputs)
    _check_path(inputs, directions, chunk)
    batch, height, width, groups, dim = u.shape

    def count() -> int:
        planes = batch * groups
        return planes * layouts.saved_states(height, width, dim, u.device.type, chunk) * inputs.A.shape[2] * dim

    states = layouts.count_of(u, count) if save_states else 0
    return layouts.empty_image(u), u.new_empty((states,), dtype=layouts.accumulate_dtype(u.dtype))


def _backward_fake(dy, *args):
    inputs = ScanInputs(*args[:_TENSORS])
    states, directions, _softplus, _norm_eps, chunk = args[_TENSORS:]
    same_device(NAME, (dy, *inputs, states))
    _check_path(inputs, directions, chunk)

    def gradient(name: str, t: Tensor | None) -> Tensor:
        if t is None:
            return layouts.empty_absent(inputs.u)
        return layouts.empty_image(t) if name in ("u", "dt", "B", "C", "z") else layouts.empty_like(t)

    return tuple(gradient(name, t) for name, t in zip(ScanInputs._fields, inputs, strict=True))


def _setup(ctx, inputs, output):
    *tensors, directions, softplus, norm_eps, chunk, save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.scalars = (directions, softplus, norm_eps, chunk)
    ctx.saved_states = save_states


def _backward(ctx, dy, _dstates):
    if dy is None:
        return (None,) * (_TENSORS + 5)
    if not ctx.saved_states:
        raise RuntimeError(NO_STATES.format(NAME))
    *tensors, states = ctx.saved_tensors
    grads = call_backward(NAME, dy, *tensors, states, *ctx.scalars)
    return (*(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None, None, None, None)


# FLOPs -------------------------------------------------------------------------------------


def channel_flops(A_shape: Sequence[int], D_shape: Sequence[int] | None, dt_weight_shape: Sequence[int] | None) -> int:
    """Of a token and channel: 1 + 7 N for step * A, exp, a * h + (step * u) * B and C . h of each state, 2 more with
    the skip, 2 R more with the low-rank step."""
    per_channel = 1 + 7 * A_shape[-1]
    if D_shape is not None:
        per_channel += 2
    if dt_weight_shape is not None:
        per_channel += 2 * dt_weight_shape[-1]
    return per_channel


def grouped_scan_flops(
    u_shape: Sequence[int],
    A_shape: Sequence[int],
    D_shape: Sequence[int] | None = None,
    dt_weight_shape: Sequence[int] | None = None,
) -> int:
    """Of one forward scan, from the shapes of its arguments."""
    return math.prod(u_shape) * channel_flops(A_shape, D_shape, dt_weight_shape)


def _flops(u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    return grouped_scan_flops(u, A, D, dt_weight)


def _backward_flops(dy, u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    # The states are recomputed, then every product has two derivatives.
    return 3 * grouped_scan_flops(u, A, D, dt_weight)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake, _flops, _backward_flops)
