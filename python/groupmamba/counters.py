# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds for tools that count by module, of the modules here whose work no submodule of theirs shows.

A :class:`~groupmamba.layers.group_core.GroupCore` holds the stacked parameters of all groups' Mambas, so that a counter
of ``nn.Linear`` and ``nn.Conv2d`` misses their products, the convolution and the scan: 0.28 of GroupMamba-T's 4.66 G.

.. code-block:: python

    thop.profile(model, (x,), custom_ops=groupmamba.counters.THOP)
    ptflops.get_model_complexity_info(model, (3, 224, 224), custom_modules_hooks=groupmamba.counters.PTFLOPS)

``torch.utils.flop_counter.FlopCounterMode`` knows the ops themselves and needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from groupmamba.layers.group_core import GroupCore
from groupmamba.layers.vsss import GroupedVSSS, VSSSBlock
from groupmamba_ext.ops.cross_selective_scan import cross_scan_flops
from groupmamba_ext.ops.grouped_selective_scan import grouped_scan_flops


def group_core_multiply_adds(core: GroupCore, tokens: int, *, products: bool = True) -> int:
    """Of all groups over ``tokens`` tokens (batch x H x W): the projections unless ``products`` is False, the
    convolution, and half of the scan's operations."""
    groups, inner, dim = core.groups, core.inner_dim, core.dim
    scans = len(core.directions) if core.scan == "cross" else 1
    count = 9 * inner if core.d_conv == 3 else 0
    if products:
        count += 2 * inner * dim + scans * (core.dt_rank + 2 * core.d_state) * inner
        count += 0 if core.out_proj_weight is None else dim * inner
    scan_flops = cross_scan_flops if core.scan == "cross" else grouped_scan_flops
    scan = scan_flops((tokens, groups, inner), core.A_log.shape, core.D.shape, core.dt_weight.shape)
    return tokens * groups * count + scan // 2


def grouped_vsss_multiply_adds(block: GroupedVSSS, tokens: int, *, products: bool = True) -> int:
    """Of all groups' Mambas and, unless ``products`` is False, feed-forward networks over ``tokens`` tokens."""
    feed_forward = 2 * block.groups * block.dim * block.fc1_bias.shape[1] if products else 0
    return group_core_multiply_adds(block.mamba, tokens, products=products) + tokens * feed_forward


def _tokens_of_core(x: Tensor) -> int:  # (batch, H, W, G, D)
    return x.shape[0] * x.shape[1] * x.shape[2]


def _tokens_of_image(x: Tensor) -> int:  # (batch, C, H, W) or (C, H, W)
    return x.numel() // max(x.shape[-3], 1)


_BMM = torch.bmm
_COUNTED: dict[type[nn.Module], tuple[Callable[..., int], Callable[[Tensor], int]]] = {
    GroupCore: (group_core_multiply_adds, _tokens_of_core),
    GroupedVSSS: (grouped_vsss_multiply_adds, _tokens_of_image),
    VSSSBlock: (grouped_vsss_multiply_adds, _tokens_of_image),
}


def _count(module: nn.Module, inputs: tuple[Tensor, ...], *, products: bool = True) -> int:
    count, tokens = _COUNTED[type(module)]
    return count(module, tokens(inputs[0]), products=products)


def _thop_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    module.total_ops += _count(module, inputs)


def _ptflops_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # By default ptflops puts counting functions in the place of torch.bmm and others, and so knows the products.
    module.__flops__ += _count(module, inputs, products=torch.bmm is _BMM)


THOP = dict.fromkeys(_COUNTED, _thop_hook)
PTFLOPS = dict.fromkeys(_COUNTED, _ptflops_hook)
