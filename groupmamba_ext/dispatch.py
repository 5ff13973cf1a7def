# SPDX-License-Identifier: Apache-2.0
"""From the public functions to the compiled ops, with gradients; the formulas are in `autograd` and `layer_ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from groupmamba_ext.transforms import jit_traces, register_transforms, transforms_active, watched

_ops = torch.ops.groupmamba
_functions: dict[str, type[torch.autograd.Function]] = {}
_overloads: dict[str, Callable] = {}  # by the op's name


def define(name: str, fake: Callable, setup: Callable, backward: Callable, backward_fake: Callable) -> None:
    """Gives the op pair ``groupmamba::{name}_fwd`` and ``_bwd`` fake kernels and a gradient.

    Args:
        fake, backward_fake: what :func:`torch.library.register_fake` takes.
        setup, backward: what `register_transforms` takes; ``backward`` calls :func:`call_backward`.
    """
    forward_op, backward_op = f"groupmamba::{name}_fwd", f"groupmamba::{name}_bwd"
    torch.library.register_fake(forward_op, fake)
    torch.library.register_fake(backward_op, backward_fake)
    register_transforms(f"{name}_fwd", setup, backward)
    register_transforms(f"{name}_bwd", None, _no_double_backward(name))
    _overloads[f"{name}_fwd"] = op = getattr(_ops, f"{name}_fwd").default
    _overloads[f"{name}_bwd"] = getattr(_ops, f"{name}_bwd").default

    def forward(ctx, *args):
        output = _below_autograd(op, args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[name] = type(name, (torch.autograd.Function,), methods)


def define_inference(name: str, fake: Callable, hint: str = "") -> None:
    """Gives ``groupmamba::{name}`` a fake kernel, and a gradient that raises, with a ``hint`` behind the message."""
    torch.library.register_fake(f"groupmamba::{name}", fake)
    register_transforms(name, None, _no_backward(name, hint))
    _overloads[name] = getattr(_ops, name).default


def _no_backward(name: str, hint: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"groupmamba::{name} is an op for inference, which keeps nothing for a backward{hint}")

    return backward


def _no_double_backward(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"groupmamba_ext.{name}: second derivatives are not implemented by the compiled op; "
            "use `with groupmamba_ext.backend('reference')` for them"
        )

    return backward


def _below_autograd(op: Callable, args: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _traced() -> bool:
    """True where a call must go through the dispatcher: for a compiler, and where it is `watched`."""
    return torch.compiler.is_compiling() or watched()


def _require_gradient(args: Sequence) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in args)


def may_want_gradient(args: Sequence) -> bool:
    """False where no gradient can be asked for of a result of ``args``, now or, while ``torch.jit.trace`` runs, of what
    it makes. Tensors inside the transforms of :mod:`torch.func` tell it of their own level only."""
    return transforms_active() or ((torch.is_grad_enabled() or jit_traces()) and _require_gradient(args))


def call(name: str, *args) -> Tensor | tuple[Tensor, ...]:
    """``groupmamba::{name}_fwd`` on ``args``, with its gradient.

    The dispatcher's gradient costs a call with twenty arguments 0.2 ms on a slow host, as long as a GPU takes for a
    small layer: only tracers, which need it, go through it. Others get the same formulas as a plain autograd function.
    """
    if _traced():
        return getattr(_ops, f"{name}_fwd")(*args)
    if not torch.is_grad_enabled():
        return _below_autograd(_overloads[f"{name}_fwd"], args)
    return _functions[name].apply(*args)


def call_alone(name: str, *args) -> Tensor:
    """The first result of ``groupmamba::{name}_fwd`` on ``args``, with its gradient, or, where no gradient can be asked
    for, ``groupmamba::{name}``, which keeps nothing for one."""
    wanted = may_want_gradient(args)
    if _traced():
        return getattr(_ops, f"{name}_fwd")(*args)[0] if wanted else getattr(_ops, name)(*args)
    return _functions[name].apply(*args)[0] if wanted else _below_autograd(_overloads[name], args)


def call_inference(name: str, *args) -> Tensor | tuple[Tensor, ...]:
    """``groupmamba::{name}`` on ``args``; what raises on a gradient is in the way only where one could be taken."""
    if _traced() or (torch.is_grad_enabled() and _require_gradient(args)):
        return getattr(_ops, name)(*args)
    return _below_autograd(_overloads[name], args)


def call_backward(name: str, *args) -> tuple[Tensor, ...]:
    """``groupmamba::{name}_bwd``; what raises on a second derivative is in the way only where one could be taken."""
    op = _overloads[f"{name}_bwd"]
    return op(*args) if torch.is_grad_enabled() or _traced() else _below_autograd(op, args)
