# SPDX-License-Identifier: Apache-2.0
"""Gradients averaged over the processes of a run, in buckets, while the backward pass goes on.

What torch's DistributedDataParallel does, with fewer kernels: it copies each gradient into its bucket and out again by
kernels of their own, some 1,200 for GroupMamba-T, which cost a step in a CUDA graph 6% on two H200s. Here a bucket is
filled by one concatenation, and gradients become views of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 << 20  # as in DistributedDataParallel
LAST_BUCKET_BYTES = 1 << 20  # of the first layers, whose gradients nothing is left to hide behind


class Bucket:
    """Parameters of one dtype whose gradients are averaged together, and the memory in which they then lie."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        first = parameters[0]
        self.memory = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        self.views = []
        for parameter, part in zip(parameters, self.memory.split([p.numel() for p in parameters]), strict=True):
            strides = torch.empty_like(parameter, device="meta").stride()  # dense, in the parameter's order
            self.views.append(part.as_strided(parameter.shape, strides))
        self.missing: set[int] = set()
        self.work: Any = None

    def fill(self) -> None:
        """Puts the gradients there, zeros for those that are None; each is a view of the bucket from now on."""
        parts = []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            grad = torch.zeros_like(view) if parameter.grad is None else parameter.grad
            if not _as_they_lie(grad, view):
                grad = torch.empty_like(view).copy_(grad)
            parts.append(grad.as_strided((grad.numel(),), (1,)))
        torch.cat(parts, out=self.memory)
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def wait(self) -> None:
        """For the averaging that was begun, if any."""
        if self.work is not None:
            self.work.wait()
            self.work = None


def _as_they_lie(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their numbers in the same order in memory; ``b`` is dense."""
    return all(size == 1 or mine == other for size, mine, other in zip(a.shape, a.stride(), b.stride(), strict=True))


class Replicas:
    """Averages the gradients of a model that every process has.

    Parameters and buffers become those of the first process. From then on a backward pass starts to average a bucket as
    soon as its gradients are there; :meth:`begin` comes before it and :meth:`finish` after it. A parameter that got no
    gradient counts as zero. All that a step launches can be part of a CUDA graph.

    Args:
        model: the same on every process, on its device. The nodes that sum up its gradients are made here, so for a
            graph make this on the stream that captures.
        world: number of processes of the default group.
    """

    def __init__(self, model: nn.Module, world: int):
        self.world = world
        self.paused = False
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                self._send(tensor)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.order: list[int] = []  # of gradients as they came since `begin`
        self.buckets: list[Bucket] = []
        self.places: dict[int, tuple[Bucket, int]] = {}
        self._group(reversed(range(len(self.parameters))))
        for number, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(number))

    @staticmethod
    def _send(tensor: Tensor) -> None:
        dense = tensor.contiguous()
        dist.broadcast(dense, 0)
        tensor.copy_(dense)

    def _group(self, order: Iterable[int]) -> None:
        self.buckets = []
        for numbers in _groups(list(order), self.parameters):
            bucket = Bucket([self.parameters[number] for number in numbers])
            self.buckets.append(bucket)
            self.places.update({number: (bucket, i) for i, number in enumerate(numbers)})
        self.begin()

    def regroup(self) -> None:
        """Buckets in the order in which the first process's last backward pass came to the parameters."""
        known = dict.fromkeys((*self.order, *reversed(range(len(self.parameters)))))
        order = torch.tensor(list(known), device=self.parameters[0].device)
        dist.broadcast(order, 0)
        self._group(order.tolist())

    def _hook(self, number: int) -> Any:
        def ready(_: Tensor) -> None:
            if not self.paused:
                bucket, i = self.places[number]
                bucket.missing.discard(i)
                self.order.append(number)
                self._start()

        return ready

    def _start(self, *, incomplete: bool = False) -> None:
        while self.next < len(self.buckets) and (incomplete or not self.buckets[self.next].missing):
            bucket = self.buckets[self.next]
            bucket.fill()
            average = dist.ReduceOp.AVG if bucket.memory.is_cuda else dist.ReduceOp.SUM  # gloo has no average
            bucket.work = dist.all_reduce(bucket.memory, average, async_op=True)
            self.next += 1

    def begin(self) -> None:
        """To be called before a step's first backward pass; what one that raised has begun is waited for."""
        for bucket in self.buckets:
            bucket.wait()
            bucket.missing = set(range(len(bucket.parameters)))
        self.order = []
        self.next = 0  # buckets are averaged in one order by all processes

    @contextmanager
    def local(self) -> Iterator[None]:
        """Backward passes in here only sum up gradients."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def finish(self) -> None:
        """To be called after the backward pass: the gradients are averages from here on, for the current stream."""
        self._start(incomplete=True)
        for bucket in self.buckets:
            bucket.wait()
            if not bucket.memory.is_cuda:
                bucket.memory /= self.world


def _groups(order: list[int], parameters: list[nn.Parameter]) -> Iterator[list[int]]:
    """Numbers of the parameters of each bucket, in the order given; the last ones make a small bucket."""
    sizes = [parameters[number].numel() * parameters[number].element_size() for number in order]
    last, small = len(order), 0
    while last > 0 and small + sizes[last - 1] <= LAST_BUCKET_BYTES:
        last -= 1
        small += sizes[last]
    group: list[int] = []
    size = 0
    for i, number in enumerate(order):
        parameter = parameters[number]
        full = i == last or (i < last and size + sizes[i] > BUCKET_BYTES)
        if group and (full or parameter.dtype != parameters[group[0]].dtype):
            yield group
            group, size = [], 0
        group.append(number)
        size += sizes[i]
    if group:
        yield group
