# SPDX-License-Identifier: Apache-2.0
"""Which parameters of the layers an optimizer should not decay."""

from __future__ import annotations

from torch import nn

from groupmamba.layers.group_core import GroupCore
from groupmamba.layers.vsss import GroupedVSSS


def no_weight_decay(module: nn.Module) -> set[str]:
    """Names of parameters, of all grouped Mambas and VSSS blocks in ``module``, that are not decayed.

    ``A_log``, ``D``, step biases, and the norms and biases that are stacked by group. The latter have two dimensions,
    so that the usual rule (vectors are not decayed) does not find them. What counts are names, not attributes of
    tensors, which copying, sharding and ``load_state_dict(assign=True)`` lose.
    """
    names = set()
    for prefix, part in module.named_modules():
        if isinstance(part, (GroupCore, GroupedVSSS)):
            names |= {
                f"{prefix}.{name}" if prefix else name
                for name, _ in part.named_parameters()
                if any(_not_decayed(word) for word in name.split("."))
            }
    return names


def _not_decayed(name: str) -> bool:
    name = name.removesuffix("_orig")  # as torch's pruning renames a parameter
    return name in ("A_log", "D") or name.endswith(("_bias", "norm_weight", "norm1_weight", "norm2_weight"))
