# SPDX-License-Identifier: Apache-2.0
"""Features of a photograph for ``groupmamba demo``, without training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIM = 64
STRIDE = 4
WINDOW = 8


def embed(photo: Tensor) -> Tensor:
    """Features of overlapping 8x8 windows, (1, DIM, H, W): what a trained stem would feed the layer, without training.

    The lowest cosine coefficients of brightness (32) and of two colour differences (16 each), scaled to equal
    deviations, weakened towards high frequencies, and mixed by a fixed random rotation, so that every group sees
    colours and textures.
    """
    cosines = torch.cos(torch.arange(WINDOW)[:, None] * (torch.arange(WINDOW) + 0.5) * math.pi / WINDOW)
    order = sorted(((i, j) for i in range(WINDOW) for j in range(WINDOW)), key=lambda ij: (sum(ij), ij))
    basis = torch.stack([torch.outer(cosines[i], cosines[j]) for i, j in order]).unsqueeze(1)
    colours = torch.tensor([[0.3, 0.6, 0.1], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])
    planes = ((photo - 0.5) @ colours.T).permute(2, 0, 1).unsqueeze(1)
    planes = F.pad(planes, (WINDOW // 4,) * 4, mode="reflect")
    coefficients = F.conv2d(planes, basis, stride=STRIDE)  # (3, 64, H, W)
    features = torch.cat([coefficients[0, :32], coefficients[1, :16], coefficients[2, :16]])
    frequencies = torch.tensor([sum(ij) for count in (32, 16, 16) for ij in order[:count]])
    features = features / (features.std((1, 2), keepdim=True) + 1e-6) / (1.0 + frequencies)[:, None, None]
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))
    return torch.einsum("dc,chw->dhw", rotation, features).unsqueeze(0).to(memory_format=torch.channels_last)
