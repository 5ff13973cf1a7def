# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth (Huang et al., ECCV 2016, arXiv 1603.09382): images of a batch that skip a residual branch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DropPathMask(NamedTuple):
    """Which images of a batch take a residual branch: ``x + mask * scale * branch(x)``.

    On CUDA a branch that is one op counts it in its own kernels, for no pass over the image.
    """

    mask: Tensor  # (batch,), float32: 1 for images that take the branch, else 0
    scale: float  # of the branch in these

    @classmethod
    def draw(cls, x: Tensor, drop_prob: float, *, scale_by_keep: bool = True) -> DropPathMask:
        """Each image of ``x`` is kept with probability ``1 - drop_prob``, scaled so that the mean stays the same."""
        keep = 1.0 - drop_prob
        mask = x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep)
        return cls(mask, 1.0 / keep if scale_by_keep and keep > 0.0 else 1.0)

    def check(self, x: Tensor, residual: bool) -> None:
        """Raises where these are not for the batch ``x``."""
        if not residual:
            raise ValueError("drop_path needs residual=True, got residual=False")
        if self.mask.shape != x.shape[:1] or self.mask.dtype != torch.float32:
            got = f"{tuple(self.mask.shape)} in {self.mask.dtype}"
            raise ValueError(f"drop_path must be ({x.shape[0]},) in torch.float32 for this batch, got {got}")

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x + mask * scale * branch`` for (batch, ...)."""
        factor = (self.mask * self.scale).to(branch.dtype)
        return x + branch * factor.view(-1, *(1,) * (branch.dim() - 1))


def add(x: Tensor, branch: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
    """The branch alone, or ``residual``, ``x`` plus what counts of it."""
    if not residual:
        return branch
    return x + branch if drop_path is None else drop_path.added(x, branch)
