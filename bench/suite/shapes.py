# SPDX-License-Identifier: Apache-2.0
"""The shapes that are measured, and random tensors of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from suite.problem import Shape

GROUPS = 4
STATES = 1
STAGES = ((64, 56), (128, 28), (348, 14), (448, 7))  # channels and side of GroupMamba-T at 224 x 224
FEED_FORWARD_RATIOS = {64: 8, 128: 8, 348: 4, 448: 4}  # of GroupMamba-T: hidden channels over channels
PADDED = (352, 14)  # 348 channels as the layer stores them, 88 a group
GROWTH_SIDES = (56, 128, 256, 512, 1024)
GROWTH_TOKENS = 1 << 20


def stage_shapes(device: str, quick: bool, batches: Sequence[int] | None) -> list[Shape]:
    """The four stages of GroupMamba-T; on the CPU one image, and with ``quick`` small ones."""
    stages = STAGES
    if device == "cpu" and quick:
        stages = ((64, 14), (348, 7))
    batches = batches or ((128,) if device == "cuda" else (1,))
    return [square(batch, stage) for batch in batches for stage in stages]


def growth_shapes(channels: int = 64) -> list[Shape]:
    """Growing images with 2^20 tokens a batch, or as near as whole images come."""
    return [Shape(max(1, GROWTH_TOKENS // side**2), channels, side, side) for side in GROWTH_SIDES]


class Draw:
    """Random tensors on a device, the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, mean: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.empty(shape, device=self.device, dtype=torch.float32).normal_(mean, scale, generator=self.generator)
        return t.to(dtype or self.dtype)

    def parameter(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, mean=mean, scale=scale, dtype=torch.float32)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        t = torch.empty(shape, device=self.device, dtype=torch.float32)
        return t.uniform_(low, high, generator=self.generator)

    def grouped(self, shape: Shape, width: int, storage: str) -> Tensor:
        """(batch, H, W, G, width), group-major or token-major in memory."""
        if storage == "group-major":
            dense = self.normal(GROUPS, shape.batch, shape.height, shape.width, width)
            return dense.permute(1, 2, 3, 0, 4)
        return self.normal(shape.batch, shape.height, shape.width, GROUPS, width)


def square(batch: int, stage: tuple[int, int]) -> Shape:
    """A batch of square images of ``stage`` (channels, side)."""
    channels, side = stage
    return Shape(batch, channels, side, side)
