# SPDX-License-Identifier: Apache-2.0
"""`modulated_layer_norm`: LayerNorm of the product in which the released layer merges its groups."""

from __future__ import annotations

from torch import Tensor

from groupmamba_ext import layouts, reference
from groupmamba_ext._checks import Arguments, same_device
from groupmamba_ext.autocast import autocast
from groupmamba_ext.backend import use_native
from groupmamba_ext.registry import Op, call, call_backward

NAME = "modulated_layer_norm"


def modulated_layer_norm(
    o: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gate: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over all channels of ``o * scale * x * gate``: how the released layer merges its groups.

    Args:
        o: the groups' outputs, (batch, H, W, G, D) with G * D = C, or (batch, H, W, C); strided views are read in
            place.
        x: the layer's normalised input, (batch, H, W, C), of the same dtype.
        scale: ``skip_scale``, (1,).
        weight, bias: (C,), dtype of ``x`` or float32.
        gate: channel affinity, (batch, C), dtype of ``x`` or float32.
        eps: added to the variance.

    Returns:
        Like ``x``.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
    """
    op = NAME
    args = Arguments(op, "x", x, (4,), "(batch, H, W, C)")
    args.tensor("o", o)
    x, o = autocast(x, o)
    args.image = x
    channels = x.shape[-1]
    if o.dim() == 5:
        if o.shape[3] * o.shape[4] != channels:
            raise ValueError(f"{op}: o must be (batch, H, W, G, D) with G * D = {channels}, got {tuple(o.shape)}")
        args.like_image("o", o, (*x.shape[:3], *o.shape[3:]), "(batch, H, W, G, D)")
    else:
        args.like_image("o", o, x.shape, "(batch, H, W, C)")
    args.parameter("scale", scale, (1,), "(1,)")
    args.parameter("weight", weight, (channels,), "(C,)")
    args.parameter("bias", bias, (channels,), "(C,)")
    args.parameter("gate", gate, (x.shape[0], channels), "(batch, C)", optional=True)
    args.eps("eps", eps)
    if not use_native(x, op):
        return reference.modulated_layer_norm(o, x, scale, weight, bias, gate=gate, eps=eps)
    grouped = o if o.dim() == 5 else o.unsqueeze(3)
    return call(NAME, grouped, x, scale, gate, weight, bias, float(eps))


# Fakes and gradient ------------------------------------------------------------------------


def _fake(o, x, scale, gate, weight, bias, eps):
    same_device(NAME, (o, x, scale, gate, weight, bias))
    return layouts.empty_like(x)


def _backward_fake(dy, o, x, scale, gate, weight, bias, eps):
    same_device(NAME, (dy, o, x, scale, gate, weight, bias))
    dgate = layouts.empty_absent(x) if gate is None else layouts.empty_like(gate)
    dx, dscale, dweight, dbias = (layouts.empty_like(t) for t in (x, scale, weight, bias))
    return layouts.empty_image(o), dx, dscale, dgate, dweight, dbias


def _setup(ctx, inputs, output):
    o, x, scale, gate, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(o, x, scale, gate, weight, bias)


def _backward(ctx, dy):
    saved = ctx.saved_tensors
    grads = call_backward(NAME, dy, *saved, ctx.eps)
    return (*(g if t is not None else None for g, t in zip(grads, saved, strict=True)), None)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake)
