# SPDX-License-Identifier: Apache-2.0
"""`narrow_conv`: a dense convolution between so few channels that memory bounds it, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from groupmamba_ext import _explain, layouts
from groupmamba_ext._checks import same_device
from groupmamba_ext._load import has_sm90a
from groupmamba_ext.backend import takes_image
from groupmamba_ext.layouts import NARROW_CONVS
from groupmamba_ext.registry import InferenceOp, Op, call, call_backward, call_inference
from groupmamba_ext.transforms import jit_traces, watched

NAME = "narrow_conv"
RELU = "narrow_conv_relu"
BACK = tuple((c, o, taps) for c, o, taps in NARROW_CONVS if (o, c, taps) in NARROW_CONVS)  # where x has a gradient


def takes_narrow_conv(x: Tensor, weight: Tensor, padding: int) -> bool:
    """True where `narrow_conv` takes an image ``x``, (batch, C, H, W), and a weight, and is the faster way.

    On GPUs of compute capability 9.0, in half and bfloat16. Under autocast ``x`` must be in its dtype already.
    """
    if not x.is_cuda or x.dim() != 4:
        return False
    why_not = _why_not(x, weight, padding)
    if _explain.asked():
        kernels = "tensor cores" if why_not is None else f"torch's convolution: {why_not}"
        _explain.note(f"{NAME} of {x.shape[1]} channels by {weight.shape[2]} x {weight.shape[3]} taps: {kernels}")
    return why_not is None


def _why_not(x: Tensor, weight: Tensor, padding: int) -> str | None:
    out, channels, taps, across = weight.shape
    shape = (channels, out, taps)
    if shape not in NARROW_CONVS or taps != across or x.shape[1] != channels:
        return "there are kernels for 32 to 32 channels by 3 x 3 taps, and for 16 to 32 by 4 x 4"
    if not 0 <= padding < taps or any(n + 2 * padding < taps for n in x.shape[2:]):
        return "the image with its padding is smaller than the kernel, or its padding as wide"
    if shape not in BACK and (x.requires_grad or watched()):
        return "the image has a gradient, for which there is no kernel"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    if x.dtype not in (torch.float16, torch.bfloat16) or x.dtype != dtype or weight.dtype not in (dtype, torch.float32):
        return f"the image is {x.dtype}, the weight {weight.dtype}: they must be float16 or bfloat16, or autocast to it"
    if torch.compiler.is_exporting() or jit_traces():
        return "the program that is traced may run on another GPU"
    if not takes_image(x):
        return "the image is empty, or the compiled ops are not in use"
    return None if has_sm90a(x.device) else "the GPU, or this build, is not of compute capability 9.0"


def narrow_conv(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """``torch.nn.functional.conv2d(x, weight, padding=padding)`` where `takes_narrow_conv`.

    Args:
        x: (batch, C, H, W), in ``torch.channels_last`` format, else it is copied.
        weight: (O, C, K, K), in the dtype of ``x`` or float32; rounded to the former.

    Returns:
        (batch, O, H + 2 padding - K + 1, W + 2 padding - K + 1), channels-last in the dtype of ``x``.
    """
    return call(NAME, x.permute(0, 2, 3, 1), weight, padding).permute(0, 3, 1, 2)


def narrow_conv_relu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """``relu(conv2d(x, weight, bias, padding=padding))`` without a gradient, where `takes_narrow_conv`; ``bias`` (O,)
    in the dtype of ``x`` or float32."""
    return call_inference(RELU, x.permute(0, 2, 3, 1), weight, bias, padding).permute(0, 3, 1, 2)


# Fakes and gradient ------------------------------------------------------------------------


def _fake(x, weight, padding):
    same_device(NAME, (x, weight))
    batch, height, width, _ = x.shape
    out, _, taps, _ = weight.shape
    return x.new_empty((batch, height + 2 * padding - taps + 1, width + 2 * padding - taps + 1, out))


def _relu_fake(x, weight, bias, padding):
    same_device(RELU, (x, weight, bias))
    return _fake(x, weight, padding)


def _backward_fake(dy, x, weight, padding, needs_dx, needs_dweight):
    same_device(NAME, (dy, x, weight))
    dx = layouts.empty_like(x) if needs_dx else layouts.empty_absent(x)
    return dx, layouts.empty_like(weight) if needs_dweight else layouts.empty_absent(weight)


def _setup(ctx, inputs, output):
    x, weight, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    needs_dx, needs_dweight, _ = ctx.needs_input_grad[-3:]  # behind what the dispatcher puts in front
    dx, dweight = call_backward(NAME, dy, *ctx.saved_tensors, ctx.padding, needs_dx, needs_dweight)
    return dx if needs_dx else None, dweight if needs_dweight else None, None


def _flops(x, weight, padding, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, channels = x
    out, _, taps, _ = weight
    pixels = batch * (height + 2 * padding - taps + 1) * (width + 2 * padding - taps + 1)
    return 2 * pixels * out * channels * taps * taps


def _backward_flops(dy, x, weight, padding, needs_dx, needs_dweight, *args, out_shape=None, **kwargs) -> int:
    return (needs_dx + needs_dweight) * _flops(x, weight, padding)


OP = Op(NAME, _fake, _setup, _backward, _backward_fake, _flops, _backward_flops)
RELU_OP = InferenceOp(RELU, _relu_fake, lambda x, weight, bias, *args, **kwargs: _flops(x, weight, *args, **kwargs))
