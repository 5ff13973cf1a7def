# SPDX-License-Identifier: Apache-2.0
"""Parameters of a module without its attributes' price: each costs a slow host a microsecond, a layer has twenty."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    """The attributes ``names`` of ``module``, which are parameters or, where a parametrization, pruning or sharding has
    taken a parameter's place, what it put there."""
    held = module._parameters
    try:
        return [held[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


AFFINE = ("weight", "bias")
