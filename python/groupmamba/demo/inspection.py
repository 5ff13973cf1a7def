# SPDX-License-Identifier: Apache-2.0
"""What ``groupmamba demo`` shows of a layer: its groups' responses, how far they reach, its gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import groupmamba_ext as ext
from groupmamba.layers import GroupedMamba2d


@dataclass
class Picture:
    """What the drawing shows; images are (H, W, ...) on the CPU, at the resolution of the tokens or the photograph."""

    photo: Tensor  # (rows, columns, 3) in [0, 1]
    directions: tuple[str, ...]
    responses: Tensor  # (H, W, G, 3) in [0, 1]
    output: Tensor  # (H, W, 3) in [0, 1]
    reach: Tensor  # (H, W, G), gradient norms
    marked: tuple[int, int]
    gates: Tensor  # (G, D)
    notes: list[str]


def principal_colours(features: Tensor) -> Tensor:
    """The first three principal components of (H, W, C) features as red, green and blue, (H, W, 3) in [0, 1]."""
    rows = features.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)
    top = axes[:, -3:].flip(1)
    top = top * top.sum(0).sign()  # the sign of an eigenvector is arbitrary
    colours = rows @ top
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    return ((colours - low) / (high - low + 1e-12)).clamp(0, 1).view(*features.shape[:2], 3)


def inspect(layer: GroupedMamba2d, x: Tensor, photo: Tensor, notes: list[str]) -> Picture:
    """The layer's inner values on the image, and how strongly each input token reaches one output token."""
    tokens = x.permute(0, 2, 3, 1)
    affinity = layer.affinity
    assert affinity is not None
    with torch.no_grad():
        xn, pooled = ext.layer_norm_pool(tokens, layer.norm.weight, layer.norm.bias, layer.norm.eps)
        gates = affinity.from_pooled(pooled)[0]
        output = layer(x)[0].permute(1, 2, 0)
    height, width = xn.shape[1:3]
    marked = (int(0.55 * height), int(0.5 * width))
    groups = xn.unflatten(-1, (layer.groups, -1)).requires_grad_()
    responses = layer.mamba(groups)
    responses[0, marked[0], marked[1]].sum().backward()
    reach = groups.grad[0].norm(dim=-1)
    responses = responses.detach()[0].cpu()
    return Picture(
        photo=photo,
        directions=layer.directions,
        responses=torch.stack([principal_colours(group) for group in responses.unbind(2)], 2),
        output=principal_colours(output.cpu()),
        reach=reach.cpu(),
        marked=marked,
        gates=gates.cpu().unflatten(0, (layer.groups, -1)),
        notes=notes,
    )
