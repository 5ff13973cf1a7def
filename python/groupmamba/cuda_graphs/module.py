# SPDX-License-Identifier: Apache-2.0
"""Graphs in the place of a module's ``forward``: when a call has one, when one is recorded."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from groupmamba.cuda_graphs.anatomy import Anatomy
from groupmamba.cuda_graphs.arguments import recording, settings, signature, something_looks_on, tensors_of
from groupmamba.cuda_graphs.graph import Graph
from groupmamba.cuda_graphs.recorder import Recorder
from groupmamba_ext._command import is_out_of_memory, one_line

_SEEN = 16  # times `max_graphs`: shapes whose calls are counted


def use_cuda_graphs(module: nn.Module, *, max_graphs: int = 64, eager_calls: int = 2) -> CudaGraphs:
    """Lets the passes of ``module`` run as CUDA graphs wherever they can, for each shape of its inputs.

    Calls, gradients, hooks on ``module`` itself and on parameters, optimizers, ``state_dict``, and wrappers such as
    DistributedDataParallel work as before. A graph replays the kernels of an eager call, and stochastic depth draws
    what it would have drawn there. The first ``eager_calls`` calls of a shape run as ever, the next one records its
    graph, and from then on it is replayed. Shapes share one pool of memory, which grows with the largest of them, not
    with their number.

    A call runs as ever where a graph would not be the same: on the CPU, inside another graph, ``torch.compile``,
    ``torch.func``, a dispatch mode or hooks for saved tensors (``torch.utils.checkpoint``), with a hook on a module
    inside ``module``, with arguments other than constants and plain real tensors on one GPU, and for shapes beyond
    ``max_graphs``. So does a module, after one warning, whose ``forward`` reads numbers back from the GPU, writes into
    an argument, keeps a tensor in an attribute, or uses something with a gradient that is neither an argument nor a
    parameter of its own. Training and evaluation, frozen parameters and autocast's dtypes have graphs of their own. If
    a part, a parameter, or an attribute that is a tensor or a container is replaced, all graphs are recorded again.

    Args:
        module: a model or a part of one. What its ``forward`` decides in Python by its arguments and by attributes of
            its modules that are numbers, texts or None is part of what graphs are told apart by. What it decides by
            anything else, such as what a list holds or Python's random numbers, stays as it was when the graph was
            recorded, until :meth:`CudaGraphs.clear`.
        max_graphs: how many shapes have graphs.
        eager_calls: of a shape before its graph is recorded, which takes as long as tens of calls.

    Returns:
        The graphs; :meth:`CudaGraphs.remove` takes them away again.

    Raises:
        TypeError: ``module`` is not a module, or a number is not an integer.
        ValueError: ``max_graphs`` or ``eager_calls`` is below 1.
        RuntimeError: in a backward pass whose forward pass was not the module's last one, in a second one through the
            same forward pass, or for a second derivative: none is possible with graphs that share memory.

    Example::

        model = groupmamba_tiny().cuda()
        use_cuda_graphs(model)
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            loss.backward()
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, value in (("max_graphs", max_graphs), ("eager_calls", eager_calls)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    earlier = module.__dict__.get("forward")
    if isinstance(earlier, CudaGraphs):
        earlier.remove()
    graphs = CudaGraphs(module, max_graphs, eager_calls)
    module.forward = graphs  # type: ignore[method-assign]
    return graphs


class CudaGraphs:
    """The ``forward`` of a module with graphs, see :func:`use_cuda_graphs`.

    Attributes:
        reasons: why the passes of a shape could not be recorded, by what it is recognised by.
    """

    def __init__(self, module: nn.Module, max_graphs: int, eager_calls: int):
        self.module, self.max_graphs, self.eager_calls = module, max_graphs, eager_calls
        self.earlier = module.__dict__.get("forward")
        self.eager: Callable = module.forward
        self.lock = threading.RLock()
        functools.update_wrapper(self, self.eager, updated=())
        self.__code__ = getattr(self.eager, "__code__", None)  # torch.export asks a forward for it
        self.clear()

    def clear(self) -> None:
        """Forgets the graphs and gives their memory back. They are recorded anew as calls come."""
        with self.lock:
            for graph in getattr(self, "graphs", {}).values():
                graph.recorder.finish()
            self.anatomy: Anatomy | None = None
            self.seen: Counter[Hashable] = Counter()
            self.graphs: dict[Hashable, Graph] = {}
            self.reasons: dict[Hashable, str] = {}
            self.recorders: dict[tuple[bool, torch.device], Recorder] = {}
            self.limit, self.full = self.max_graphs, False

    def remove(self) -> None:
        """Makes the module what it was before :func:`use_cuda_graphs`."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.earlier is not None:
                self.module.forward = self.earlier  # type: ignore[method-assign]
        self.clear()

    def __len__(self) -> int:
        """How many shapes have a graph."""
        return len(self.graphs)

    def __repr__(self) -> str:
        return f"CudaGraphs({type(self.module).__name__}, {len(self)} of at most {self.max_graphs})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has no graphs."""
        if self.earlier is not None:
            return deepcopy(self.earlier, memo)
        return type(self.module).forward.__get__(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return (getattr, (self.module, "forward")) if self.earlier is None else (_itself, (self.earlier,))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        tensors = tensors_of(args, kwargs)
        if tensors and not something_looks_on():
            with self.lock:
                graph = self._graph(tensors, args, kwargs)
                if graph is not None:
                    return graph(tensors)
        return self.eager(*args, **kwargs)

    def _graph(self, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Graph | None:
        """The graph for these arguments; None where there is none, or not yet."""
        if self.anatomy is None or self.anatomy.changed():
            self.clear()
            self.anatomy = Anatomy(self.module)
        anatomy, device = self.anatomy, tensors[0].device
        if not anatomy.takes(device) or any(tensor.device != device for tensor in tensors) or anatomy.hooked():
            return None
        key = (device, signature(args), tuple(kwargs), signature(kwargs.values()), anatomy.modes(), settings())
        graph = self.graphs.get(key)
        if graph is None and not self.full and key not in self.reasons:
            if len(self.seen) > _SEEN * self.max_graphs:
                self.seen.clear()
            self.seen[key] += 1
            if self.seen[key] > self.eager_calls:
                graph = self._record(key, tensors, args, kwargs)
        return graph

    def _record(self, key: Hashable, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Graph | None:
        assert self.anatomy is not None
        which = torch.is_grad_enabled(), tensors[0].device
        if which not in self.recorders:
            self.recorders[which] = Recorder(tensors[0].device)
        try:
            with recording():
                self.graphs[key] = Graph(self.eager, self.anatomy, self.recorders[which], args, kwargs)
        except Exception as error:  # the call that follows shows what is the module's own
            if is_out_of_memory(error):
                self.limit = len(self.graphs)
            if self.recorders[which].failed:  # what was recorded draws from another state of the generator now
                for graph in self.graphs.values():
                    graph.recorder.finish()
                self.graphs.clear()
                self.recorders.clear()
            self.reasons[key] = one_line(error)[:200] or type(error).__name__
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            reason = "there is not enough memory for its own" if is_out_of_memory(error) else self.reasons[key]
            warnings.warn(
                f"{type(self.module).__name__} runs without a CUDA graph for {shapes}: {reason}", stacklevel=5
            )
        self.full = max(len(self.graphs), len(self.reasons)) >= self.limit
        return self.graphs.get(key)


def _itself(value: Any) -> Any:
    return value
