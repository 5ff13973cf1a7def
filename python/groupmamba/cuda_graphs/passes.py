# SPDX-License-Identifier: Apache-2.0
"""What is recorded: a forward pass of a module, and a backward pass through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from groupmamba.cuda_graphs.anatomy import Anatomy
from groupmamba.cuda_graphs.arguments import CONSTANTS, is_plain, tensors_of
from groupmamba.cuda_graphs.packing import Packing, like

_WRITES = "forward writes into an argument"


class Passes:
    """What is recorded: a forward pass of a module, and a backward pass through it. Both can run again."""

    def __init__(self, eager: Callable, anatomy: Anatomy, args: tuple, kwargs: dict[str, Any]):
        self.holder, self.anatomy = _Holder(anatomy.module, eager), anatomy
        self.trained = {f"module.{name}": p for name, p in anatomy.parameters.items() if p.requires_grad}
        self.args, self.kwargs = args, kwargs
        self.given = tensors_of(args, kwargs)
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
        self.inputs = [like(t).copy_(t.detach()).requires_grad_(t.requires_grad) for t in self.given]
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
            self.inputs = [like(tensor).requires_grad_(tensor.requires_grad) for tensor in self.given]
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
        if not results or not all(is_plain(result) for result in results):
            raise RuntimeError(f"forward returned {type(output).__name__} with other than plain real tensors in it")
        if not all(isinstance(leaf, CONSTANTS) for leaf in self.constants):
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
        origins = [result for result in self.differentiable if result.grad_fn is None]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                origins.append(node.variable)
            waiting += [following for following, _ in node.next_functions if following is not None]
        if any(id(origin) not in known for origin in origins):
            raise RuntimeError("forward uses a tensor with a gradient that is neither an argument nor a parameter")

    def backward(self) -> list[Tensor]:
        """Gradients of the inputs that have one, then those of the parameters, packed, a tensor for each dtype."""
        if not self.result_gradients:
            self.result_gradients = [like(result) for result in self.differentiable]
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        gradients = torch.autograd.grad(
            self.differentiable, [*wanted, *self.aliases.values()], self.result_gradients, allow_unused=True
        )
        of_inputs, of_parameters = gradients[: len(wanted)], gradients[len(wanted) :]
        numbers = [i for i, tensor in enumerate(self.inputs) if tensor.requires_grad]
        self.used_inputs = [i for i, gradient in zip(numbers, of_inputs, strict=True) if gradient is not None]
        found = [gradient.resolve_neg() for gradient in of_inputs if gradient is not None]
        dtypes = dict.fromkeys(gradient.dtype for gradient in of_parameters if gradient is not None)
        self.packings = [Packing(of_parameters, list(self.trained.values()), dtype) for dtype in dtypes]
        return [*found, *(packing.pack(of_parameters) for packing in self.packings)]


class _Holder(nn.Module):
    """Calls the ``forward`` that ``module`` had, without its own hooks."""

    def __init__(self, module: nn.Module, eager: Callable):
        super().__init__()
        self.module, self.eager = module, eager

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.eager(*args, **kwargs)
