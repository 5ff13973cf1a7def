# SPDX-License-Identifier: Apache-2.0
"""From cases to rows: check, then time, then compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from suite import measure
from suite.checks import Truth
from suite.peers import Peer, Peers
from suite.problem import Calls, Case
from suite.timing import Timer, Times
from suite.verdict import PEER_ERRORS, DeviceLost, reason, require_device


class Progress(Protocol):
    """What the runner tells about where it is."""

    def __call__(self, text: str) -> None: ...


class Runner:
    """Runs cases on one device.

    Args:
        timer: of that device.
        passes: which of a case's passes to time.
        peers: ``peers(case, problem)`` gives the peers of a case, ``peers.wants(case)`` says whether it has any.
        progress: called with what is done next.
    """

    def __init__(self, timer: Timer, passes: Sequence[str], peers: Peers, progress: Progress):
        self.timer, self.device = timer, timer.device
        self.copy = measure.Copy(timer)
        self.passes, self.peers, self.progress = passes, peers, progress

    def rows(self, case: Case) -> Iterator[dict]:
        """One row a pass; where the check fails or anything is raised, with the reason in place of figures.

        A row is given as soon as this project's own figures are there, and its peers' are filled in afterwards.

        Raises:
            DeviceLost: a peer left the device unusable.
        """
        waiting = [p for p in case.passes if p in self.passes]
        try:
            for row in self._measured(case, list(waiting)):
                waiting.remove(row["pass"])
                yield row
        except Exception as error:
            if isinstance(error, DeviceLost) or not waiting:
                raise
            yield from (blank_row(case, kind, error=reason(error, place=True)) for kind in waiting)
        finally:
            measure.release(self.device)

    def _measured(self, case: Case, passes: Sequence[str]) -> Iterator[dict]:
        self.progress(f"{case.title}: check")
        problem = case.prepare(self.device)
        truth = Truth(problem)
        check = truth.check()
        if not check.passed:
            yield from (blank_row(case, kind, error=str(check), check=check.json()) for kind in passes)
            return
        peers = None if self.peers.wants(case) else []
        if peers is not None:
            del truth
        calls = Calls(problem, self.timer.sets(measure.nbytes(problem.inputs.values()) * 2))
        for kind in passes:
            self.progress(f"{case.title}: {kind}")
            row, times = self._row(case, kind, calls, check.json())
            yield row
            if peers is None:  # after this project's first figures, which no peer can then have touched
                peers = [(peer, self._peer_error(case, peer, truth)) for peer in self.peers(case, problem)]
                del truth
            for peer, error in peers:
                if kind in peer.passes:
                    self.progress(f"{case.title}: {kind}, {peer.name}")
                    row["peers"][peer.name] = self._peer(peer, kind, calls, times, error)

    def _peer_error(self, case: Case, peer: Peer, truth: Truth) -> str | None:
        """Why there can be no ratio."""
        if peer.error is not None:
            return peer.error
        self.progress(f"{case.title}: check {peer.name}")
        try:
            with peer.settings():
                check = truth.check_output(peer.function, peer.adapt)
        except PEER_ERRORS as error:
            require_device(self.device, peer.name)
            return reason(error)
        return None if check.passed else f"imprecise: {check}"

    def _row(self, case: Case, kind: str, calls: Calls, check: dict) -> tuple[dict, Times]:
        call = calls.call(kind)
        times = self.timer(call, len(calls.sets))
        total = calls.bytes(kind)
        copy_us = self.copy.us(total)
        launched = measure.kernels(call, self.device)
        return blank_row(case, kind, check=check) | {
            "us": times.us,
            "graph_us": times.graph_us,
            "eager_us": times.eager_us,
            "graph_error": times.graph_error,
            "sets": len(calls.sets),
            "bytes": total,
            "flops": calls.flops(kind),
            "gb_s": total / times.us * 1e-3,
            "copy_us": copy_us,
            "percent_of_copy": 100 * copy_us / times.us,
            "ns_per_token": times.us * 1e3 / case.shape.tokens,
            "images_per_s": case.shape.batch * 1e6 / times.us,
            "peak_memory_bytes": measure.peak_memory(call, self.device),
            "launches": None if launched is None else sum(launched.values()),
            "kernels": launched,
        }, times

    def _peer(self, peer: Peer, kind: str, calls: Calls, ours: Times, error: str | None) -> dict:
        out = {"ratio": None, "mode": None, "graph_us": None, "eager_us": None, "graph_error": None, "error": error}
        if error is not None:
            return out
        try:
            with peer.settings():
                call = calls.call(kind, peer.function, peer.parameters, peer.adapt)
                theirs = self.timer.once(call) if peer.slow else self.timer(call, len(calls.sets))
                memory = measure.peak_memory(call, self.device)
        except PEER_ERRORS as problem:
            require_device(self.device, peer.name)
            return out | {"error": reason(problem)}
        both = theirs.graph_us is not None and ours.graph_us is not None
        ratio = theirs.graph_us / ours.graph_us if both else theirs.eager_us / ours.eager_us
        return out | {
            "ratio": ratio,
            "mode": "graph" if both else "eager",
            "graph_us": theirs.graph_us,
            "eager_us": theirs.eager_us,
            "graph_error": theirs.graph_error,
            "peak_memory_bytes": memory,
        }


def blank_row(case: Case, kind: str, *, error: str | None = None, check: dict | None = None) -> dict:
    """A row without figures."""
    figures = (
        "us", "graph_us", "eager_us", "graph_error", "sets", "bytes", "flops", "gb_s", "copy_us", "percent_of_copy",
        "ns_per_token", "images_per_s", "peak_memory_bytes", "launches", "kernels", "over",
    )  # fmt: skip
    shape = case.shape
    return {
        "op": case.op,
        "label": case.label,
        "series": case.series,
        "shape": shape.image,
        "batch": shape.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "storage": case.storage,
        "height": shape.height,
        "width": shape.width,
        "channels": shape.channels,
        "pass": kind,
        **dict.fromkeys(figures),
        "check": check,
        "error": error,
        "peers": {},
    }


@contextlib.contextmanager
def on_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on CUDA: graphs are captured on the stream that autograd has seen the forward on."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()
