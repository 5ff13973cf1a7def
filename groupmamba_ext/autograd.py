# SPDX-License-Identifier: Apache-2.0
"""Fake kernels and gradients of the compiled ops. `register()` runs once, after libgroupmamba is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from groupmamba_ext import layer_ops
from groupmamba_ext._checks import activation_code, path_arguments, same_device
from groupmamba_ext.cross_scan import saved_chunk, saved_elements
from groupmamba_ext.dispatch import call_backward, define, define_inference
from groupmamba_ext.ops import chunk_tokens, elements_of, saved_states

_NO_STATES = (
    "{}: this forward saved nothing for a backward (save_states=False): it was traced where nothing required a gradient"
)


def _empty_image(like: Tensor) -> Tensor:
    """What csrc/host/tensor.h's empty_image_like allocates: group-major in, group-major out."""
    sizes = like.shape
    if (
        like.dim() == 5
        and sizes[3] > 1
        and like.stride(3) > like.stride(2)
        and (sizes[0] <= 1 or like.stride(3) > like.stride(0))
    ):
        return like.new_empty((sizes[3], sizes[0], sizes[1], sizes[2], sizes[4])).permute(1, 2, 3, 0, 4)
    return like.new_empty(sizes)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# grouped_selective_scan --------------------------------------------------------------------


def _scan_fake(
    u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions, softplus, norm_eps, chunk, save
):
    op = "grouped_selective_scan"
    same_device(op, (u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate))
    batch, height, width, groups, dim = u.shape
    kind = u.device.type
    path_arguments(op, directions, chunk, chunk_tokens(dim, kind) if kind == "cuda" else None)

    def count() -> int:
        return batch * groups * saved_states(height, width, dim, kind, chunk) * A.shape[2] * dim

    return _empty_image(u), u.new_empty((elements_of(u, count) if save else 0,), dtype=_wide(u.dtype))


def _scan_bwd_fake(
    dy, u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, states, directions, softplus, norm_eps,
    chunk,
):  # fmt: skip
    op = "grouped_selective_scan"
    same_device(op, (dy, u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, states))
    kind = u.device.type
    path_arguments(op, directions, chunk, chunk_tokens(u.shape[4], kind) if kind == "cuda" else None)

    def image(t):
        return u.new_empty((0,)) if t is None else _empty_image(t)

    def parameter(t):
        return u.new_empty((0,)) if t is None else _empty(t)

    return (
        image(u), image(dt), parameter(A), image(B), image(C), parameter(D), parameter(dt_weight), parameter(dt_bias),
        image(z), parameter(norm_weight), parameter(norm_bias), parameter(gate),
    )  # fmt: skip


def _scan_setup(ctx, inputs, output):
    *tensors, directions, softplus, norm_eps, chunk, save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.scalars = (directions, softplus, norm_eps, chunk)
    ctx.saved_states = save_states


def _scan_backward(ctx, dy, _dstates):
    if dy is None:
        return (None,) * 17
    if not ctx.saved_states:
        raise RuntimeError(_NO_STATES.format("grouped_selective_scan"))
    *tensors, states = ctx.saved_tensors
    grads = call_backward("grouped_selective_scan", dy, *tensors, states, *ctx.scalars)
    return (*(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None, None, None, None)


# cross_selective_scan ----------------------------------------------------------------------


def _cross_fake(u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk, save):
    same_device("cross_selective_scan", (u, dt, A, B, C, D, dt_weight, dt_bias))
    kind = u.device.type
    expected = saved_chunk(u.shape[4], kind) if kind == "cuda" else None
    path_arguments("cross_selective_scan", directions, chunk, expected)

    def count() -> int:
        return saved_elements(u, len(directions), A.shape[3], chunk)

    return _empty_image(u), u.new_empty((elements_of(u, count) if save else 0,), dtype=_wide(u.dtype))


def _cross_bwd_fake(dy, u, dt, A, B, C, D, dt_weight, dt_bias, states, directions, softplus, chunk):
    same_device("cross_selective_scan", (dy, u, dt, A, B, C, D, dt_weight, dt_bias, states))
    kind = u.device.type
    expected = saved_chunk(u.shape[4], kind) if kind == "cuda" else None
    path_arguments("cross_selective_scan", directions, chunk, expected)
    absent = u.new_empty((0,))
    parameters = (absent.clone() if t is None else _empty(t) for t in (D, dt_weight, dt_bias))
    return _empty_image(u), _empty(dt), _empty(A), _empty(B), _empty(C), *parameters


def _cross_setup(ctx, inputs, output):
    *tensors, directions, softplus, chunk, save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.scalars = (directions, softplus, chunk)
    ctx.saved_states = save_states


def _cross_backward(ctx, dy, _dstates):
    if dy is None:
        return (None,) * 12
    if not ctx.saved_states:
        raise RuntimeError(_NO_STATES.format("cross_selective_scan"))
    *tensors, states = ctx.saved_tensors
    grads = call_backward("cross_selective_scan", dy, *tensors, states, *ctx.scalars)
    return (*(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None, None, None)


# depthwise_conv3x3 -------------------------------------------------------------------------


def _conv_fake(x, weight, bias, activation):
    same_device("depthwise_conv3x3", (x, weight, bias))
    activation_code("depthwise_conv3x3", activation)
    return _empty_image(x)


def _conv_bwd_fake(dy, x, weight, bias, activation):
    same_device("depthwise_conv3x3", (dy, x, weight, bias))
    activation_code("depthwise_conv3x3", activation)
    return _empty_image(x), _empty(weight), x.new_empty((0,)) if bias is None else _empty(bias)


def _conv_setup(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _conv_backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = call_backward("depthwise_conv3x3", dy, x, weight, bias, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None


# layer_norm_pool ---------------------------------------------------------------------------


def _pool_fake(x, weight, bias, eps):
    same_device("layer_norm_pool", (x, weight, bias))
    return _empty(x), x.new_empty((x.shape[0], x.shape[3]), dtype=_wide(x.dtype))


def _pool_bwd_fake(dxn, dpooled, x, weight, bias, eps):
    same_device("layer_norm_pool", (dxn, dpooled, x, weight, bias))
    return _empty(x), _empty(weight), _empty(bias)


def _pool_setup(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _pool_backward(ctx, dxn, dpooled):
    return (*call_backward("layer_norm_pool", dxn, dpooled, *ctx.saved_tensors, ctx.eps), None)


# modulated_layer_norm ----------------------------------------------------------------------


def _modulated_fake(o, x, scale, gate, weight, bias, eps):
    same_device("modulated_layer_norm", (o, x, scale, gate, weight, bias))
    return _empty(x)


def _modulated_bwd_fake(dy, o, x, scale, gate, weight, bias, eps):
    same_device("modulated_layer_norm", (dy, o, x, scale, gate, weight, bias))
    dgate = x.new_empty((0,)) if gate is None else _empty(gate)
    return _empty_image(o), _empty(x), _empty(scale), dgate, _empty(weight), _empty(bias)


def _modulated_setup(ctx, inputs, output):
    o, x, scale, gate, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(o, x, scale, gate, weight, bias)


def _modulated_backward(ctx, dy):
    saved = ctx.saved_tensors
    grads = call_backward("modulated_layer_norm", dy, *saved, ctx.eps)
    return (*(g if t is not None else None for g, t in zip(grads, saved, strict=True)), None)


# registration ------------------------------------------------------------------------------


_OPS = {
    "grouped_selective_scan": (_scan_fake, _scan_setup, _scan_backward, _scan_bwd_fake),
    "cross_selective_scan": (_cross_fake, _cross_setup, _cross_backward, _cross_bwd_fake),
    "depthwise_conv3x3": (_conv_fake, _conv_setup, _conv_backward, _conv_bwd_fake),
    "layer_norm_pool": (_pool_fake, _pool_setup, _pool_backward, _pool_bwd_fake),
    "modulated_layer_norm": (_modulated_fake, _modulated_setup, _modulated_backward, _modulated_bwd_fake),
}


def register() -> None:
    """Gives every op its fakes and gradients; runs once, after libgroupmamba is loaded."""
    for name, formulas in (_OPS | layer_ops.OPS).items():
        define(name, *formulas)
    for name, fake in layer_ops.ALONE.items():
        define_inference(name, fake, f"; groupmamba::{name}_fwd has one")
    for name, fake in layer_ops.INFERENCE.items():
        define_inference(name, fake)
