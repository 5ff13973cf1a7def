# SPDX-License-Identifier: Apache-2.0
"""The layer of ``groupmamba demo``, its check against the reference, and its times."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import groupmamba_ext as ext
from groupmamba.demo.features import DIM
from groupmamba.layers import GroupedMamba2d
from groupmamba.model_info import median_seconds

SECONDS = 0.2  # of measuring for each row of the table


@dataclass
class Timing:
    """One row of the printed table."""

    what: str
    device: str
    size: str
    milliseconds: float
    whole_image: bool


def random_layer() -> GroupedMamba2d:
    """A layer with fixed random weights of about unit gain and long memories.

    At the small gains and short memories that training starts from, what the scans carry hardly shows.
    """
    torch.manual_seed(0)
    layer = GroupedMamba2d(DIM, d_state=8)
    core, affinity = layer.mamba, layer.affinity
    assert affinity is not None and core.out_proj_weight is not None
    with torch.no_grad():
        for weight in (core.in_proj_weight, core.out_proj_weight, layer.proj.weight, affinity.fc2.weight):
            weight.mul_(weight.shape[-1] ** -0.5 / 0.02)
        affinity.fc1.weight.mul_(100)
        core.x_proj_weight.mul_(3)
        core.dt_weight.mul_(0.3)
        core.dt_bias.sub_(1.5)
        core.D.mul_(0.3)
    return layer


def forward_backward(layer: GroupedMamba2d, x: Tensor) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients, for the output itself as output gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(y.detach())
    return {"output": y.detach(), "input gradient": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def check(layer: GroupedMamba2d, crop: Tensor) -> tuple[str, float]:
    """The quantity with the worst relative error of the compiled ops against the float64 reference, and that error.

    Without skip_scale, whose gradient cancels up to rounding, since a norm follows it.
    """
    actual = forward_backward(layer, crop)
    with ext.backend("reference"):
        expected = forward_backward(copy.deepcopy(layer).cpu().double(), crop.cpu().double())
    errors = {}
    for name, value in actual.items():
        if name != "skip_scale":
            error = ((value.cpu().double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)).item()
            errors[name] = error if math.isfinite(error) else math.inf
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def measure(layer: GroupedMamba2d, x: Tensor, crop: Tensor, step: Callable[[str], None]) -> list[Timing]:
    """Times of the whole image (two rows), and of the crop with the compiled ops and with the reference (two rows)."""
    device = x.device.type
    rows = []

    def add(what: str, image: Tensor, run: Callable[[], object]) -> None:
        step(f"{device}: {what}")
        size = " x ".join(map(str, image.shape[1:]))
        rows.append(Timing(what, device, size, 1e3 * median_seconds(run, SECONDS), image is x))

    with torch.no_grad():
        add("forward", x, lambda: layer(x))
    add("forward + backward", x, lambda: forward_backward(layer, x))
    add("forward + backward, crop", crop, lambda: forward_backward(layer, crop))
    with ext.backend("reference"):
        add("the crop in plain PyTorch", crop, lambda: forward_backward(layer, crop))
    return rows
