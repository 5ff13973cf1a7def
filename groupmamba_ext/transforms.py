# SPDX-License-Identifier: Apache-2.0
"""What the compiled ops are to autograd, to the transforms of :mod:`torch.func` and to forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_library = torch.library.Library("groupmamba", "IMPL")  # kernels live as long as this


def transforms_active() -> bool:
    """True inside ``torch.func.grad``, ``vmap``, ``jvp`` and their like, whose tensors tell nothing of other levels."""
    return torch._C._are_functorch_transforms_active()


def forward_ad_active() -> bool:
    """True where a tensor may carry a tangent: in ``torch.autograd.forward_ad.dual_level``, ``torch.func.jvp``,
    ``jacfwd``."""
    return forward_ad._current_level >= 0


def jit_traces() -> bool:
    """True while ``torch.jit.trace`` runs."""
    return torch._C._get_tracing_state() is not None


def watched() -> bool:
    """True where more looks on than plain autograd: a transform of functions, forward-mode differentiation, a trace.

    A :class:`torch.autograd.Function`, or an op that has neither derivative nor rules, is no shortcut there.
    """
    return transforms_active() or forward_ad_active() or jit_traces()


def register_transforms(name: str, setup: Callable | None, backward: Callable) -> None:
    """Gives ``groupmamba::{name}`` a gradient and a rule for ``vmap``.

    :func:`torch.library.register_autograd` would do but for two gaps: its gradients do not work inside the transforms
    of :mod:`torch.func`, and it loses tangents of forward-mode differentiation without a word.

    Args:
        setup: ``setup(ctx, inputs, output)`` keeps what ``backward`` needs; None for nothing.
        backward: ``backward(ctx, *grads)``, the gradients of all inputs as a tuple.
    """
    op = getattr(torch.ops.groupmamba, name).default
    _library.impl(name, _autograd_kernel(op, name, setup, backward), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"groupmamba::{name}", _one_by_one(op), lib=_library)


def _autograd_kernel(op: Callable, name: str, setup: Callable | None, backward: Callable) -> Callable:
    def below(keyset: Any, args: Sequence[Any]) -> Tensor | tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, keyset, *args):
        output = below(keyset, args)
        if setup is not None:
            setup(ctx, args, output)
        return output

    def forward_of_level(ctx, keyset, *args):
        # A function turns both modes off, for the levels below too, which would lose their gradients and tangents.
        # Where the caller of a transform has gradients turned off, the transform does so again.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return forward(ctx, keyset, *args)

    def backward_of_all(ctx, *grads):
        return None, *backward(ctx, *grads)

    def function(base: type, forward: Callable) -> type:
        return type(name, (base,), {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)})

    plain = function(torch.autograd.Function, forward)
    # The dispatcher calls the kernel once for each transform, with the tensors of that level.
    of_level = function(_SingleLevelFunction, forward_of_level)

    def kernel(keyset, *args):
        if forward_ad_active() and torch._C._is_fwd_grad_enabled():
            _refuse_tangents(name, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, args)
        if not transforms_active():
            return plain.apply(keyset, *args)
        with enable_single_level_autograd_function():
            return of_level.apply(keyset, *args)

    return kernel


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args):
        raise RuntimeError(
            f"groupmamba::{name} has no forward-mode derivative; inside `with groupmamba_ext.backend('reference')` the "
            "functions of groupmamba_ext have one, and with the default backend they choose the reference there"
        )


def _one_by_one(op: Callable) -> Callable:
    """A rule for ``vmap``: one call a sample, the results stacked. Right whatever is mapped, parameters too."""

    def rule(info, in_dims, *args):
        count = info.batch_size

        def one(t: Any, dim: Any, i: int) -> Any:
            if not isinstance(dim, int):  # not mapped; for a list of numbers a list
                return t
            return t.select(dim, i) if count else t.sum(dim)  # of no samples zeros, for the shape

        results = [op(*(one(t, dim, i) for t, dim in zip(args, in_dims, strict=True))) for i in range(max(count, 1))]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:count], 0
        stacked = tuple(torch.stack(parts)[:count] for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
