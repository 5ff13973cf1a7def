# SPDX-License-Identifier: Apache-2.0
"""What a call moves, launches and allocates, and how fast a plain copy of as many bytes is."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from suite.timing import Timer

# What the profiler puts on a GPU's track besides kernels, copies and fills.
PROFILER_OWN = ("Activity Buffer", "Context Sync", "Stream Sync", "Stream Wait", "Event Sync", "Lazy Function")
CALIBRATION_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the elements of ``tensors``, each tensor once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def peak_memory(call: Callable[[int], object], device: torch.device) -> int | None:
    """Bytes that one call holds at its peak beyond what was allocated before, its outputs included; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    return peak


def allocated(device: torch.device) -> int | None:
    """Bytes that live tensors hold; None on the CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Gives back what nothing holds any more: frames of an exception hold tensors in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernels(call: Callable[[int], object], device: torch.device) -> dict[str, int] | None:
    """What one eager call launches (kernels, copies, fills), by name, as the profiler sees it; None on the CPU."""
    if device.type != "cuda":
        return None
    # The profiler would stay attached and slow every later launch of the process: 171 in place of 136 us for an eager
    # layer. Before CUDA 12.6 leaving it does not go together with graphs.
    if tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 6):
        os.environ.setdefault("TEARDOWN_CUPTI", "1")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = (event for event in profile.events() if event.device_type == cuda)
    names = Counter(event.name for event in events if not event.name.startswith(PROFILER_OWN))
    return dict(names) or None


GEMM_SIDE = {"cuda": 8192, "cpu": 1024}


def gemm_tflops(timer: Timer, dtypes: Iterable[torch.dtype]) -> dict[str, float]:
    """TFLOP/s of a large square matrix product in each dtype: the other roof of the roofline."""
    side = GEMM_SIDE[timer.device.type]
    found = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 / _matmul_us(timer, a, b) * 1e-6
    return found


def _matmul_us(timer: Timer, a: Tensor, b: Tensor) -> float:
    out = torch.empty_like(a)
    return timer(lambda i: torch.matmul(a, b, out=out), 1).us


class Copy:
    """The ceiling: `torch.neg(x, out=y)` on float32, an elementwise kernel with 16-byte accesses.

    `Tensor.copy_` of a contiguous tensor on CUDA is the driver's memcpy, which is slower than a kernel on some GPUs, so
    it does not serve as the ceiling; `describe` states both.
    """

    def __init__(self, timer: Timer):
        self.timer = timer
        self._known: dict[int, float] = {}

    def _buffers(self, total: int) -> list[tuple[Tensor, Tensor]]:
        numel = max(4, total // 8)
        sets = self.timer.sets(total)
        return [tuple(torch.ones(numel, device=self.timer.device) for _ in range(2)) for _ in range(sets)]

    def us(self, total: int) -> float:
        """Microseconds of a copy that reads and writes ``total`` bytes together, cold, like the cases."""
        if total not in self._known:
            pairs = self._buffers(total)
            self._known[total] = self.timer(lambda i: torch.neg(pairs[i][0], out=pairs[i][1]), len(pairs)).us
        return self._known[total]

    def describe(self) -> dict:
        """The copy bandwidth of this run at one large size, its kernel's name, and the driver's memcpy beside it."""
        total = CALIBRATION_BYTES[self.timer.device.type]
        pairs = self._buffers(total)
        names = kernels(lambda i: torch.neg(pairs[i][0], out=pairs[i][1]), self.timer.device)
        memcpy = self.timer(lambda i: pairs[i][1].copy_(pairs[i][0]), len(pairs)).us
        return {
            "bytes": total,
            "call": "torch.neg(x, out=y), float32",
            "kernel": None if names is None else sorted(names),
            "gb_s": total / self.us(total) * 1e-3,
            "tensor_copy_gb_s": total / memcpy * 1e-3,
        }
