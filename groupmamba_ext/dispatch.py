# SPDX-License-Identifier: Apache-2.0
"""From the public functions to the compiled ops, with gradients; the formulas are in `autograd` and `layer_ops`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ops = torch.ops.groupmamba
_functions: dict[str, type[torch.autograd.Function]] = {}


def define(name: str, fake: Callable, setup: Callable, backward: Callable, backward_fake: Callable) -> None:
    """Gives the op pair ``groupmamba::{name}_fwd`` and ``_bwd`` fake kernels and a gradient.

    Args:
        fake, backward_fake: what :func:`torch.library.register_fake` takes.
        setup, backward: what :func:`torch.library.register_autograd` takes; ``backward`` calls :func:`call_backward`.
    """
    forward_op, backward_op = f"groupmamba::{name}_fwd", f"groupmamba::{name}_bwd"
    torch.library.register_fake(forward_op, fake)
    torch.library.register_fake(backward_op, backward_fake)
    torch.library.register_autograd(forward_op, backward, setup_context=setup)
    torch.library.register_autograd(backward_op, _no_double_backward(name))
    op = getattr(_ops, f"{name}_fwd").default

    def forward(ctx, *args):
        output = _below_autograd(op, args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[name] = type(name, (torch.autograd.Function,), methods)


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
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def call(name: str, *args) -> Tensor | tuple[Tensor, ...]:
    """``groupmamba::{name}_fwd`` on ``args``, with its gradient.

    A registered gradient costs a call with twenty arguments 0.2 ms on a slow host, as long as a GPU takes for a small
    layer: only tracers, which need it, go through it. Others get the same formulas as a plain autograd function.
    """
    if _traced():
        return getattr(_ops, f"{name}_fwd")(*args)
    if not torch.is_grad_enabled():
        return _below_autograd(getattr(_ops, f"{name}_fwd").default, args)
    return _functions[name].apply(*args)


def call_backward(name: str, *args) -> tuple[Tensor, ...]:
    """``groupmamba::{name}_bwd``; what raises on a second derivative is in the way only where one could be taken."""
    op = getattr(_ops, f"{name}_bwd").default
    return op(*args) if torch.is_grad_enabled() or _traced() else _below_autograd(op, args)
