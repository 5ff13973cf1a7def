# SPDX-License-Identifier: Apache-2.0
"""Gradients averaged over the processes of a run, in buckets, while the backward pass goes on.

What torch's DistributedDataParallel does, with fewer kernels: it copies each gradient into its bucket and out again by
kernels of their own, some 1,200 for GroupMamba-T, which cost a step in a CUDA graph 6% on two H200s. Here a bucket is
filled by one concatenation, and gradients become views of it.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def _as_they_lie(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their numbers in the same order in memory; ``b`` is dense."""
    return all(size == 1 or mine == other for size, mine, other in zip(a.shape, a.stride(), b.stride(), strict=True))


class Replicas:
    """Averages the gradients of a model that every process has.

    Parameters and buffers become those of the first process. From then on a backward pass starts to average a bucket as
    soon as its gradients are there, the last layers' first; :meth:`begin` comes before it and :meth:`finish` after it.
    A parameter that got no gradient counts as zero. All that a step launches can be part of a CUDA graph.

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
        trained = [p for p in model.parameters() if p.requires_grad]
        self.buckets = [Bucket(group) for group in _groups(trained)]
        self.next = 0  # buckets are averaged in one order by all processes
        self.handles = []
        for bucket in self.buckets:
            for i, parameter in enumerate(bucket.parameters):
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._hook(bucket, i)))

    @staticmethod
    def _send(tensor: Tensor) -> None:
        dense = tensor.contiguous()
        dist.broadcast(dense, 0)
        tensor.copy_(dense)

    def _hook(self, bucket: Bucket, i: int) -> Any:
        def ready(_: Tensor) -> None:
            if not self.paused:
                bucket.missing.discard(i)
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
        """To be called before a step's first backward pass; what one that raised has left is forgotten."""
        for bucket in self.buckets:
            bucket.missing, bucket.work = set(range(len(bucket.parameters))), None
        self.next = 0

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
            bucket.work.wait()
            if not bucket.memory.is_cuda:
                bucket.memory /= self.world


def _groups(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters for each bucket, the last layers' first."""
    small: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:  # from the first layers on, whose bucket is smaller
        bytes_of = parameter.numel() * parameter.element_size()
        if size + bytes_of > LAST_BUCKET_BYTES:
            break
        small.append(parameter)
        size += bytes_of
    group: list[nn.Parameter] = []
    size = 0
    for parameter in reversed(parameters[len(small) :]):
        other = group and (parameter.dtype, parameter.device) != (group[0].dtype, group[0].device)
        if group and (other or size + parameter.numel() * parameter.element_size() > BUCKET_BYTES):
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if group:
        yield group
    for dtype in dict.fromkeys(p.dtype for p in reversed(small)):
        yield [p for p in reversed(small) if p.dtype == dtype]
