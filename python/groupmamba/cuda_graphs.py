# SPDX-License-Identifier: Apache-2.0
"""A module's forward and backward passes as CUDA graphs, for each shape of its inputs.

As called from Python a network of this kind launches some 1,000 short kernels a step, and most hosts take longer to
queue them than the GPU to run them. A graph is one launch. ``torch.cuda.make_graphed_callables`` makes one for a single
shape, and leaves results where the next call overwrites them; here are any shapes, and results are the caller's own.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree
from torch.utils import deterministic
from torch.utils._python_dispatch import _get_current_dispatch_mode

from groupmamba_ext import _explain
from groupmamba_ext._command import is_out_of_memory, one_line
from groupmamba_ext.backend import current_backend
from groupmamba_ext.transforms import watched

ALIGNMENT = 16  # bytes

_CONSTANTS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, dict, set)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_SEEN = 16  # times `max_graphs`: shapes whose calls are counted
_WRITES = "forward writes into an argument"
_thread = threading.local()  # `recording`: what runs inside a recording must not record


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
            self.anatomy: _Anatomy | None = None
            self.seen: Counter[Hashable] = Counter()
            self.graphs: dict[Hashable, _Graph] = {}
            self.reasons: dict[Hashable, str] = {}
            self.recorders: dict[tuple[bool, torch.device], _Recorder] = {}
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
        tensors = _tensors(args, kwargs)
        if tensors and not _something_looks_on():
            with self.lock:
                graph = self._graph(tensors, args, kwargs)
                if graph is not None:
                    return graph(tensors)
        return self.eager(*args, **kwargs)

    def _graph(self, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> _Graph | None:
        """The graph for these arguments; None where there is none, or not yet."""
        if self.anatomy is None or self.anatomy.changed():
            self.clear()
            self.anatomy = _Anatomy(self.module)
        anatomy, device = self.anatomy, tensors[0].device
        if not anatomy.takes(device) or any(tensor.device != device for tensor in tensors) or anatomy.hooked():
            return None
        key = (device, _signature(args), tuple(kwargs), _signature(kwargs.values()), anatomy.modes(), _settings())
        graph = self.graphs.get(key)
        if graph is None and not self.full and key not in self.reasons:
            if len(self.seen) > _SEEN * self.max_graphs:
                self.seen.clear()
            self.seen[key] += 1
            if self.seen[key] > self.eager_calls:
                graph = self._record(key, tensors, args, kwargs)
        return graph

    def _record(self, key: Hashable, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> _Graph | None:
        assert self.anatomy is not None
        which = torch.is_grad_enabled(), tensors[0].device
        if which not in self.recorders:
            self.recorders[which] = _Recorder(tensors[0].device)
        try:
            with _recording():
                self.graphs[key] = _Graph(self.eager, self.anatomy, self.recorders[which], args, kwargs)
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


class _Anatomy:
    """The parts of a module. A graph takes for granted where they are; ``changed`` is asked in every call."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.modules = list(module.modules())
        self.children = [part._modules for part in self.modules]
        self.tensors = [held for part in self.modules for held in (part._parameters, part._buffers)]
        self.hooks = [hooks for part in self.modules[1:] for hooks in _hooks_of(part)]
        attributes = [
            (part.__dict__, name, value)
            for part in self.modules
            for name, value in part.__dict__.items()
            if name == "training" or name not in _OF_EVERY_MODULE
        ]
        self.constants = [(own, name) for own, name, value in attributes if isinstance(value, _CONSTANTS)]
        self.values = [entry for entry in attributes if isinstance(entry[2], (Tensor, *_CONTAINERS))]
        self.parameters = dict(module.named_parameters())
        self.buffers = list(module.buffers())
        held = [*self.parameters.values(), *self.buffers]
        self.plain = all(_is_plain(tensor) for tensor in held)
        self.devices = {tensor.device for tensor in held}
        self.known = self._now()

    def _now(self) -> tuple[list[int], ...]:
        parts = [id(part) for held in self.children for part in held.values()]
        attributes = [len(part.__dict__) for part in self.modules]
        tensors = [tensor for held in self.tensors for tensor in held.values() if tensor is not None]
        places = [tensor.data_ptr() for tensor in tensors] if self.plain else []
        return parts, attributes, [id(tensor) for tensor in tensors], places

    def changed(self) -> bool:
        """Whether a part, a parameter or a value of `values` was replaced, an attribute is new, or tensors moved."""
        return self.known != self._now() or any(own.get(name) is not value for own, name, value in self.values)

    def kept(self) -> list[Tensor]:
        """Tensors in attributes, which a graph reads where they lie, as lists and dictionaries may let go of them."""
        leaves = pytree.tree_leaves([value for _, _, value in self.values])
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def tensor_attributes(self) -> list[tuple[int, str, int]]:
        """What `forward` must not change: which attribute is which tensor."""
        return [
            (id(part), name, id(value))
            for part in self.modules
            for name, value in part.__dict__.items()
            if isinstance(value, Tensor)
        ]

    def takes(self, device: torch.device) -> bool:
        """Whether all is plain tensors on ``device``."""
        return self.plain and self.devices <= {device}

    def modes(self) -> tuple[Hashable, ...]:
        """What of the module may differ between calls, and come back: training or evaluation among it."""
        values = [own.get(name) for own, name in self.constants]
        constants: list[Any] = [value if isinstance(value, _CONSTANTS) else type(value) for value in values]
        return (*constants, *(p.requires_grad for p in self.parameters.values()))

    def hooked(self) -> bool:
        """Whether a part has a hook, which a replay would leave out."""
        return any(map(len, self.hooks)) or torch_module._has_any_global_hook()


def _hooks_of(part: nn.Module) -> tuple[Any, ...]:
    return part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks


class _Graph:
    """The passes of one shape. Tensors named here lie where the graphs read and write; they do not own their memory,
    which the graphs of other shapes use too."""

    def __init__(self, eager: Callable, anatomy: _Anatomy, recorder: _Recorder, args: tuple, kwargs: dict[str, Any]):
        self.recorder = recorder
        self.kept = anatomy.kept()
        self.backward: Callable[[], None] | None = None
        passes = _Passes(eager, anatomy, args, kwargs)
        with recorder.aside(anatomy.buffers):
            passes.warm_up()
        replay, results = recorder.record(passes.forward)
        self.forward, self.spec = replay, passes.spec
        self.constants, self.places = passes.constants, passes.places
        self.differentiable = [result.requires_grad for result in results]
        if any(self.differentiable):
            self.backward, gradients = recorder.record(passes.backward)
            count = len(passes.used_inputs)
            self.input_gradients = [recorder.borrowed(tensor) for tensor in gradients[:count]]
            self.packed = [recorder.borrowed(tensor) for tensor in gradients[count:]]
            self.packings, self.used_inputs = passes.packings, passes.used_inputs
            trained = [p for p in anatomy.parameters.values() if p.requires_grad]
            self.parameters = [trained[place.number] for packing in self.packings for place in packing.places]
            self.result_gradients = [recorder.borrowed(tensor) for tensor in passes.result_gradients]
        self.inputs = [recorder.borrowed(tensor) for tensor in passes.inputs]
        self.results = [recorder.borrowed(result) for result in results]

    def __call__(self, tensors: list[Tensor]) -> Any:
        if self.backward is None:
            results: Sequence[Tensor] = self.run_forward(tensors)[0]
        else:
            results = _Replay.apply(self, tensors, *(tensors[i] for i in self.used_inputs), *self.parameters)
        leaves = list(self.constants)
        for place, result in zip(self.places, results, strict=True):
            leaves[place] = result
        return pytree.tree_unflatten(leaves, self.spec)

    def run_forward(self, tensors: list[Tensor]) -> tuple[list[Tensor], int]:
        """The results, and what a backward pass recognises this call by."""
        with self.recorder.turn():
            for place, tensor in zip(self.inputs, tensors, strict=True):
                place.copy_(tensor.detach())
            self.forward()
            self.recorder.calls += 1
            return [result.clone() for result in self.results], self.recorder.calls

    def run_backward(self, gradients: Sequence[Tensor | None], call: int) -> list[Tensor]:
        """Gradients of the inputs and parameters that have one, in the order in which `_Replay` got them."""
        assert self.backward is not None
        with self.recorder.turn():
            if call != self.recorder.calls:
                raise RuntimeError(
                    "a module with CUDA graphs can go backward only once, and only through its last call: graphs share "
                    "memory, and it was called again or has gone backward since; CudaGraphs.remove() takes them away"
                )
            self.recorder.calls += 1  # the pass overwrites what it reads
            ours = [g for g, is_ours in zip(gradients, self.differentiable, strict=True) if is_ours]
            for place, gradient in zip(self.result_gradients, ours, strict=True):
                place.zero_() if gradient is None else place.copy_(gradient)
            self.backward()
            found = [gradient.clone() for gradient in self.input_gradients]
            for packing, packed in zip(self.packings, self.packed, strict=True):
                found += packing.unpack(packed.clone())
            return found


class _Replay(torch.autograd.Function):
    """A call of a graph with gradients. Autograd sees the inputs and parameters that want one."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, tensors: list[Tensor], *wanted: Tensor) -> tuple[Tensor, ...]:
        results, ctx.call = graph.run_forward(tensors)
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        others = [
            r for r, is_differentiable in zip(results, graph.differentiable, strict=True) if not is_differentiable
        ]
        ctx.mark_non_differentiable(*others)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.graph.run_backward(gradients, ctx.call))


class _Passes:
    """What is recorded: a forward pass of a module, and a backward pass through it. Both can run again."""

    def __init__(self, eager: Callable, anatomy: _Anatomy, args: tuple, kwargs: dict[str, Any]):
        self.holder, self.anatomy = _Holder(anatomy.module, eager), anatomy
        self.trained = {f"module.{name}": p for name, p in anatomy.parameters.items() if p.requires_grad}
        self.args, self.kwargs = args, kwargs
        self.given = _tensors(args, kwargs)
        self.inputs: list[Tensor] = []
        self.result_gradients: list[Tensor] = []
        device = self.given[0].device.type
        self.autocast = functools.partial(
            torch.autocast,
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,  # a captured cast must not outlive its graph
        )

    def warm_up(self) -> None:
        """Runs both, so that libraries are loaded and have chosen their kernels."""
        self.inputs = [_like(t).copy_(t.detach()).requires_grad_(t.requires_grad) for t in self.given]
        self.forward()
        for tensor, given in zip(self.inputs, self.given, strict=True):
            if tensor.is_inference() and not torch.allclose(tensor, given, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(_WRITES)
        if self.differentiable:
            self.backward()
        self.inputs, self.result_gradients = [], []

    def forward(self) -> list[Tensor]:
        """The tensors among the results."""
        if not self.inputs:
            self.inputs = [_like(tensor).requires_grad_(tensor.requires_grad) for tensor in self.given]
        # Parameters by another name: their own nodes that sum up gradients belong to other streams.
        self.aliases = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        inputs = iter(self.inputs)
        args = [next(inputs) if isinstance(value, Tensor) else value for value in self.args]
        kwargs = {name: next(inputs) if isinstance(value, Tensor) else value for name, value in self.kwargs.items()}
        versions, attributes = self._versions(), self.anatomy.tensor_attributes()
        with self.autocast():
            output = functional_call(self.holder, self.aliases, tuple(args), kwargs)
        if self._versions() != versions:
            raise RuntimeError(_WRITES)
        if self.anatomy.tensor_attributes() != attributes:
            raise RuntimeError("forward keeps a tensor in an attribute")
        leaves, self.spec = pytree.tree_flatten(output)
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        results = [leaves[place] for place in self.places]
        if not results or not all(_is_plain(result) for result in results):
            raise RuntimeError(f"forward returned {type(output).__name__} with other than plain real tensors in it")
        if not all(isinstance(leaf, _CONSTANTS) for leaf in self.constants):
            raise RuntimeError("forward returned something other than tensors and constants")
        results = [result.resolve_neg() for result in results]
        self.differentiable = [result for result in results if result.requires_grad]
        self._check_origins()
        return results

    def _versions(self) -> list[int]:
        """How often each argument was written into."""
        return [0 if tensor.is_inference() else tensor._version for tensor in self.inputs]

    def _check_origins(self) -> None:
        """RuntimeError where results have a gradient that neither an argument nor a parameter would get."""
        known = {id(tensor) for tensor in (*self.inputs, *self.aliases.values())}
        waiting: list[Any] = [result.grad_fn for result in self.differentiable if result.grad_fn is not None]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known:
                raise RuntimeError("forward uses a tensor with a gradient that is neither an argument nor a parameter")
            waiting += [following for following, _ in node.next_functions if following is not None]

    def backward(self) -> list[Tensor]:
        """Gradients of the inputs that have one, then those of the parameters, packed, a tensor for each dtype."""
        if not self.result_gradients:
            self.result_gradients = [
                _like(result) for result in self.differentiable
            ]  # no kernel: a replay must not fill it
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        gradients = torch.autograd.grad(
            self.differentiable, [*wanted, *self.aliases.values()], self.result_gradients, allow_unused=True
        )
        of_inputs, of_parameters = gradients[: len(wanted)], gradients[len(wanted) :]
        numbers = [i for i, tensor in enumerate(self.inputs) if tensor.requires_grad]
        self.used_inputs = [i for i, gradient in zip(numbers, of_inputs, strict=True) if gradient is not None]
        found = [gradient.resolve_neg() for gradient in of_inputs if gradient is not None]
        dtypes = dict.fromkeys(gradient.dtype for gradient in of_parameters if gradient is not None)
        self.packings = [_Packing(of_parameters, list(self.trained.values()), dtype) for dtype in dtypes]
        return [*found, *(packing.pack(of_parameters) for packing in self.packings)]


class _Holder(nn.Module):
    """Calls the ``forward`` that ``module`` had, without its own hooks."""

    def __init__(self, module: nn.Module, eager: Callable):
        super().__init__()
        self.module, self.eager = module, eager

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.eager(*args, **kwargs)


class _Place(NamedTuple):
    """Of a parameter's gradient in a packed tensor."""

    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Packing:
    """The gradients of one dtype in one tensor: a replay takes one copy, not one for each parameter. Each begins at a
    multiple of `ALIGNMENT` bytes, as kernels of optimizers are faster so."""

    def __init__(self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], dtype: torch.dtype):
        self.places = [
            _Place(i, tuple(p.shape), _like(p, "meta").stride())
            for i, (gradient, p) in enumerate(zip(gradients, parameters, strict=True))
            if gradient is not None and gradient.dtype == dtype
        ]
        unit = max(ALIGNMENT // dtype.itemsize, 1)
        counts = [parameters[place.number].numel() for place in self.places]
        self.sizes = [size for count in counts for size in (count, -count % unit)]  # and what is left out behind it

    def pack(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """One after the other, each in its parameter's order."""
        found = []
        for place in self.places:
            gradient = gradients[place.number]
            assert gradient is not None
            if gradient.stride() != place.strides:
                gradient = gradient.new_empty_strided(place.shape, place.strides).copy_(gradient)
            found.append(gradient)
        packed = found[0].new_empty(sum(self.sizes))
        torch._foreach_copy_(self.unpack(packed), found)
        return packed

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Views of ``packed``, in the order of `places`."""
        return [
            part if len(place.shape) == 1 else part.as_strided(place.shape, place.strides, part.storage_offset())
            for place, part in zip(self.places, packed.split(self.sizes)[::2], strict=True)
        ]


class _Recorder:
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


@contextmanager
def capturing(device: torch.device, pool: Any = None) -> Iterator[None]:
    """A capture that fails in here leaves nothing behind.

    Torch by itself (2.14) leaves the capture's stream as the current one, and pool and generator as if the capture went
    on; the latter then raises wherever a number is drawn. It gets a copy of its state from before, which graphs that
    were captured earlier do not know: what they draw goes on, but no longer follows ``torch.manual_seed``.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    state = generator.clone_state()
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
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


@contextmanager
def _recording() -> Iterator[None]:
    before = getattr(_thread, "recording", False)
    _thread.recording = True
    try:
        yield
    finally:
        _thread.recording = before


def _itself(value: Any) -> Any:
    return value


def _something_looks_on() -> bool:
    """Where a call has to run as it is: something follows it, or records it."""
    return (
        getattr(_thread, "recording", False)
        or watched()
        or _explain.asked()
        or _get_current_dispatch_mode() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch.cuda.is_current_stream_capturing()
    )


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments; none if they are not such as a graph can have."""
    values = (*args, *kwargs.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    others = (value for value in values if not isinstance(value, Tensor))
    graphable = all(_fits(tensor) for tensor in tensors) and all(isinstance(value, _CONSTANTS) for value in others)
    return tensors if graphable else []


def _fits(tensor: Tensor) -> bool:
    return tensor.is_cuda and _is_plain(tensor)


def _is_plain(tensor: Tensor) -> bool:
    """No subclass, in memory with strides, of real numbers."""
    return type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_complex()


def _signature(values: Any) -> tuple[Hashable, ...]:
    """What a graph is made for, of some arguments."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.requires_grad)
        if isinstance(value, Tensor)
        else (type(value), value)
        for value in values
    )


def _settings() -> tuple[Hashable, ...]:
    """What of torch's state decides which kernels run."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        current_backend(),
    )


def _like(tensor: Tensor, device: str | None = None) -> Tensor:
    """Memory for a tensor in the same order, without gaps. No kernel fills it, which a replay would run again."""
    settings: Any = deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        return torch.empty_like(tensor, device=device, requires_grad=False)
    finally:
        settings.fill_uninitialized_memory = before
