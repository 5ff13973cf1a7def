# SPDX-License-Identifier: Apache-2.0
"""From cases to rows: check, then time, then compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from suite import measure
from suite.checks import Truth
from suite.problem import Calls, Case
from suite.timing import Timer, Times


class Progress(Protocol):
    """What the runner tells about where it is."""

    def __call__(self, text: str) -> None: ...


class Runner:
    """Runs cases on one device.

    Args:
        timer: of that device.
        passes: which of a case's passes to time.
        peers: ``peers(case, problem)`` gives the peers of a case.
        progress: called with what is done next.
    """

    def __init__(self, timer: Timer, passes: Sequence[str], peers: Callable, progress: Progress):
        self.timer, self.device = timer, timer.device
        self.copy = measure.Copy(timer)
        self.passes, self.peers, self.progress = passes, peers, progress
        self.red = False

    def rows(self, case: Case) -> Iterator[dict]:
        """One row a pass, the figures None and ``error`` set where the check is red or memory runs out."""
        passes = [p for p in case.passes if p in self.passes]
        try:
            yield from self._measured(case, passes)
        except torch.OutOfMemoryError as error:
            self.red = True
            text = f"out of memory: {str(error).splitlines()[0]}"
            yield from (blank_row(case, kind, error=text) for kind in passes)
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measured(self, case: Case, passes: Sequence[str]) -> Iterator[dict]:
        self.progress(f"{case.title}: check")
        problem = case.prepare(self.device)
        truth = Truth(problem)
        check = truth.check()
        if not check.passed:
            self.red = True
            yield from (blank_row(case, kind, error=str(check), check=check.json()) for kind in passes)
            return
        peers = []
        for peer in self.peers(case, problem):
            self.progress(f"{case.title}: check {peer.name}")
            peers.append((peer, self._peer_error(peer, truth)))
        del truth
        calls = Calls(problem, self.timer.sets(measure.nbytes(problem.inputs.values()) * 2))
        for kind in passes:
            self.progress(f"{case.title}: {kind}")
            yield self._row(case, kind, calls, check.json(), peers)

    def _peer_error(self, peer, truth: Truth) -> tuple[str | None, bool]:
        """Why there can be no ratio, and whether that is a wrong result."""
        if peer.error is not None:
            return peer.error, False
        with peer.settings():
            try:
                check = truth.check_output(peer.function, peer.adapt)
            except torch.OutOfMemoryError:
                return "out of memory", False
            except Exception as error:  # a peer is not this project's code: whatever it raises is its answer
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", False
        if check.passed:
            return None, False
        self.red = True
        return str(check), True

    def _row(self, case: Case, kind: str, calls: Calls, check: dict, peers: list) -> dict:
        call = calls.call(kind)
        times = self.timer(call, len(calls.sets))
        total = calls.bytes(kind)
        copy_us = self.copy.us(total)
        launched = measure.kernels(call, self.device)
        row = blank_row(case, kind, check=check)
        row |= {
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
        }
        del call
        for peer, (error, red) in peers:
            if kind in peer.passes:
                self.progress(f"{case.title}: {kind}, {peer.name}")
                row["peers"][peer.name] = self._peer(peer, kind, calls, times, error, red)
        return row

    def _peer(self, peer, kind: str, calls: Calls, ours: Times, error: str | None, red: bool) -> dict:
        out = {"ratio": None, "mode": None, "graph_us": None, "eager_us": None, "red": red, "error": error}
        if error is not None:
            return out
        with peer.settings():
            try:
                call = calls.call(kind, peer.function, peer.parameters, peer.adapt)
                theirs = self.timer.once(call) if peer.slow else self.timer(call, len(calls.sets))
                memory = measure.peak_memory(call, self.device)
            except torch.OutOfMemoryError:
                return out | {"error": "out of memory"}
            except Exception as problem:  # as above
                return out | {"error": f"{type(problem).__name__}: {problem}".splitlines()[0]}
        both = theirs.graph_us is not None and ours.graph_us is not None
        ratio = theirs.graph_us / ours.graph_us if both else theirs.eager_us / ours.eager_us
        return out | {
            "ratio": ratio,
            "mode": "graph" if both else "eager",
            "graph_us": theirs.graph_us,
            "eager_us": theirs.eager_us,
            "peak_memory_bytes": memory,
        }


def blank_row(case: Case, kind: str, *, error: str | None = None, check: dict | None = None) -> dict:
    """A row without figures."""
    figures = (
        "us", "graph_us", "eager_us", "graph_error", "sets", "bytes", "flops", "gb_s", "copy_us", "percent_of_copy",
        "ns_per_token", "images_per_s", "peak_memory_bytes", "launches", "kernels",
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
