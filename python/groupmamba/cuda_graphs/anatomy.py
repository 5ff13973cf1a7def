# SPDX-License-Identifier: Apache-2.0
"""The parts of a module, for what a graph takes for granted of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from groupmamba.cuda_graphs.arguments import CONSTANTS, is_plain

_CONTAINERS = (list, tuple, dict, set)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


class Anatomy:
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
        self.constants = [(own, name) for own, name, value in attributes if isinstance(value, CONSTANTS)]
        self.values = [entry for entry in attributes if isinstance(entry[2], (Tensor, *_CONTAINERS))]
        self.parameters = dict(module.named_parameters())
        self.buffers = list(module.buffers())
        held = [*self.parameters.values(), *self.buffers]
        self.plain = all(is_plain(tensor) for tensor in held)
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
        constants: list[Any] = [value if isinstance(value, CONSTANTS) else type(value) for value in values]
        return (*constants, *(p.requires_grad for p in self.parameters.values()))

    def hooked(self) -> bool:
        """Whether a part has a hook, which a replay would leave out."""
        return any(map(len, self.hooks)) or torch_module._has_any_global_hook()


def _hooks_of(part: nn.Module) -> tuple[Any, ...]:
    return part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
