# SPDX-License-Identifier: Apache-2.0
"""Products of tokens with weights on a CPU by oneDNN, where it is faster than what :mod:`torch` would call.

In float32 torch calls MKL, which runs its kernels for AVX2 on processors that Intel did not make. On an AMD EPYC of the
fourth generation oneDNN, which torch has for 16 bits, is 2.2 times as fast with AVX-512 and 1.15 times with AVX2. In
bfloat16 torch calls oneDNN itself, but writes the bias first and adds a residual after it; here both are part of the
product.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba_ext import _load
from groupmamba_ext.transforms import watched

# Multiplications of a group's product: below, the call costs more than it saves.
LEAST_PRODUCT = 1 << 20
# Tokens of one product of a weight gradient: oneDNN sums over tens of thousands more slowly than over this many.
GRADIENT_TOKENS = 4096

_PLAIN = (Tensor, nn.Parameter)  # no subclass, nor what stands for a tensor while something traces
_TORCHS = (torch.bmm, F.linear)  # counters of operations put their own functions in the places of these


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True where `OneDnnLinear` and `onednn_products` take x (G, T, K), weight (G, N, K), bias (N,) or None and are the
    faster choice: on a CPU, with nothing looking on that must see torch's own operators."""
    if torch.compiler.is_compiling() or not x.is_cpu:  # before a size is looked at
        return False
    groups, tokens, inner = x.shape
    dtype = x.dtype
    if groups > 1 and dtype != torch.float32:  # torch's product of all groups is one call of the same kernels
        return False
    if tokens * inner * weight.shape[1] < LEAST_PRODUCT or not _is_faster(dtype):
        return False
    for t in (x, weight, bias):
        if t is not None and not (type(t) in _PLAIN and t.dtype == dtype and t.is_cpu):
            return False
    if not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu"):
        return False
    return not watched() and not torch._C._len_torch_dispatch_stack() and (torch.bmm, F.linear) == _TORCHS


@functools.lru_cache
def _is_faster(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or _load.load_error() is not None:
        return False
    if dtype == torch.float32:
        return _load.build_info()["cpu_vendor"] == "amd"
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (N, K)^T, + bias (N,), + residual (T, N); without a gradient."""
    x, weight = _with_kernel(x), _with_kernel(weight)
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, _with_kernel(residual), weight, bias, "add")


def _with_kernel(t: Tensor) -> Tensor:
    """A copy of a matrix whose strides oneDNN has no kernel for: its reference takes a thousand times as long."""
    height, width = t.shape
    if t.stride(1) == 1 and t.stride(0) >= width:
        return t
    return t if t.stride(0) == 1 and t.stride(1) == height else t.contiguous()


def onednn_products(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The same for G groups: (G, T, K) and (G, N, K); a bias or residual (T, N) for G = 1 only."""
    if x.shape[0] == 1:
        return onednn_linear(x.squeeze(0), weight.squeeze(0), bias, residual).unsqueeze(0)
    return torch.stack([onednn_linear(t, w, bias) for t, w in zip(x.unbind(0), weight.unbind(0), strict=True)])


class OneDnnLinear(torch.autograd.Function):
    """`onednn_products` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_products(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if torch.is_grad_enabled():  # for a second derivative, which oneDNN's operators have not
            dx, dweight = torch.bmm(dy, weight), torch.bmm(dy.mT, x)
        else:
            if ctx.needs_input_grad[0]:
                dx = onednn_products(dy, weight.mT, None)
            if ctx.needs_input_grad[1]:  # those of narrow groups are no faster by oneDNN
                one = x.shape[0] == 1
                dweight = _weight_gradient(dy[0], x[0]).unsqueeze(0) if one else torch.bmm(dy.mT, x)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 1))
        return dx, dweight, dbias


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x for dy (T, N) and x (T, K)."""
    parts = zip(dy.split(GRADIENT_TOKENS), x.split(GRADIENT_TOKENS), strict=True)
    total, *others = (onednn_linear(g.mT, t.mT, None) for g, t in parts)
    for part in others:
        total += part
    return total
