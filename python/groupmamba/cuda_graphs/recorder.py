# SPDX-License-Identifier: Apache-2.0
"""Recording on a GPU: streams, pools of memory, the generator."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Records graphs that share one pool of memory, and lets them run one at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.last = torch.cuda.Event()
        self.lock = threading.RLock()
        self.calls = 0
        self.failed = False

    @contextmanager
    def aside(self, buffers: Sequence[Tensor]) -> Iterator[None]:
        """What runs in here leaves no trace in ``buffers`` and random numbers, and runs on the recording's stream."""
        generator = torch.cuda.get_rng_state(self.device)
        with torch.no_grad():
            before = [buffer.clone() for buffer in buffers]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            torch.cuda.set_rng_state(generator, self.device)
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.data.copy_(value)  # unseen by backward passes that are still to come

    def record(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """What replays ``function``, and the tensors that it returned, which a replay fills again."""
        graph = torch.cuda.CUDAGraph()
        # Another thread, which pins batches say, may go on allocating meanwhile.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        self.failed = True
        with capturing(self.device, self.pool), capture:
            results = function()
        self.failed = False
        return graph.replay, results

    @staticmethod
    def borrowed(tensor: Tensor) -> Tensor:
        """A tensor at the same place of the pool that does not keep it from being used again."""
        if tensor.numel() == 0:
            return tensor.detach()
        return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits, on the current stream, for what ran in here before, on whichever stream that was."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.last)
            try:
                yield
            finally:
                self.last.record(stream)

    def finish(self) -> None:
        """Waits for what is still to run."""
        self.last.synchronize()


class Garbage:
    """Keeps Python from collecting garbage, as long as one of several threads asks for it.

    A graph may be among it, and to free one while another is captured ends the capture.
    """

    def __init__(self) -> None:
        self._lock, self._keepers, self._collects = threading.Lock(), 0, False

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if self._keepers == 0:
                self._collects = gc.isenabled()
                gc.disable()
            self._keepers += 1
        try:
            yield
        finally:
            with self._lock:
                self._keepers -= 1
                if self._keepers == 0 and self._collects:
                    gc.enable()


garbage = Garbage()


@contextmanager
def capturing(device: torch.device, pool: Any = None) -> Iterator[None]:
    """No garbage is collected in here, and a capture that fails leaves nothing behind.

    Torch by itself (2.14) leaves the capture's stream as the current one, and pool and generator as if the capture went
    on; the latter then raises wherever a number is drawn. It gets a copy of its state from before, which graphs that
    were captured earlier do not know: what they draw goes on, but no longer follows ``torch.manual_seed``.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    state = generator.clone_state()
    try:
        with garbage.kept(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    except BaseException:
        if pool is not None:
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(generator.device.index, pool)
        generator.graphsafe_set_state(state)
        raise


class _Memory:
    """The numbers of a tensor as whole numbers of their width, by the protocol that every GPU library knows."""

    def __init__(self, tensor: Tensor):
        width = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * width for stride in tensor.stride()),
            "typestr": f"<i{width}",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }
