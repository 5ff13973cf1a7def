# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth (Huang et al., ECCV 2016, arXiv 1603.09382): images of a batch that skip a residual branch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeptImages(NamedTuple):
    """Which images of a batch take a residual branch: ``x + kept * scale * branch(x)``.

    On CUDA a branch that is one op counts it in its own kernels, for no pass over the image.
    """

    kept: Tensor  # (batch,), float32: 1 for images that take the branch, else 0
    scale: float  # of the branch in these

    @classmethod
    def draw(cls, x: Tensor, drop_prob: float, *, scale_by_keep: bool = True) -> KeptImages:
        """Each image of ``x`` is kept with probability ``1 - drop_prob``, scaled so that the mean stays the same."""
        keep = 1.0 - drop_prob
        kept = x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep)
        return cls(kept, 1.0 / keep if scale_by_keep and keep > 0.0 else 1.0)

    def check(self, x: Tensor, residual: bool) -> None:
        """Raises where these are not for the batch ``x``."""
        if not residual:
            raise ValueError("kept needs residual=True, got residual=False")
        if self.kept.shape != x.shape[:1] or self.kept.dtype != torch.float32:
            got = f"{tuple(self.kept.shape)} in {self.kept.dtype}"
            raise ValueError(f"kept must be ({x.shape[0]},) in torch.float32 for this batch, got {got}")

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x + kept * scale * branch`` for (batch, ...)."""
        factor = (self.kept * self.scale).to(branch.dtype)
        return x + branch * factor.view(-1, *(1,) * (branch.dim() - 1))


def add(x: Tensor, branch: Tensor, residual: bool, kept: KeptImages | None) -> Tensor:
    """The branch alone, or ``residual``, ``x`` plus what counts of it."""
    if not residual:
        return branch
    return x + branch if kept is None else kept.added(x, branch)
