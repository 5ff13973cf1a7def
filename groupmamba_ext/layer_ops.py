# SPDX-License-Identifier: Apache-2.0
"""The whole GroupMamba layer as two CUDA ops: fakes, gradients, and the function that calls them.

They queue the kernels and matrix products of a layer from one call each, with every image between them group-major and
padded to aligned widths. `groupmamba.GroupedMamba2d` takes them where `can_fuse` says so, and composes the public ops
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupmamba_ext.backend import use_native
from groupmamba_ext.dispatch import call, call_backward
from groupmamba_ext.ops import DIRECTIONS, FUSED_CHANNELS, _autocast, chunk_tokens, saved_states

_UNIT = 8  # widths are padded to multiples of this: csrc/ops/grouped_mamba_cuda.cpp
_PARAMETERS = 16  # of grouped_mamba_fwd, behind x


def _padded(n: int) -> int:
    return -(-n // _UNIT) * _UNIT


def _group_major(like: Tensor, batch: int, height: int, width: int, groups: int, channels: int) -> Tensor:
    return like.new_empty((groups, batch, height, width, channels)).permute(1, 2, 3, 0, 4)


def _empty_or_absent(x: Tensor, t: Tensor | None) -> Tensor:
    return x.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)


def _mamba_fake(x, *args):
    *parameters, _codes, _eps, _norm_eps, _chunk, gate_scan, save_states = args
    fc1_weight, fc2_weight = parameters[2], parameters[4]
    x_proj_weight, A_log = parameters[9], parameters[12]
    batch, height, width, _ = x.shape
    groups, inner, states = A_log.shape
    tokens, inner_pad, dim_pad = batch * height * width, _padded(inner), _padded(x.shape[3] // groups)
    features = _padded(x_proj_weight.shape[1])
    if gate_scan:
        y = x.new_empty((batch, height, width, groups, inner_pad))
    else:
        y = _group_major(x, batch, height, width, groups, inner_pad)
    full = {"dtype": torch.float32}
    if fc1_weight is None:
        gate, hidden = x.new_empty((0,), **full), x.new_empty((0,), **full)
    else:
        gate_width = inner_pad if gate_scan else fc2_weight.shape[0] // groups
        gate = x.new_empty((batch, groups, gate_width), **full)
        hidden = x.new_empty((batch, fc1_weight.shape[0]), **full)
    saved = saved_states(height, width, inner_pad, "cuda")
    return (
        y,
        _group_major(x, batch, height, width, groups, dim_pad),
        gate,
        x.new_empty((batch, x.shape[3]), **full),
        hidden,
        x.new_empty((groups, tokens, 2 * inner_pad)),
        x.new_empty((groups, tokens, inner_pad)),
        x.new_empty((groups, tokens, features)),
        x.new_empty((batch, groups, saved, states, inner_pad) if save_states else (0,), **full),
    )


def _mamba_bwd_fake(dy, dxn, dgate, x, norm_weight, *args):
    parameters = norm_weight, norm_weight, *args[: _PARAMETERS - 2]
    return x.new_empty(x.shape), *(_empty_or_absent(x, t) for t in parameters)


def _mamba_setup(ctx, inputs, output):
    x, *parameters, codes, eps, norm_eps, chunk, gate_scan, save_states = inputs
    y, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved[2:], *(() if saved[1].numel() else (saved[1],)))
    ctx.save_for_backward(x, *parameters, *saved)
    ctx.scalars = (codes, eps, norm_eps, chunk, gate_scan)
    ctx.saved_states = save_states


def _mamba_backward(ctx, dy, dxn, dgate, *_):
    if not ctx.saved_states:
        raise RuntimeError("grouped_mamba: backward needs a forward run with save_states=True")
    x, *rest = ctx.saved_tensors
    parameters, saved = rest[:_PARAMETERS], rest[_PARAMETERS:]
    gate_scan = ctx.scalars[-1]
    if dy is None:
        groups, inner = parameters[12].shape[:2]
        dy = x.new_zeros((*x.shape[:3], groups, _padded(inner)))
    if dgate is None and parameters[2] is not None and not gate_scan:
        dgate = torch.zeros_like(saved[1])
    norm_weight, norm_bias, *others = parameters
    grads = list(call_backward("grouped_mamba", dy, dxn, dgate, x, norm_weight, *others, *saved, *ctx.scalars))
    grads[2] = grads[2].to(norm_bias.dtype)
    grads = (g if t is not None else None for g, t in zip(grads, (x, *parameters), strict=True))
    return (*grads, None, None, None, None, None, None)


def _merge_fake(y, xn, gate, out_proj_weight, skip_scale, norm_weight, norm_bias, proj_weight, proj_bias, eps):
    batch, height, width, groups, _ = y.shape
    out = y.new_empty((batch, height, width, proj_weight.shape[0]))
    if out_proj_weight is None:
        return out, y.new_empty((0,)), y.new_empty((0,))
    o = _group_major(y, batch, height, width, groups, _padded(out_proj_weight.shape[1]))
    return out, o, y.new_empty((batch, height, width, groups, _padded(out_proj_weight.shape[1])))


def _merge_bwd_fake(dout, y, xn, gate, out_proj_weight, skip_scale, norm_weight, proj_weight, proj_bias, o, mixed, eps):
    absent = y.new_empty((0,), dtype=torch.float32)
    dproj = proj_weight.new_empty(proj_weight.shape), proj_bias.new_empty(proj_bias.shape)
    if out_proj_weight is None:
        return y.new_empty(y.shape), *([absent.clone() for _ in range(6)]), *dproj
    batch, height, width, groups, inner_pad = y.shape
    return (
        _group_major(y, batch, height, width, groups, inner_pad),
        _group_major(y, batch, height, width, groups, xn.shape[4]),
        _empty_or_absent(y, gate),
        *(t.new_empty(t.shape) for t in (out_proj_weight, skip_scale, norm_weight, norm_weight)),
        *dproj,
    )


def _merge_setup(ctx, inputs, output):
    *tensors, norm_bias, proj_weight, proj_bias, ctx.eps = inputs
    _, o, mixed = output
    ctx.norm_bias_dtype = norm_bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(o, mixed)
    ctx.save_for_backward(*tensors, proj_weight, proj_bias, o, mixed)


def _merge_backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 10
    y, xn, gate, out_proj_weight, *rest = ctx.saved_tensors
    grads = list(call_backward("grouped_merge", dout, y, xn, gate, out_proj_weight, *rest, ctx.eps))
    if out_proj_weight is None:
        grads[1:7] = [None] * 6
    else:
        grads[6] = grads[6].to(ctx.norm_bias_dtype)
        if gate is None:
            grads[2] = None
    return (*grads, None)


OPS = {
    "grouped_mamba": (_mamba_fake, _mamba_setup, _mamba_backward, _mamba_bwd_fake),
    "grouped_merge": (_merge_fake, _merge_setup, _merge_backward, _merge_bwd_fake),
}


def can_fuse(x: Tensor, inner_dim: int) -> bool:
    """True where `grouped_mamba_layer` takes an image ``x`` and groups of ``inner_dim`` scanned channels: on CUDA with
    the compiled ops, and groups that a warp of the scan holds. Anything else goes through the ops one by one."""
    return x.device.type == "cuda" and x.numel() > 0 and inner_dim <= FUSED_CHANNELS and use_native(x, "grouped_mamba")


def grouped_mamba_layer(
    x: Tensor,
    *,
    norm: tuple[Tensor, Tensor],
    affinity: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    core: Sequence[Tensor],
    out_proj_weight: Tensor | None,
    skip_scale: Tensor | None,
    proj: tuple[Tensor, Tensor],
    directions: Sequence[str],
    eps: float,
    norm_eps: float = 1e-5,
) -> Tensor:
    r"""The layer of GroupMamba (arXiv 2407.13772) on CUDA, as the authors' code computes it or in one pass.

    .. code-block:: text

        xn = LayerNorm(x; norm, eps);  gate = sigmoid(fc2(relu(fc1(mean over H, W of xn))))
        u, z = split(in_proj_g(xn_g));  u = silu(conv3x3_g(u));  dt, B, C = split(x_proj_g(u))
        y = grouped_selective_scan(u, dt, -exp(A_log), B, C, D, dt_weight, dt_bias, z, out_norm)
        out = proj(LayerNorm(out_proj_g(y) * skip_scale * xn * gate; norm again))        with out_proj_weight
        out = proj(y * gate)                                                             without

    Args:
        x: (batch, H, W, C) contiguous, float32, float16 or bfloat16, on CUDA; see :func:`can_fuse`.
        norm: weight and bias, (C,).
        affinity: fc1 weight (hidden, C) and bias, fc2 weight (C or G * E, hidden) and bias; None for no gate.
        core: in_proj_weight (G, 2E, C / G), conv_weight (G, E, 3, 3), conv_bias (G, E), x_proj_weight (G, R + 2N, E),
            dt_weight (G, E, R), dt_bias (G, E), A_log (G, E, N), D, out_norm_weight, out_norm_bias (G, E).
        out_proj_weight: (G, C / G, E).
        skip_scale: (1,), with ``out_proj_weight`` only.
        proj: weight (C, C) or (C, G * E), bias (C,).
        directions: one name a group.
        eps, norm_eps: of ``norm``, of ``out_norm``.

    Returns:
        (batch, H, W, C) in the dtype of ``x``. Parameters have that dtype or float32.

    Raises:
        RuntimeError: shapes or dtypes that the compiled op does not take.
    """
    (x,) = _autocast(x)
    fc = (None,) * 4 if affinity is None else affinity
    gate_scan = out_proj_weight is None
    tensors = (x, *norm, *fc, *core)
    save_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    inner = core[6].shape[1]
    y, xn, gate, *_ = call("grouped_mamba",
        *tensors, tuple(map(DIRECTIONS.index, directions)), eps, norm_eps, chunk_tokens(_padded(inner), "cuda"),
        gate_scan, save_states,
    )  # fmt: skip
    gate = None if affinity is None or gate_scan else gate
    return call("grouped_merge", y, xn, gate, out_proj_weight, skip_scale, *norm, *proj, eps)[0]
