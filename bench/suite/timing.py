# SPDX-License-Identifier: Apache-2.0
"""Median time of one call, with inputs that the cache does not hold.

A call runs on one of several sets of inputs, in turn, and its outputs stay alive until the turn of its set comes again:
between two uses of an address, more bytes than the last-level cache holds have passed.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COLD_FACTOR = 3  # cache sizes that pass between two uses of an address
MAX_SETS = {"cuda": 128, "cpu": 8}
MAX_GRAPH_CALLS = 512


@dataclass(frozen=True)
class Times:
    """Microseconds a call: ``graph_us`` replayed from a CUDA graph, ``eager_us`` called from Python."""

    eager_us: float
    graph_us: float | None = None
    graph_error: str | None = None

    @property
    def us(self) -> float:
        """The headline: the graph's time where there is one."""
        return self.eager_us if self.graph_us is None else self.graph_us


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache that rotating inputs must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else 32 << 20


class Timer:
    """Times calls on one device.

    Args:
        device: where the calls run. On CUDA everything must already be on the stream that is timed.
        quick: fewer repetitions.
    """

    def __init__(self, device: torch.device, *, quick: bool = False):
        self.device = device
        self.cuda = device.type == "cuda"
        self.cache = cache_bytes(device)
        self.budget_us = 30e3 if quick else 120e3  # of measured time, for each figure
        self.min_repeats = 3 if quick else 10
        self.sample_us = 2e3 if self.cuda else 1e3  # the least length of a sample: its two stamps then cost nothing

    def sets(self, nbytes: int) -> int:
        """How many sets of ``nbytes`` (inputs and outputs of a call) keep the cache cold."""
        return min(max(2, 1 + math.ceil(COLD_FACTOR * self.cache / max(nbytes, 1))), MAX_SETS[self.device.type])

    def __call__(self, call: Callable[[int], object], sets: int) -> Times:
        """Times ``call(i)``, i running over ``range(sets)`` in turn.

        Args:
            call: runs on set ``i`` and returns its outputs.
            sets: how many sets there are.
        """
        times = self.eager(call, sets)
        if not self.cuda:
            return times
        try:
            return Times(times.eager_us, self._graph(call, sets, times.eager_us))
        except RuntimeError as error:
            torch.cuda.synchronize()
            return Times(times.eager_us, graph_error=str(error).splitlines()[0])

    def eager(self, call: Callable[[int], object], sets: int = 1) -> Times:
        """Without a graph."""
        estimate = self._warm_up(call, sets)
        calls = sets * max(1, math.ceil(self.sample_us / (sets * estimate)))
        repeats = self._repeats(calls * estimate)
        return Times(statistics.median(self._sample(call, sets, calls) for _ in range(repeats)))

    def once(self, call: Callable[[int], object]) -> Times:
        """For what takes seconds: one call to warm up and the median of three, eager."""
        call(0)
        return Times(statistics.median(self._sample(call, 1, 1) for _ in range(3)))

    def _repeats(self, sample_us: float) -> int:
        return max(self.min_repeats, min(100, int(self.budget_us / sample_us)))

    def _warm_up(self, call: Callable[[int], object], sets: int) -> float:
        """Microseconds a call, roughly, after what a first call does once."""
        for _ in range(2):
            _rotate(call, sets, sets)
        return max(self._sample(call, sets, sets), 0.1)

    def _sample(self, call: Callable[[int], object], sets: int, calls: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            _rotate(call, sets, calls)
            return (time.perf_counter() - start) * 1e6 / calls
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _rotate(call, sets, calls)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    def _graph(self, call: Callable[[int], object], sets: int, eager_us: float) -> float:
        # A first graph says how many calls fill a sample: the eager time may be the host's, far above the graph's.
        calls = sets * max(1, math.ceil(self.sample_us / (sets * eager_us)))
        us = self._replay(call, sets, calls, 3)
        if us * calls < 0.7 * self.sample_us:
            calls = sets * max(1, math.ceil(self.sample_us / (sets * us)))
        calls = max(sets, min(calls, MAX_GRAPH_CALLS // sets * sets))
        return self._replay(call, sets, calls, self._repeats(calls * us))

    def _replay(self, call: Callable[[int], object], sets: int, calls: int, repeats: int) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = _rotate(call, sets, calls)
        for _ in range(2):
            graph.replay()
        stamps = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        stamps[0].record()
        for stamp in stamps[1:]:
            graph.replay()
            stamp.record()
        torch.cuda.synchronize()
        del kept
        return statistics.median(a.elapsed_time(b) for a, b in zip(stamps, stamps[1:], strict=False)) * 1e3 / calls


def _rotate(call: Callable[[int], object], sets: int, calls: int) -> list:
    """The sets in turn; a set's outputs are freed just before it is used again, so they keep their place."""
    kept = [None] * sets
    for k in range(calls):
        kept[k % sets] = None
        kept[k % sets] = call(k % sets)
    return kept
