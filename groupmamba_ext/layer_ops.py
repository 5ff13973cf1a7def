# SPDX-License-Identifier: Apache-2.0
"""The GroupMamba layer, the feed-forward network and what stands between them as one CUDA op each: fakes, gradients,
and what calls them.

An op queues the kernels and matrix products of its layer from one call, with every image between them padded to aligned
widths, and adds to the residual stream. `groupmamba.GroupedMamba2d` and the models take them where `can_fuse` and
`takes_image` say so, and compose the public ops elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupmamba_ext._checks import path_arguments, same_device
from groupmamba_ext.backend import use_native
from groupmamba_ext.dispatch import call, call_alone, call_backward, call_inference
from groupmamba_ext.ops import DIRECTIONS, FUSED_CHANNELS, chunk_tokens, elements_of, saved_states

_UNIT = 8  # widths are padded to multiples of this, but for _padded_features: csrc/host/tensor.h
_BATCH_NORM_CHANNELS = 2048  # most of them: csrc/cuda/batch_norm/args.h
BIASED_CHANNELS = 512  # most of an image whose bias `token_norm` adds: csrc/cuda/layer_norm/plan.h's sums_dx_more
_PIECE = 128  # pieces of a workspace start at multiples of this: csrc/host/workspace.h
_LAYER_PARAMETERS = 20  # of grouped_mamba_layer_fwd, behind x
_FEED_FORWARD_PARAMETERS = 8


def _padded(n: int) -> int:
    return -(-n // _UNIT) * _UNIT


def _padded_features(n: int, inner_pad: int) -> int:
    """csrc/ops/layer/grouped_mamba.cpp's padded_features."""
    return 4 if n <= 4 and inner_pad in (16, 32) else _padded(n)


def _padded_image(x: Tensor) -> Tensor:
    """Like x, (batch, H, W, C), with pixels a multiple of 8 channels apart."""
    return x.new_empty((*x.shape[:3], _padded(x.shape[3])))[..., : x.shape[3]]


def _workspace_elements(sizes: list[int]) -> int:
    """Elements that csrc/host/workspace.h allocates for pieces of these sizes."""
    return sum(-(-n // _PIECE) * _PIECE for n in sizes)


def _empty_gradient(t: Tensor) -> Tensor:
    """Like the gradient of a parameter ``t``: csrc/host/tensor.h's gradient_strides."""
    last = not t.is_contiguous() and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=order)


def _empty_or_absent(x: Tensor, t: Tensor | None) -> Tensor:
    return x.new_empty((0,), dtype=torch.float32) if t is None else _empty_gradient(t)


# token_norm --------------------------------------------------------------------------------


def _norm_fake(x, x_bias, weight, bias, eps):
    same_device("token_norm", (x, x_bias, weight, bias))
    return x.new_empty(x.shape)


def _norm_bwd_fake(dy, x, x_bias, weight, bias, eps):
    same_device("token_norm", (dy, x, x_bias, weight, bias))
    dx_bias = x.new_empty((0,)) if x_bias is None else x_bias.new_empty(x_bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dx_bias


def _norm_setup(ctx, inputs, output):
    x, x_bias, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, x_bias, weight, bias)


def _norm_backward(ctx, dy):
    x, x_bias, weight, bias = ctx.saved_tensors
    dx, dweight, dbias, dx_bias = call_backward("token_norm", dy, x, x_bias, weight, bias, ctx.eps)
    return dx, None if x_bias is None else dx_bias, dweight, dbias, None


# batch_norm_relu ---------------------------------------------------------------------------


def _batch_norm_fake(x, weight, bias, eps):
    same_device("batch_norm_relu", (x, weight, bias))
    return x.new_empty(x.shape), x.new_empty((3, x.shape[3]), dtype=torch.float32)


def _batch_norm_bwd_fake(dy, x, weight, bias, stats, eps):
    same_device("batch_norm_relu", (dy, x, weight, bias, stats))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _batch_norm_setup(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _batch_norm_backward(ctx, dy, _dstats):
    if dy is None:
        return (None,) * 4
    return (*call_backward("batch_norm_relu", dy, *ctx.saved_tensors, ctx.eps), None)


# batch_norm_fold ---------------------------------------------------------------------------


def _fold_fake(image, weight, norm_weight, norm_bias, mean, variance, eps, blocks):
    same_device("batch_norm_fold", (image, weight, norm_weight, norm_bias, mean, variance))
    out, channels, taps, _ = weight.shape
    if blocks:
        channels, taps = 4 * (channels + channels % 2), (taps + 1) // 2
    folded = image.new_empty((out, taps, taps, channels)).permute(0, 3, 1, 2)
    return folded, image.new_empty((out,))


# grouped_mamba_layer -----------------------------------------------------------------------


def _layer_alone_fake(x, *args):
    same_device("grouped_mamba_layer", (x, *args))
    chunk = chunk_tokens(_padded(args[12].shape[1]), "cuda")  # of A_log
    path_arguments("grouped_mamba_layer", args[-7], args[-4], chunk)
    return _padded_image(x)


def _layer_fake(x, *args):
    out = _layer_alone_fake(x, *args)
    *parameters, _codes, _eps, _norm_eps, chunk, _residual, _drop_path_mask, _drop_path_scale = args
    fc1_weight, x_proj_weight, A_log, out_proj_weight = (parameters[i] for i in (2, 9, 12, 16))
    batch, height, width, channels = x.shape
    groups, inner, states = A_log.shape
    inner_pad, dim_pad = _padded(inner), _padded(channels // groups)
    widths = [_padded_features(x_proj_weight.shape[1], inner_pad), dim_pad, inner_pad, inner_pad, 2 * inner_pad]
    gate_width = inner_pad
    if out_proj_weight is not None:
        widths.append(dim_pad)
        gate_width = channels // groups
    planes = batch * groups

    def count() -> int:
        floats = [planes * saved_states(height, width, inner_pad, "cuda", chunk) * states * inner_pad]
        if fc1_weight is not None:
            floats += [planes * gate_width, batch * channels, batch * fc1_weight.shape[0]]
        return _workspace_elements(floats)

    images = _workspace_elements([planes * height * width * n for n in widths])
    saved, saved_float = x.new_empty((images,)), x.new_empty((elements_of(x, count),), dtype=torch.float32)
    return out, saved, saved_float


def _layer_bwd_fake(dout, x, *args):
    same_device("grouped_mamba_layer", (dout, x, *args))
    chunk = chunk_tokens(_padded(args[12].shape[1]), "cuda")  # of A_log
    path_arguments("grouped_mamba_layer", args[-7], args[-4], chunk)
    return _padded_image(x), *(_empty_or_absent(x, t) for t in args[:_LAYER_PARAMETERS])


def _layer_setup(ctx, inputs, output):
    *tensors, codes, eps, norm_eps, chunk, residual, mask, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:], mask)
    ctx.scalars = (codes, eps, norm_eps, chunk, residual)
    ctx.drop_path_scale = scale


def _layer_backward(ctx, dout, *_):
    if dout is None:
        return (None,) * (_LAYER_PARAMETERS + 8)
    *saved, mask = ctx.saved_tensors
    grads = call_backward("grouped_mamba_layer", dout, *saved, *ctx.scalars, mask, ctx.drop_path_scale)
    grads = (g if t is not None else None for g, t in zip(grads, saved[: _LAYER_PARAMETERS + 1], strict=True))
    return (*grads, *(None,) * 7)


# feed_forward ------------------------------------------------------------------------------


def _feed_forward_alone_fake(x, *args):
    same_device("feed_forward", (x, *args))
    return _padded_image(x)


def _feed_forward_fake(x, norm_weight, norm_bias, fc1_weight, *args):
    out = _feed_forward_alone_fake(x, norm_weight, norm_bias, fc1_weight, *args)
    tokens = x.shape[0] * x.shape[1] * x.shape[2]
    return out, x.new_empty((_workspace_elements([tokens * _padded(fc1_weight.shape[0])]),))


def _feed_forward_bwd_fake(dout, x, *args):
    same_device("feed_forward", (dout, x, *args))
    return _padded_image(x), *map(_empty_gradient, args[:_FEED_FORWARD_PARAMETERS])


def _feed_forward_setup(ctx, inputs, output):
    *tensors, eps, residual, mask, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:], mask)
    ctx.scalars = (eps, residual)
    ctx.drop_path_scale = scale


def _feed_forward_backward(ctx, dout, *_):
    if dout is None:
        return (None,) * (_FEED_FORWARD_PARAMETERS + 5)
    *saved, mask = ctx.saved_tensors
    grads = call_backward("feed_forward", dout, *saved, *ctx.scalars, mask, ctx.drop_path_scale)
    return (*grads, None, None, None, None)


OPS = {
    "token_norm": (_norm_fake, _norm_setup, _norm_backward, _norm_bwd_fake),
    "batch_norm_relu": (_batch_norm_fake, _batch_norm_setup, _batch_norm_backward, _batch_norm_bwd_fake),
    "grouped_mamba_layer": (_layer_fake, _layer_setup, _layer_backward, _layer_bwd_fake),
    "feed_forward": (_feed_forward_fake, _feed_forward_setup, _feed_forward_backward, _feed_forward_bwd_fake),
}
# Those with a form for inference, which returns the image alone.
ALONE = {"grouped_mamba_layer": _layer_alone_fake, "feed_forward": _feed_forward_alone_fake}
INFERENCE = {"batch_norm_fold": _fold_fake}  # ops without a gradient


def takes_image(x: Tensor) -> bool:
    """True where the ops of this file take an image ``x``: not empty, on CUDA, with the compiled ops."""
    return x.is_cuda and x.numel() > 0 and use_native(x, "grouped_mamba_layer")


def can_fuse(x: Tensor, inner_dim: int) -> bool:
    """True where `grouped_mamba_layer` takes an image ``x`` and groups of ``inner_dim`` scanned channels: what
    `takes_image`, and groups that a warp of the scan holds. Anything else goes through the ops one by one."""
    return inner_dim <= FUSED_CHANNELS and takes_image(x)


def scan_constants(directions: Sequence[str], inner_dim: int) -> tuple[tuple[int, ...], int]:
    """``codes`` and ``chunk`` of `grouped_mamba_layer` for one direction name a group of ``inner_dim`` channels."""
    return tuple(map(DIRECTIONS.index, directions)), chunk_tokens(_padded(inner_dim), "cuda")


def _autocast(x: Tensor) -> Tensor:
    """`ops._autocast` for one image on CUDA, in fewer steps."""
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cuda"))
    return x


def token_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the channels of (batch, H, W, C), of any strides between pixels, where `takes_image`; dense, under
    autocast in its dtype. ``x_bias``, (C,), is added to ``x`` before: up to `BIASED_CHANNELS`."""
    return call("token_norm", _autocast(x), x_bias, weight, bias, float(eps))


def takes_batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """True where `batch_norm_relu` takes an image ``x``, (batch, C, H, W), and a norm's parameters."""
    fits = x.dim() == 4 and x.shape[1] % _UNIT == 0 and x.shape[1] <= _BATCH_NORM_CHANNELS
    typed = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and typed and all(t.dtype in (x.dtype, torch.float32) for t in (weight, bias)) and takes_image(x)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``relu(BatchNorm(x))`` with the statistics of the batch, where `takes_batch_norm` and there are several pixels.

    Args:
        x: (batch, C, H, W), in ``torch.channels_last`` format, else it is copied.
        weight, bias: (C,).

    Returns:
        The image, channels-last in the dtype of ``x``, and (3, C) in float32: mean, variance by n - 1 as BatchNorm's
        running statistics take it, 1 / sqrt(variance by n + eps).
    """
    y, stats = call("batch_norm_relu", x.permute(0, 2, 3, 1), weight, bias, float(eps))
    return y.permute(0, 3, 1, 2), stats


def takes_batch_norm_fold(image: Tensor, *parameters: Tensor) -> bool:
    """True where `batch_norm_fold` takes an image, with a convolution's weight and a BatchNorm's tensors."""
    typed = image.dtype in (torch.float16, torch.bfloat16)
    return typed and all(t.dtype in (image.dtype, torch.float32) for t in parameters) and takes_image(image)


def batch_norm_fold(
    image: Tensor,
    weight: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    *,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as part of the convolution before it, in one launch where
    `takes_batch_norm_fold`; without a gradient.

    Args:
        image: what the convolution reads; only its dtype, that of the results, counts here.
        weight: (O, C, K, K), of any strides.
        norm: (O,) each: weight, bias, running mean, running variance.
        blocks: the image has blocks of 2x2 pixels as channels (``groupmamba.models.entry_conv``); K is 3, 7,
            11, ...

    Returns:
        The convolution's weight, channels-last, (O, C, K, K) or with ``blocks`` (O, 4 C', (K + 1) / 2, (K + 1) / 2), C'
        being C rounded up to even; and its bias, (O,).
    """
    return call_inference("batch_norm_fold", image, weight, *norm, float(eps), blocks)


def feed_forward(
    x: Tensor,
    *,
    norm: Sequence[Tensor],
    fc1: Sequence[Tensor],
    conv: Sequence[Tensor],
    fc2: Sequence[Tensor],
    eps: float,
    residual: bool = False,
    drop_path: tuple[Tensor, float] | None = None,
) -> Tensor:
    """``fc2(gelu(conv3x3(fc1(LayerNorm(x)))))``, with ``residual`` added to ``x``, where `takes_image`.

    Args:
        x: (batch, H, W, C).
        norm: weight and bias, (C,), with ``eps``.
        fc1: weight (hidden, C) and bias (hidden,).
        conv: weight (hidden, 1, 3, 3) and bias (hidden,).
        fc2: weight (C, hidden) and bias (C,).
        drop_path: with ``residual``, stochastic depth, (mask, scale): the mask (batch,) in float32, 1 for images whose
            result counts, ``scale`` times, and 0 for the others.

    Returns:
        (batch, H, W, C) in the dtype of ``x``, under autocast in its dtype; pixels lie C rounded up to a multiple of 8
        channels apart.

    Raises:
        RuntimeError: shapes or dtypes that the compiled op does not take; on a second derivative.
    """
    x = _autocast(x)
    return call_alone("feed_forward", x, *norm, *fc1, *conv, *fc2, float(eps), residual, *(drop_path or (None, 1.0)))


def grouped_mamba_layer(
    x: Tensor,
    *,
    norm: Sequence[Tensor],
    affinity: Sequence[Tensor] | None,
    core: Sequence[Tensor],
    out_proj_weight: Tensor | None,
    skip_scale: Tensor | None,
    proj: Sequence[Tensor],
    codes: Sequence[int],
    chunk: int,
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
        x: (batch, H, W, C), float32, float16 or bfloat16, on CUDA; see :func:`can_fuse`.
        norm: weight and bias, (C,).
        affinity: fc1 weight (hidden, C) and bias, fc2 weight (C or G * E, hidden) and bias; None for no gate.
        core: in_proj_weight (G, 2E, C / G), conv_weight (G, E, 3, 3), conv_bias (G, E), x_proj_weight (G, R + 2N, E),
            dt_weight (G, E, R), dt_bias (G, E), A_log (G, E, N), D, out_norm_weight, out_norm_bias (G, E).
        out_proj_weight: (G, C / G, E).
        skip_scale: (1,), with ``out_proj_weight`` only.
        proj: weight (C, C) or (C, G * E), bias (C,).
        codes, chunk: from `scan_constants`.
        eps, norm_eps: of ``norm``, of ``out_norm``.
        residual: add ``x`` to the result.
        drop_path: as `feed_forward` takes it, with ``out_proj_weight`` only.

    Returns:
        (batch, H, W, C) in the dtype of ``x``, under autocast in its dtype; pixels lie C rounded up to a multiple of 8
        channels apart, so that products read and write aligned rows. Parameters have that dtype or float32.

    Raises:
        RuntimeError: shapes or dtypes that the compiled op does not take.
    """
    x = _autocast(x)
    fc = (None, None, None, None) if affinity is None else affinity
    tensors = (x, *norm, *fc, *core, out_proj_weight, skip_scale, *proj)
    scalars = (codes, eps, norm_eps, chunk, residual)
    return call_alone("grouped_mamba_layer", *tensors, *scalars, *(drop_path or (None, 1.0)))
