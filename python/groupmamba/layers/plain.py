# SPDX-License-Identifier: Apache-2.0
"""When a fused path may read a submodule's parameters in place of calling it, and why not.

The layers compute in few ops what their submodules compute one by one. That is a shortcut for submodules that are
provably plain. Wherever a call of one could be more than its class's ``forward`` on its own parameters (hooks,
adapters, parametrizations, quantized or offloaded modules), the layer calls every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

# The classes of tensors that hold plain numbers: parameters, what torch.func.functional_call puts in their place, and
# what stands for them while torch.compile and torch.export trace.
_PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, FakeTensor, FunctionalTensor))

AFFINE = frozenset(("weight", "bias"))


class Plain(NamedTuple):
    """What a submodule is where a fused path may read it."""

    cls: type[nn.Module]  # exactly, no subclass
    parameters: frozenset[str] | None = frozenset()  # plain tensors of these names, none missing, no more; None: any
    parts: Sequence[tuple[str, Plain]] = ()  # its own submodules that are read with it
    config: Sequence[tuple[str, object]] = ()  # attributes that the fused path takes for granted


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """``weight`` and ``bias`` of a plain module, without their attributes' price: a microsecond each on a slow host."""
    held = module._parameters
    return held["weight"], held["bias"]


def are_plain(*tensors: Tensor | None) -> bool:
    """True where all of these are there and hold plain numbers, no subclass of ``torch.Tensor``."""
    return all(type(t) in _PLAIN_TENSORS for t in tensors)


def linear(out_features: int) -> Plain:
    return Plain(nn.Linear, AFFINE, config=(("out_features", out_features),))


def layer_norm(cls: type[nn.LayerNorm], dim: int) -> Plain:
    return Plain(cls, AFFINE, config=(("normalized_shape", (dim,)),))


def convolution(kernel_size: int, stride: int, groups: int, *, bias: bool) -> Plain:
    """An ``nn.Conv2d`` with half of its kernel as padding, of zeros."""
    config = {
        "kernel_size": (kernel_size, kernel_size),
        "stride": (stride, stride),
        "padding": (kernel_size // 2, kernel_size // 2),
        "padding_mode": "zeros",
        "dilation": (1, 1),
        "groups": groups,
    }
    return Plain(nn.Conv2d, AFFINE if bias else frozenset(("weight",)), config=tuple(config.items()))


def why_called(modules: dict[str, nn.Module | None], parts: Sequence[tuple[str, Plain]]) -> str | None:
    """Why submodules have to be called, as text, or None where a fused path may read their parameters.

    Args:
        modules: ``_modules`` of the layer.
        parts: what the fused path reads, under its names in ``modules``.
    """
    if _has_any_global_hook():
        return "hooks for all modules are registered (torch.nn.modules.module.register_module_forward_hook and others)"
    return _first_reason(modules, parts)


def _first_reason(modules: dict[str, nn.Module | None], parts: Sequence[tuple[str, Plain]]) -> str | None:
    for name, (cls, parameters, inner, config) in parts:
        module = modules.get(name)
        if type(module) is not cls:
            return f"{name} is {_class_name(type(module))}, not {_class_name(cls)}"
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return f"{name} has a forward of its own" if "forward" in own else f"{name} has hooks"
        if parameters is not None:
            missing = len(parameters)
            for key, value in own["_parameters"].items():
                if value is not None:
                    if type(value) not in _PLAIN_TENSORS or key not in parameters:
                        return _parameter_reason(name, key, value, parameters)
                    missing -= 1
            if missing:
                return _missing_reason(name, own["_parameters"], parameters)
        for key, expected in config:
            if own.get(key) != expected:
                return f"{name}.{key} is {own.get(key)!r}, not {expected!r}"
        if inner and (reason := _first_reason(own["_modules"], inner)) is not None:
            return f"{name}.{reason}"
    return None


def _parameter_reason(name: str, key: str, value: Tensor, parameters: frozenset[str]) -> str:
    if key not in parameters:
        return f"{name} has a parameter {key}, with which it was not built"
    return f"{name}.{key} is {_class_name(type(value))}, a subclass of torch.Tensor"


def _missing_reason(name: str, held: dict[str, Tensor | None], parameters: frozenset[str]) -> str:
    key = max(key for key in parameters if held.get(key) is None)  # the weight before the bias
    if key in held:
        return f"{name}.{key} is None"
    return f"{name}.{key} is no parameter of its own any more (pruned, parametrized or sharded)"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def call_on_rows(layer: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``layer``, an ``nn.Linear`` or what took its place, on the tokens of (..., C) as rows (tokens, C).

    Tools that count operations of an ``nn.Linear`` from its output's shape take the first size for all of them.

    Args:
        dtype: what a layer that is no ``nn.Linear`` is given outside autocast, the dtype of ``x`` by default.
    """
    y = call_in_own_dtype(layer, x.flatten(0, -2), dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def call_in_own_dtype(layer: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``layer(x)``; outside autocast an ``nn.Linear`` or ``nn.Conv2d`` of another dtype, which the fused ops allow, in
    its own."""
    if _autocast(x):
        return layer(x)
    inside = x.dtype if dtype is None else dtype
    if type(layer) in (nn.Linear, nn.Conv2d):
        own = layer._parameters.get("weight")
        inside = inside if own is None else own.dtype
    return layer(x.to(inside)).to(x.dtype)


def floating_parameter(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The parameter ``name`` of ``module``, or the first floating-point one where something took its place."""
    held = module._parameters.get(name)
    if held is not None and held.is_floating_point():
        return held
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def why_not_fused(module: nn.Module) -> dict[str, str]:
    """Which layers of a model call their submodules one by one, and why.

    The layers of this package compute in few ops what their submodules compute one by one, as long as these submodules
    are exactly what the layer built, without hooks, a ``forward`` of their own, or parameters that are not plain
    tensors. Otherwise they call each of them: the same values, more slowly. (How few the ops are depends on more: on
    the device, and whether the layer has ``scan="cross"``, ``d_conv=1``, ``gate_source="output"``, or groups wider than
    a kernel takes.)

    Args:
        module: a layer of this package or a model of any kind around such layers.

    Returns:
        For each layer in ``module`` that calls its submodules, its name in ``module.named_modules()`` (``""`` for
        ``module`` itself) and the first reason; empty where no submodule stands in the way.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    reasons = {}
    for name, layer in module.named_modules():
        why = getattr(type(layer), "_why_called", None)
        if why is not None and (reason := why(layer)) is not None:
            reasons[name] = reason
    return reasons
