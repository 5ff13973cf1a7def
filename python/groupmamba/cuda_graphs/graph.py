# SPDX-License-Identifier: Apache-2.0
"""The graphs of one shape of a module's inputs, and what autograd sees of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from groupmamba.cuda_graphs.anatomy import Anatomy
from groupmamba.cuda_graphs.passes import Passes
from groupmamba.cuda_graphs.recorder import Recorder


class Graph:
    """The passes of one shape. Tensors named here lie where the graphs read and write; they do not own their memory,
    which the graphs of other shapes use too."""

    def __init__(self, eager: Callable, anatomy: Anatomy, recorder: Recorder, args: tuple, kwargs: dict[str, Any]):
        self.recorder = recorder
        self.kept = anatomy.kept()
        self.backward: Callable[[], None] | None = None
        passes = Passes(eager, anatomy, args, kwargs)
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
    def forward(ctx: Any, graph: Graph, tensors: list[Tensor], *wanted: Tensor) -> tuple[Tensor, ...]:
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
