# SPDX-License-Identifier: Apache-2.0
"""What the ops and the layer are compared with, on the same tensors in the same run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import groupmamba_ext as ext
from suite import checkouts, scan_peers
from suite.op_cases import CROSS_DIRECTIONS, DIRECTIONS
from suite.problem import PASSES, Case, Problem, as_tuple
from suite.verdict import PEER_ERRORS, reason

NAMES = ("pytorch", "compile", "mamba_ssm", "timm", "released", "vmamba")
SEQUENTIAL_TOKENS = 3136  # the reference walks the tokens one by one: longer paths would take minutes


@dataclass(frozen=True)
class Peer:
    """An implementation that takes the tensors of a problem.

    Attributes:
        function: like ``Problem.function``.
        parameters: its own parameters, where it has any; None for the problem's.
        adapt: its inputs from the problem's, in the layout it wants; done before anything is timed.
        slow: time three eager calls, no more.
        error: why it cannot run, known beforehand.
        settings: the context that it is called in.
    """

    name: str
    function: Callable | None
    parameters: dict[str, Tensor] | None = None
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    passes: tuple[str, ...] = PASSES
    slow: bool = False
    error: str | None = None
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Peers:
    """The peers that were asked for.

    Args:
        names: of :data:`NAMES`.
        released: a checkout of the released GroupMamba.
        vmamba: a checkout of VMamba.
    """

    def __init__(self, names: Sequence[str], *, released: Path | None = None, vmamba: Path | None = None):
        self.names = names
        self.paths = {"released": released, "vmamba": vmamba}

    def wants(self, case: Case) -> bool:
        """Whether a case is compared at all: ops and the layer, at the stage shapes."""
        return case.series in ("stages", "padded") and case.storage != "token-major" and case.op != "ablation"

    def __call__(self, case: Case, problem: Problem) -> list[Peer]:
        """Those that have this case's op, at sizes that end in reasonable time."""
        found = []
        for name in self.names:
            if not hasattr(self, f"_{name}"):  # a peer of whole models
                continue
            try:
                peer = getattr(self, f"_{name}")(case, problem)
            except PEER_ERRORS as error:  # a checkout's import may raise anything
                peer = Peer(name, None, error=reason(error))
            if peer is not None:
                found.append(peer)
        return found

    def _pytorch(self, case: Case, problem: Problem) -> Peer | None:
        """The same call through `ext.backend("reference")`; for scans that is a loop over the tokens."""
        slow = case.op in ("scan", "cross", "layer")
        if slow and case.shape.height * case.shape.width > SEQUENTIAL_TOKENS:
            return None
        return Peer("pytorch", problem.function, slow=slow, settings=lambda: ext.backend("reference"))

    def _compile(self, case: Case, problem: Problem) -> Peer:
        """`torch.compile` of the plain PyTorch in which a scan takes 2 sqrt(L) steps, not L."""
        torch._dynamo.reset()
        dtype = case.dtype

        def plain(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
            if problem.parameters:
                return as_tuple(problem.truth(**tensors))
            outputs = as_tuple(problem.truth(**{name: t.float() for name, t in tensors.items()}))
            return (outputs[0].to(dtype), *outputs[1:])

        compiled = torch.compile(plain, dynamic=False)
        # A backward that is timed alone runs several times over one forward.
        settings = partial(torch._functorch.config.patch, donated_buffer=False)
        return Peer("compile", lambda **inputs: compiled(inputs | problem.parameters), settings=settings)

    def _mamba_ssm(self, case: Case, problem: Problem) -> Peer | None:
        return self._around(case, "mamba_ssm", scan_peers.mamba_ssm_scan) if case.op == "scan" else None

    def _released(self, case: Case, problem: Problem) -> Peer | None:
        path = self.paths["released"]
        if case.op == "scan":
            return self._around(case, "released", partial(scan_peers.released_scan, path))
        if case.op != "layer":
            return None
        device = problem.inputs["x"].device
        layer = checkouts.released_layer(path, case.shape.channels, problem.parameters, device)
        return Peer("released", layer, dict(layer.named_parameters()))

    def _vmamba(self, case: Case, problem: Problem) -> Peer | None:
        if case.op != "cross":
            return None
        function = scan_peers.vmamba_cross_scan(self.paths["vmamba"])
        adapt = partial(scan_peers.cross_inputs, directions=CROSS_DIRECTIONS)
        return Peer("vmamba", function, adapt=adapt)

    def _around(self, case: Case, name: str, scan: Callable[[], scan_peers.Scan]) -> Peer:
        adapt = partial(scan_peers.grouped_inputs, directions=DIRECTIONS)
        return Peer(name, scan_peers.grouped_scan(scan(), DIRECTIONS), adapt=adapt)


def default_names(released: Path | None, vmamba: Path | None) -> list[str]:
    """What is compared with when nothing is asked for: all that is there but `torch.compile`, which takes minutes."""
    installed = {name: importlib.util.find_spec(name) for name in ("mamba_ssm", "timm")}
    here = installed | {"released": released, "vmamba": vmamba}
    return ["pytorch", *(name for name, found in here.items() if found is not None)]


def require(names: Sequence[str], released: Path | None, vmamba: Path | None) -> None:
    """Checks that what is asked for is there.

    Raises:
        ValueError: it names the option that is missing or wrong.
    """
    for name, path in (("released", released), ("vmamba", vmamba)):
        if name in names and path is None:
            raise ValueError(f"argument --peers: {name!r} needs --{name} PATH")
        if path is not None:
            try:
                checkouts.checkout(name, path)
            except ValueError as error:
                raise ValueError(f"argument --{name}: {error}") from None
    for name in ("mamba_ssm", "timm"):
        if name in names and importlib.util.find_spec(name) is None:
            raise ValueError(f"argument --peers: {name!r} is not installed")
