# SPDX-License-Identifier: Apache-2.0
"""The gradients of a module's parameters in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

ALIGNMENT = 16  # bytes


def like(tensor: Tensor, device: str | None = None) -> Tensor:
    """Memory for a tensor in the same order, without gaps. No kernel fills it, which a replay would run again."""
    settings: Any = deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        return torch.empty_like(tensor, device=device, requires_grad=False)
    finally:
        settings.fill_uninitialized_memory = before


class Place(NamedTuple):
    """Of a parameter's gradient in a packed tensor."""

    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Packing:
    """The gradients of one dtype in one tensor: a replay takes one copy, not one for each parameter. Each begins at a
    multiple of `ALIGNMENT` bytes, as kernels of optimizers are faster so."""

    def __init__(self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], dtype: torch.dtype):
        self.places = [
            Place(i, tuple(p.shape), like(p, "meta").stride())
            for i, (gradient, p) in enumerate(zip(gradients, parameters, strict=True))
            if gradient is not None and gradient.dtype == dtype
        ]
        unit = max(ALIGNMENT // dtype.itemsize, 1)
        counts = [parameters[place.number].numel() for place in self.places]
        self.sizes = [size for count in counts for size in (count, -count % unit)]  # and what is left out behind it

    def pack(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """One after the other, each in its parameter's order."""
        found = []
        for place in self.places:
            gradient = gradients[place.number]
            assert gradient is not None
            if gradient.stride() != place.strides:
                gradient = gradient.new_empty_strided(place.shape, place.strides).copy_(gradient)
            found.append(gradient)
        packed = found[0].new_empty(sum(self.sizes))
        torch._foreach_copy_(self.unpack(packed), found)
        return packed

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Views of ``packed``, in the order of `places`."""
        return [
            part if len(place.shape) == 1 else part.as_strided(place.shape, place.strides, part.storage_offset())
            for place, part in zip(self.places, packed.split(self.sizes)[::2], strict=True)
        ]
