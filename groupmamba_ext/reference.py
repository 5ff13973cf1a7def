# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: sequential in time, any device, any floating dtype, differentiable any number of times.

Every function has the signature of its namesake in :mod:`groupmamba_ext` and is what that is tested against. Arithmetic
is done in the dtype of the input (call with float64 to get ground truth); arguments are not validated here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from groupmamba_ext.directions import DIRECTIONS
from groupmamba_ext.transforms import layer_norm


def scan_order(direction: str, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Row-major token numbers in the order in which ``direction`` visits them, shape (height * width,).

    ``"lr"`` row-major, ``"rl"`` its reverse, ``"tb"`` column-major, ``"bt"`` its reverse.
    """
    tokens = torch.arange(height * width, device=device).view(height, width)
    path = (tokens if direction in ("lr", "rl") else tokens.t()).reshape(-1)
    return path.flip(0) if direction in ("rl", "bt") else path


def _scan(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, paths: Tensor) -> Tensor:
    """h_t = exp(step_t A) h_{t-1} + step_t B_t u_t; y_t = C_t . h_t, all groups in step.

    u, step (batch, L, G, D); A (G, D, N); B, C (batch, L, G, N); paths (G, L) token numbers. Returns (batch, L, G, D).
    """
    if u.shape[1] == 0:  # no token: an empty result that every argument still has a (zero) gradient from
        return u * (step.sum() + A.sum() + B.sum() + C.sum())
    groups = torch.arange(u.shape[2], device=u.device)
    order = paths.t()  # (L, G)
    u, step, B, C = (t[:, order, groups] for t in (u, step, B, C))
    h = u.new_zeros(u.shape[0], u.shape[2], u.shape[3], A.shape[2])
    out = []
    for t in range(u.shape[1]):
        s = step[:, t, :, :, None]
        h = torch.exp(s * A) * h + s * B[:, t, :, None, :] * u[:, t, :, :, None]
        out.append((h * C[:, t, :, None, :]).sum(-1))
    back = torch.argsort(paths, dim=1).t()
    return torch.stack(out, 1)[:, back, groups].contiguous()


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
    """See :func:`groupmamba_ext.grouped_selective_scan`."""
    batch, height, width, num_groups, dim = u.shape
    work = u.dtype
    A, D, dt_weight, dt_bias, norm_weight, norm_bias, gate = (
        None if t is None else t.to(work) for t in (A, D, dt_weight, dt_bias, norm_weight, norm_bias, gate)
    )
    tokens = height * width
    u, dt, B, C = (t.reshape(batch, tokens, num_groups, t.shape[-1]) for t in (u, dt, B, C))
    step = dt if dt_weight is None else torch.einsum("blgr,gdr->blgd", dt, dt_weight)
    if dt_bias is not None:
        step = step + dt_bias
    if softplus:
        step = torch.logaddexp(step, step.new_zeros(()))
    paths = torch.stack([scan_order(d, height, width, u.device) for d in directions])
    y = _scan(u, step, A, B, C, paths)
    if D is not None:
        y = y + D * u
    if norm_weight is not None:
        mean = y.mean(-1, keepdim=True)
        variance = (y - mean).square().mean(-1, keepdim=True)
        y = (y - mean) * torch.rsqrt(variance + norm_eps) * norm_weight
        if norm_bias is not None:
            y = y + norm_bias
    y = y.reshape(batch, height, width, num_groups, dim)
    if z is not None:
        y = y * F.silu(z)
    if gate is not None:
        y = y * gate[:, None, None]
    return y


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
    """See :func:`groupmamba_ext.cross_selective_scan`."""
    if u.dim() == 4:  # one group
        dt, B, C = (t.unsqueeze(3) for t in (dt, B, C))
        A, D, dt_weight, dt_bias = (None if t is None else t.unsqueeze(0) for t in (A, D, dt_weight, dt_bias))
        return cross_selective_scan(
            u.unsqueeze(3), dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, directions=directions,
            softplus=softplus,
        ).squeeze(3)  # fmt: skip
    groups, count = u.shape[3], len(directions)
    dt, B, C = (t.flatten(3, 4) for t in (dt, B, C))
    A, D, dt_weight, dt_bias = (None if t is None else t.flatten(0, 1) for t in (A, D, dt_weight, dt_bias))
    y = grouped_selective_scan(
        u.repeat_interleave(count, dim=3), dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias,
        directions=tuple(directions) * groups, softplus=softplus,
    )  # fmt: skip
    return y.unflatten(3, (groups, count)).sum(4)


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """See :func:`groupmamba_ext.depthwise_conv3x3`."""
    channels = weight.shape[0] if x.dim() == 4 else weight.shape[0] * weight.shape[1]
    image = x.reshape(*x.shape[:3], channels).permute(0, 3, 1, 2)
    kernel = weight.to(x.dtype).reshape(channels, 1, 3, 3)
    if image.numel() == 0:
        y = image * kernel.sum()
    else:
        y = F.conv2d(image, kernel, None if bias is None else bias.to(x.dtype).reshape(-1), padding=1, groups=channels)
    if activation == "silu":
        y = F.silu(y)
    elif activation == "gelu":
        y = F.gelu(y)
    return y.permute(0, 2, 3, 1).reshape(x.shape)


def layer_norm_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See :func:`groupmamba_ext.layer_norm_pool`."""
    xn = layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled = xn.to(wide).sum((1, 2)) / max(x.shape[1] * x.shape[2], 1)
    return xn, pooled


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
    """See :func:`groupmamba_ext.modulated_layer_norm`."""
    product = o.reshape(x.shape) * scale.to(x.dtype) * x
    if gate is not None:
        product = product * gate.to(x.dtype)[:, None, None]
    return layer_norm(product, weight.to(x.dtype), bias.to(x.dtype), eps)
