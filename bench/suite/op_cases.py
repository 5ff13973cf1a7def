# SPDX-License-Identifier: Apache-2.0
"""The cases of the ops: shapes, storage and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import groupmamba_ext as ext
from suite import truth
from suite.problem import Case, Problem, Shape

GROUPS = 4
STATES = 1
STAGES = ((64, 56), (128, 28), (348, 14), (448, 7))  # channels and side of GroupMamba-T at 224 x 224
PADDED = (352, 14)  # 348 channels as the layer stores them, 88 a group
GROWTH_SIDES = (56, 128, 256, 512, 1024)
GROWTH_TOKENS = 1 << 20
DIRECTIONS = ("lr", "rl", "tb", "bt")


def stage_shapes(device: str, quick: bool, batches: Sequence[int] | None) -> list[Shape]:
    """The four stages of GroupMamba-T; on the CPU one image, and with ``quick`` small ones."""
    stages = STAGES
    if device == "cpu" and quick:
        stages = ((64, 14), (348, 7))
    batches = batches or ((128,) if device == "cuda" else (1,))
    return [Shape(batch, c, side, side) for batch in batches for c, side in stages]


def growth_shapes(channels: int = 64) -> list[Shape]:
    """Growing images with 2^20 tokens a batch, or as near as whole images come."""
    return [Shape(max(1, GROWTH_TOKENS // side**2), channels, side, side) for side in GROWTH_SIDES]


class _Draw:
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


def _recurrence_inputs(draw: _Draw, dim: int, rank: int) -> dict[str, Tensor]:
    """The parameters of G scans: steps from 0.001 to 0.1 as in the released initialisation, A near -1."""
    step = torch.exp(draw.uniform(GROUPS, dim, low=-6.9, high=-2.3))
    return {
        "A": -torch.exp(draw.parameter(GROUPS, dim, STATES, scale=0.2)),
        "D": draw.parameter(GROUPS, dim, mean=1.0, scale=0.1),
        "dt_weight": draw.uniform(GROUPS, dim, rank, low=-(rank**-0.5), high=rank**-0.5),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }


def _scan(shape: Shape, dtype: torch.dtype, storage: str, device: torch.device) -> Problem:
    draw = _Draw(device, dtype)
    dim = shape.channels // GROUPS
    rank = -(-dim // 16)
    widths = {"u": dim, "z": dim, "dt": rank, "B": STATES, "C": STATES}
    inputs = {name: draw.grouped(shape, width, storage) for name, width in widths.items()}
    inputs |= _recurrence_inputs(draw, dim, rank)
    inputs |= {
        "norm_weight": draw.parameter(GROUPS, dim, mean=1.0, scale=0.1),
        "norm_bias": draw.parameter(GROUPS, dim, scale=0.1),
        "gate": draw.uniform(shape.batch, GROUPS, dim),
    }
    options = {"directions": DIRECTIONS}
    return Problem(
        inputs,
        lambda **tensors: ext.grouped_selective_scan(**tensors, **options),
        partial(truth.grouped_selective_scan, **options),
    )


def scan_cases(
    device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Sequence[int] | None
) -> Iterator[Case]:
    """`grouped_selective_scan` with z, norm and gate, all four directions in use."""

    def case(shape: Shape, dtype: torch.dtype, storage: str = "group-major", series: str = "stages") -> Case:
        prepare = partial(_scan, shape, dtype, storage)
        return Case("scan", "grouped_selective_scan", shape, dtype, storage, prepare, series=series)

    stages = stage_shapes(device, quick, batches)
    for dtype in dtypes:
        yield from (case(shape, dtype) for shape in stages)
        if device == "cpu" or quick:
            continue
        yield from (case(Shape(batch, *_square(PADDED)), dtype) for batch in sorted({s.batch for s in stages}))
        yield from (case(shape, dtype, "token-major") for shape in stages)
        if batches is None:
            yield from (case(Shape(batch, *_square(STAGES[0])), dtype, series="batch") for batch in (16, 1))
            yield from (case(shape, dtype, series="growth") for shape in growth_shapes())


def _square(stage: tuple[int, int]) -> tuple[int, int, int]:
    channels, side = stage
    return channels, side, side
