# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of the cases, for the roofline.

The scans by the formula that `groupmamba_ext.ops` registers with torch's counter; a multiplication and an addition
are two. A backward pass takes both derivatives of every product: twice the forward, and the scan's recomputes its
states: three times.
"""

from __future__ import annotations

from suite.problem import Shape
from suite.shapes import GROUPS, STATES

NORM = 8  # an element: mean, variance, normalisation, weight and bias
CONVOLUTION = 18  # an element: nine taps


def _passes(once: int, scans: int = 0) -> dict[str, int]:
    return {"forward": once + scans, "backward": 2 * once + 3 * scans}


def _scan(elements: int, rank: int, states: int = STATES) -> int:
    from groupmamba_ext.ops.grouped_selective_scan import grouped_scan_flops

    return grouped_scan_flops((elements,), (1, 1, states), (1, 1), (1, 1, rank))


def scan(shape: Shape) -> dict[str, int]:
    """`grouped_selective_scan` with its norm."""
    elements = shape.tokens * shape.channels
    return _passes(NORM * elements, _scan(elements, -(-shape.channels // GROUPS // 16)))


def cross(shape: Shape, directions: int) -> dict[str, int]:
    """`cross_selective_scan`."""
    return _passes(0, directions * _scan(shape.tokens * shape.channels, -(-shape.channels // 16)))


def convolution(shape: Shape) -> dict[str, int]:
    """`depthwise_conv3x3`."""
    return _passes(CONVOLUTION * shape.tokens * shape.channels)


def norm(shape: Shape) -> dict[str, int]:
    """A LayerNorm."""
    return _passes(NORM * shape.tokens * shape.channels)


def layer(shape: Shape, states: int = STATES) -> dict[str, int]:
    """The released variant of `GroupedMamba2d`, one direction a group: products, convolution, three norms, scans."""
    channels = shape.channels
    dim = channels // GROUPS
    rank = -(-dim // 16)
    columns = 2 * dim + (rank + 2 * states) + dim + channels  # in_proj, x_proj, out_proj, proj: for each input channel
    elements = shape.tokens * channels
    return _passes(elements * (2 * columns + CONVOLUTION + 3 * NORM), _scan(elements, rank, states))


def feed_forward(shape: Shape, hidden: int) -> dict[str, int]:
    """LayerNorm, two products and a convolution of ``hidden`` channels between them."""
    return _passes(shape.tokens * (NORM * shape.channels + 4 * shape.channels * hidden + CONVOLUTION * hidden))
