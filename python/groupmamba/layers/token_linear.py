# SPDX-License-Identifier: Apache-2.0
"""Products of very many tokens with small weights, with a weight gradient that fills a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from groupmamba.layers.onednn_linear import OneDnnLinear, onednn_products, takes_onednn
from groupmamba_ext.transforms import watched


def _splits(tokens: int) -> int:
    """In how many equal parts the sum over tokens is taken: a power of two up to 128, at least 256 tokens a part. One
    for a compiler's symbol, which a choice would fix."""
    parts = 128
    while parts > 1 and not (
        statically_known_true(tokens % parts == 0) and statically_known_true(tokens >= 256 * parts)
    ):
        parts //= 2
    return parts


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x for dy (T, N) and x (T, K), in float32."""
    parts = _splits(x.shape[0])
    return torch.bmm(dy.unflatten(0, (parts, -1)).mT, x.unflatten(0, (parts, -1))).sum(0, dtype=torch.float32)


class _TokenLinear(torch.autograd.Function):
    """x (G, T, K) @ weight (G, N, K)^T, or for G = 1 with bias (N,).

    The gradient of the weight is a (N, K) product with T terms: one tile of work for hundreds of thousands of terms,
    which cuBLAS runs on one multiprocessor a group. Here the terms are summed in parts side by side, then the
    parts: in a fixed order, so still repeatable.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return F.linear(x.squeeze(0), weight.squeeze(0), bias).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = torch.bmm(dy, weight) if ctx.needs_input_grad[0] else None
        dweight = dbias = None
        if ctx.needs_input_grad[1]:
            pairs = zip(dy.unbind(0), x.unbind(0), strict=True)
            dweight = torch.stack([_weight_gradient(g, t) for g, t in pairs]).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 1))
        return dx, dweight, dbias


def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.mT + bias`` for groups of tokens; under autocast in its dtype.

    Args:
        x: (G, T, K), any strides that :func:`torch.bmm` takes.
        weight: (G, N, K).
        bias: (N,), for G = 1 only.

    Returns:
        (G, T, N).
    """
    if takes_onednn(x, weight, bias):
        if not _wants_gradient(x, weight, bias):
            return onednn_products(x, weight, bias)
        if x.dtype == torch.float32:  # in 16 bits torch's own operators call the same kernels
            return OneDnnLinear.apply(x, weight, bias)
    if not x.is_cuda or x.shape[1] == 0 or x.dtype == torch.float64 or watched():
        if bias is None:
            return torch.bmm(x, weight.mT)
        return F.linear(x.squeeze(0), weight.squeeze(0), bias).unsqueeze(0)
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    return _TokenLinear.apply(x, weight, bias)


def image_linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """``[residual +] x @ weight.T + bias`` for the pixels of an image.

    Args:
        x: (batch, H, W, K).
        weight: (N, K).
        bias: (N,).
        residual: (batch, H, W, N).

    Returns:
        (batch, H, W, N).
    """
    rows, weights = x.flatten(0, 2).unsqueeze(0), weight.unsqueeze(0)
    sizes = (*x.shape[:3], weight.shape[0])
    if residual is None:
        return token_linear(rows, weights, bias).view(sizes)
    if takes_onednn(rows, weights, bias) and not _wants_gradient(x, weight, bias, residual):
        same = type(residual) is Tensor and residual.dtype == x.dtype and residual.device == x.device
        if same and residual.shape == sizes:
            return onednn_products(rows, weights, bias, residual.flatten(0, 2)).view(sizes)
    return residual + token_linear(rows, weights, bias).view(sizes)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
