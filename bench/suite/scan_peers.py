# SPDX-License-Identifier: Apache-2.0
"""Whole scans around the one-dimensional scans of other projects, each fed in the layout that its project uses.

Their kernels take sequences, (batch, channels, L). What stands around them, the flips and transposes of the image, the
step projection, norm and gates, is timed with them, since this project's ops do it too. The step features, B and C are
handed to them in path order: their own layers compute them there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.checkouts import load
from suite.truth import from_path, to_path

# scan(u, delta, A, B, C, D, delta_bias) with u, delta (batch, G * D, L), A (G * D, N), B, C (batch, G, N, L)
Scan = Callable[..., Tensor]


def mamba_ssm_scan() -> Scan:
    """`selective_scan_fn` of mamba_ssm.

    Raises:
        ImportError: it is not installed.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(u, delta, A, B, C, D, delta_bias):
        return selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)

    return scan


def released_scan(path: Path) -> Scan:
    """The scan of the released GroupMamba, in float32 as its layer calls it."""
    core = load("released", path, "csms6s").SelectiveScanCore

    def scan(u, delta, A, B, C, D, delta_bias):
        return core.apply(u.float(), delta.float(), A, B.float(), C.float(), D, delta_bias, True)

    return scan


def sequences(t: Tensor, directions: tuple[str, ...]) -> Tensor:
    """(batch, H, W, G, K) to (batch, G, K, L) in path order."""
    return to_path(t, directions).permute(0, 2, 3, 1).contiguous()


def grouped_inputs(inputs: dict[str, Tensor], directions: tuple[str, ...]) -> dict[str, Tensor]:
    """Channels first: u as (batch, G, D, H, W), and what a layer computes in path order in path order."""
    ordered = {name: sequences(inputs[name], directions) for name in ("dt", "B", "C")}
    return inputs | ordered | {"u": inputs["u"].permute(0, 3, 4, 1, 2).contiguous()}


def grouped_scan(scan: Scan, directions: tuple[str, ...]) -> Callable[..., Tensor]:
    """`grouped_selective_scan` on :func:`grouped_inputs`."""

    def function(*, u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate) -> Tensor:
        groups, dim, height, width = u.shape[1:]
        ordered = sequences(u.permute(0, 3, 4, 1, 2), directions).flatten(1, 2)
        step = torch.einsum("bgrl,gdr->bgdl", dt, dt_weight.to(dt.dtype)).flatten(1, 2)
        y = scan(ordered, step, A.flatten(0, 1), B, C, D.flatten(), dt_bias.flatten())
        y = from_path(y.unflatten(1, (groups, dim)).permute(0, 3, 1, 2), directions, height, width)
        y = F.layer_norm(y.float(), (dim,)) * norm_weight + norm_bias
        return (y * F.silu(z) * gate[:, None, None]).to(u.dtype)

    return function


def cross_inputs(inputs: dict[str, Tensor], directions: tuple[str, ...]) -> dict[str, Tensor]:
    """Channels first, as above, for one image that all directions share."""
    ordered = {name: sequences(inputs[name], directions) for name in ("dt", "B", "C")}
    return inputs | ordered | {"u": inputs["u"].permute(0, 3, 1, 2).contiguous()}


def vmamba_cross_scan(path: Path) -> Callable[..., Tensor]:
    """`cross_selective_scan` by VMamba's Triton cross scan, CUDA scan and cross merge, on :func:`cross_inputs`."""
    triton, scans = load("vmamba", path, "csm_triton"), load("vmamba", path, "csms6s")

    def function(*, u, dt, A, B, C, D, dt_weight, dt_bias) -> Tensor:
        batch, dim, height, width = u.shape
        count = A.shape[0]
        xs = triton.cross_scan_fn(u, in_channel_first=True, out_channel_first=True, scans=0)
        weight = dt_weight.to(dt.dtype).flatten(0, 1).unsqueeze(-1)
        step = F.conv1d(dt.flatten(1, 2), weight, groups=count)
        ys = scans.selective_scan_fn(
            xs.flatten(1, 2), step, A.flatten(0, 1), B, C, D.flatten(), dt_bias.flatten(), True, True
        )
        ys = ys.view(batch, count, dim, height, width)
        y = triton.cross_merge_fn(ys, in_channel_first=True, out_channel_first=True, scans=0)
        return y.view(batch, dim, height, width).permute(0, 2, 3, 1).to(u.dtype)

    return function
