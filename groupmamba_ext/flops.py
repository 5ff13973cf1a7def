# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas of the ops for `torch.utils.flop_counter.FlopCounterMode`, a multiplication and an addition one each.

As for torch's own formulas only the terms that grow with a contraction count: the recurrence over the states, the
low-rank step projection, the taps of the convolution. Norms, gates and activations do not.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula


def _numel(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _scan_channel_flops(A_shape, D_shape=None, dt_weight_shape=None) -> int:
    per_channel = 1 + 7 * A_shape[-1]
    if D_shape is not None:
        per_channel += 2
    if dt_weight_shape is not None:
        per_channel += 2 * dt_weight_shape[-1]
    return per_channel


def grouped_scan_flops(u_shape, A_shape, D_shape=None, dt_weight_shape=None) -> int:
    """One forward scan: step * A, exp, a * h + (step * u) * B and C . h for each state, the skip, the projection.

    A token and channel costs 1 + 7 N, 2 more with the skip, 2 R more with the low-rank step.
    """
    return _numel(u_shape) * _scan_channel_flops(A_shape, D_shape, dt_weight_shape)


def cross_scan_flops(u_shape, A_shape, D_shape=None, dt_weight_shape=None) -> int:
    """One forward cross scan: as many grouped scans as directions, and an addition a direction but the first."""
    count = A_shape[-3]
    return _numel(u_shape) * (count * _scan_channel_flops(A_shape, D_shape, dt_weight_shape) + count - 1)


def _scan_fwd(u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    return grouped_scan_flops(u, A, D, dt_weight)


def _scan_bwd(dy, u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    # The states are recomputed, then every product has two derivatives.
    return 3 * grouped_scan_flops(u, A, D, dt_weight)


def _cross_fwd(u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    return cross_scan_flops(u, A, D, dt_weight)


def _cross_bwd(dy, u, dt, A, B, C, D=None, dt_weight=None, *args, out_shape=None, **kwargs) -> int:
    return 3 * cross_scan_flops(u, A, D, dt_weight)


def _conv_fwd(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 18 * _numel(x)


def _conv_bwd(dy, x, weight, *args, out_shape=None, **kwargs) -> int:
    return 36 * _numel(x)


def register() -> None:
    """Registers the formulas; runs once, after libgroupmamba is loaded."""
    ops = torch.ops.groupmamba
    register_flop_formula(ops.grouped_selective_scan_fwd)(_scan_fwd)
    register_flop_formula(ops.grouped_selective_scan_bwd)(_scan_bwd)
    register_flop_formula(ops.cross_selective_scan_fwd)(_cross_fwd)
    register_flop_formula(ops.cross_selective_scan_bwd)(_cross_bwd)
    register_flop_formula(ops.depthwise_conv3x3_fwd)(_conv_fwd)
    register_flop_formula(ops.depthwise_conv3x3_bwd)(_conv_bwd)
