# SPDX-License-Identifier: Apache-2.0
"""What the ops and the layer are compared with, on the same tensors in the same run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import groupmamba_ext as ext
from suite.problem import PASSES, Case, Problem

NAMES = ("pytorch",)
SEQUENTIAL_TOKENS = 3136  # the reference walks the tokens one by one: longer paths would take minutes


@dataclass(frozen=True)
class Peer:
    """An implementation that takes the tensors of a problem.

    Attributes:
        function: like ``Problem.function``.
        parameters: its own parameters, where it has any; None for the problem's.
        slow: time three eager calls, no more.
        graph: may be captured in a CUDA graph.
        error: why it cannot run, known beforehand.
        settings: the context that it is called in.
    """

    name: str
    function: Callable
    parameters: dict[str, Tensor] | None = None
    passes: tuple[str, ...] = PASSES
    slow: bool = False
    graph: bool = True
    error: str | None = None
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Peers:
    """The peers that were asked for.

    Args:
        names: of :data:`NAMES`.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def __call__(self, case: Case, problem: Problem) -> list[Peer]:
        """Those that have this case's op, at a size that ends in reasonable time."""
        found = []
        if "pytorch" in self.names and case.op != "ablation":
            found += self._pytorch(case, problem)
        return found

    def _pytorch(self, case: Case, problem: Problem) -> list[Peer]:
        sequential = case.op in ("scan", "cross", "layer")
        tokens = case.shape.height * case.shape.width
        if sequential and (tokens > SEQUENTIAL_TOKENS or case.series != "stages" or case.storage == "token-major"):
            return []

        def settings():
            return ext.backend("reference")

        return [Peer("pytorch", problem.function, slow=sequential, settings=settings)]
