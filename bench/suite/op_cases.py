# SPDX-License-Identifier: Apache-2.0
"""The cases of the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import groupmamba_ext as ext
from suite import flops, truth
from suite.problem import Case, Problem, Shape
from suite.shapes import FEED_FORWARD_RATIOS, GROUPS, PADDED, STAGES, STATES, Draw, growth_shapes, square, stage_shapes

DIRECTIONS = ("lr", "rl", "tb", "bt")
CROSS_DIRECTIONS = ("lr", "tb", "rl", "bt")  # the order of VMamba's weights
Batches = Sequence[int] | None


def _recurrence_inputs(draw: Draw, dim: int, rank: int) -> dict[str, Tensor]:
    """The parameters of G scans: steps from 0.001 to 0.1 as in the released initialisation, A near -1."""
    step = torch.exp(draw.uniform(GROUPS, dim, low=-6.9, high=-2.3))
    return {
        "A": -torch.exp(draw.parameter(GROUPS, dim, STATES, scale=0.2)),
        "D": draw.parameter(GROUPS, dim, mean=1.0, scale=0.1),
        "dt_weight": draw.uniform(GROUPS, dim, rank, low=-(rank**-0.5), high=rank**-0.5),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }


def _scan(shape: Shape, dtype: torch.dtype, storage: str, device: torch.device) -> Problem:
    draw = Draw(device, dtype)
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
        flops=flops.scan(shape),
    )


def scan_cases(device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Batches) -> Iterator[Case]:
    """`grouped_selective_scan` with z, norm and gate, all four directions in use."""

    def case(shape: Shape, dtype: torch.dtype, storage: str = "group-major", series: str = "stages") -> Case:
        prepare = partial(_scan, shape, dtype, storage)
        return Case("scan", "grouped_selective_scan", shape, dtype, storage, prepare, series=series)

    stages = stage_shapes(device, quick, batches)
    for dtype in dtypes:
        yield from (case(shape, dtype) for shape in stages)
        if device == "cpu" or quick:
            continue
        yield from (case(square(batch, PADDED), dtype, series="padded") for batch in sorted({s.batch for s in stages}))
        yield from (case(shape, dtype, "token-major") for shape in stages)
        if batches is None:
            yield from (case(square(batch, STAGES[0]), dtype, series="batch") for batch in (16, 1))
            yield from (case(shape, dtype, series="growth") for shape in growth_shapes())


def _cross(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    draw = Draw(device, dtype)
    rank = -(-shape.channels // 16)
    inputs = {"u": draw.normal(shape.batch, shape.height, shape.width, shape.channels)}
    inputs |= {name: draw.grouped(shape, width, "group-major") for name, width in (("dt", rank), ("B", 1), ("C", 1))}
    inputs |= _recurrence_inputs(draw, shape.channels, rank)
    options = {"directions": CROSS_DIRECTIONS}
    return Problem(
        inputs,
        lambda **tensors: ext.cross_selective_scan(**tensors, **options),
        partial(truth.cross_selective_scan, **options),
        flops=flops.cross(shape, len(CROSS_DIRECTIONS)),
    )


def cross_cases(device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Batches) -> Iterator[Case]:
    """`cross_selective_scan`: one image along all four directions, summed.

    Raises:
        ValueError: this version of groupmamba_ext has no such op.
    """
    if not hasattr(ext, "cross_selective_scan"):
        raise ValueError(f"'cross' needs cross_selective_scan, which groupmamba_ext {ext.__version__} does not have")
    for dtype in dtypes:
        for shape in stage_shapes(device, quick, batches):
            prepare = partial(_cross, shape, dtype)
            yield Case("cross", "cross_selective_scan", shape, dtype, "u token-major", prepare)


def _conv(shape: Shape, dtype: torch.dtype, grouped: bool, activation: str, device: torch.device) -> Problem:
    draw = Draw(device, dtype)
    if grouped:
        lead = (GROUPS, shape.channels // GROUPS)
        x = draw.grouped(shape, lead[1], "group-major")
    else:
        lead = (shape.channels,)
        x = draw.normal(shape.batch, shape.height, shape.width, shape.channels)
    inputs = {"x": x, "weight": draw.parameter(*lead, 3, 3, scale=0.3), "bias": draw.parameter(*lead, scale=0.1)}
    return Problem(
        inputs,
        lambda **tensors: ext.depthwise_conv3x3(**tensors, activation=activation),
        partial(ext.reference.depthwise_conv3x3, activation=activation),
        flops=flops.convolution(shape),
    )


def conv_cases(device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Batches) -> Iterator[Case]:
    """`depthwise_conv3x3` as the layer calls it, and at the widths of the feed-forward networks."""
    for dtype in dtypes:
        shapes = stage_shapes(device, quick, batches)
        for shape in shapes:
            prepare = partial(_conv, shape, dtype, True, "silu")
            yield Case("conv", "depthwise_conv3x3 + SiLU", shape, dtype, "group-major", prepare)
        for shape in shapes:
            hidden = shape.channels * FEED_FORWARD_RATIOS[shape.channels]
            wide = Shape(shape.batch, hidden, shape.height, shape.width)
            prepare = partial(_conv, wide, dtype, False, "gelu")
            yield Case("conv", "depthwise_conv3x3 + GELU", wide, dtype, "channels_last", prepare)


def _pool(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    draw = Draw(device, dtype)
    inputs = {"x": draw.normal(shape.batch, shape.height, shape.width, shape.channels)}
    inputs |= {"weight": draw.parameter(shape.channels, mean=1.0, scale=0.1), "bias": draw.parameter(shape.channels)}
    reference = ext.reference.layer_norm_pool
    return Problem(inputs, lambda **tensors: ext.layer_norm_pool(**tensors), reference, flops=flops.norm(shape))


def _modulated(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    draw = Draw(device, dtype)
    inputs = {
        "o": draw.grouped(shape, shape.channels // GROUPS, "group-major"),
        "x": draw.normal(shape.batch, shape.height, shape.width, shape.channels),
        "scale": draw.parameter(1, mean=1.0, scale=0.1),
        "weight": draw.parameter(shape.channels, mean=1.0, scale=0.1),
        "bias": draw.parameter(shape.channels, scale=0.1),
        "gate": draw.uniform(shape.batch, shape.channels),
    }
    reference = ext.reference.modulated_layer_norm
    return Problem(inputs, lambda **tensors: ext.modulated_layer_norm(**tensors), reference, flops=flops.norm(shape))


def norm_cases(device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Batches) -> Iterator[Case]:
    """`layer_norm_pool` and `modulated_layer_norm` as the layer calls them."""
    kinds: tuple[tuple[str, str, Callable], ...] = (
        ("layer_norm_pool", "channels_last", _pool),
        ("modulated_layer_norm", "o group-major", _modulated),
    )
    for dtype in dtypes:
        for label, storage, make in kinds:
            for shape in stage_shapes(device, quick, batches):
                yield Case("norm", label, shape, dtype, storage, partial(make, shape, dtype))
