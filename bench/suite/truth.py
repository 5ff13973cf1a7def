# SPDX-License-Identifier: Apache-2.0
"""Ground truth for the scans at any size: the recurrence in two levels, sqrt(L) steps of Python instead of L.

`groupmamba_ext.reference` walks the tokens one by one, which at a million tokens takes minutes; a test of the benchmark
compares the two. Written from the equations, with flips and transposes, differentiable, in the dtype of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def to_path(x: Tensor, directions: Sequence[str]) -> Tensor:
    """(batch, H, W, G, K) to (batch, L, G, K): every group in the order of its direction."""
    paths = []
    for group, direction in enumerate(directions):
        image = x[:, :, :, group]
        path = (image.transpose(1, 2) if direction in ("tb", "bt") else image).flatten(1, 2)
        paths.append(path.flip(1) if direction in ("rl", "bt") else path)
    return torch.stack(paths, 2)


def from_path(y: Tensor, directions: Sequence[str], height: int, width: int) -> Tensor:
    """The inverse of :func:`to_path`."""
    images = []
    for group, direction in enumerate(directions):
        path = y[:, :, group]
        path = path.flip(1) if direction in ("rl", "bt") else path
        if direction in ("tb", "bt"):
            images.append(path.unflatten(1, (width, height)).transpose(1, 2))
        else:
            images.append(path.unflatten(1, (height, width)))
    return torch.stack(images, 3)


def linear_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along dimension 1, h_{-1} = 0."""
    length = a.shape[1]
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    pad = [0, 0] * (a.dim() - 2) + [0, chunks * steps - length]
    a = F.pad(a, pad, value=1.0).unflatten(1, (chunks, steps)).unbind(2)
    b = F.pad(b, pad).unflatten(1, (chunks, steps)).unbind(2)
    local, decay = [b[0]], [a[0]]
    for a_t, b_t in zip(a[1:], b[1:], strict=True):
        local.append(a_t * local[-1] + b_t)
        decay.append(a_t * decay[-1])
    state = torch.zeros_like(local[-1][:, 0])
    entering = []
    for a_chunk, b_chunk in zip(decay[-1].unbind(1), local[-1].unbind(1), strict=True):
        entering.append(state)
        state = a_chunk * state + b_chunk
    entering = torch.stack(entering, 1)
    h = torch.stack([p * entering + h_t for p, h_t in zip(decay, local, strict=True)], 2)
    return h.flatten(1, 2)[:, :length]


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
    directions: Sequence[str] = ("lr", "rl", "tb", "bt"),
    softplus: bool = True,
) -> Tensor:
    """See :func:`groupmamba_ext.grouped_selective_scan`."""
    height, width = u.shape[1:3]
    step = dt if dt_weight is None else torch.einsum("bhwgr,gdr->bhwgd", dt, dt_weight)
    if dt_bias is not None:
        step = step + dt_bias
    if softplus:
        step = torch.logaddexp(step, step.new_zeros(()))
    drive = step * u
    step, drive, B, C = (to_path(t, directions) for t in (step, drive, B, C))
    h = linear_recurrence(torch.exp(step[..., None] * A), drive[..., None] * B[:, :, :, None])
    y = from_path((h * C[:, :, :, None]).sum(-1), directions, height, width)
    if D is not None:
        y = y + D * u
    if norm_weight is not None:
        y = F.layer_norm(y, y.shape[-1:], eps=norm_eps) * norm_weight
        if norm_bias is not None:
            y = y + norm_bias
    if z is not None:
        y = y * F.silu(z)
    return y if gate is None else y * gate[:, None, None]


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
    directions: Sequence[str] = ("lr", "rl", "tb", "bt"),
    softplus: bool = True,
) -> Tensor:
    """The same image u (batch, H, W, D) along every direction with its own parameters, summed."""
    every = u.unsqueeze(3).expand(*u.shape[:3], len(directions), u.shape[3])
    y = grouped_selective_scan(
        every, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, directions=directions, softplus=softplus
    )
    return y.sum(3)
