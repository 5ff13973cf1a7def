# SPDX-License-Identifier: Apache-2.0
"""How a compiled op becomes public: what Python adds to it, and calls of it with its gradient.

A module of `groupmamba_ext.ops` describes its op by an `Op` or `InferenceOp`; `register` gives it to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from groupmamba_ext.transforms import jit_traces, register_transforms, transforms_active, watched

_ops = torch.ops.groupmamba
_functions: dict[str, type[torch.autograd.Function]] = {}
_overloads: dict[str, Callable] = {}  # by the op's name


class Op(NamedTuple):
    """The op pair ``groupmamba::{name}_fwd`` and ``_bwd``, and ``groupmamba::{name}`` where there is `inference_fake`.

    FLOP formulas are for `torch.utils.flop_counter.FlopCounterMode` and get shapes in place of tensors. As for torch's
    own ops only the terms that grow with a contraction count, a multiplication and an addition one each: the
    recurrence over the states, products, the taps of a convolution. Norms, gates and activations do not.
    """

    name: str
    fake: Callable  # this and backward_fake: what torch.library.register_fake takes
    setup: Callable  # this and backward: what `register_transforms` takes; backward calls `call_backward`
    backward: Callable
    backward_fake: Callable
    flops: Callable | None = None  # of a forward
    backward_flops: Callable | None = None
    inference_fake: Callable | None = None  # of the form that keeps nothing for a backward


class InferenceOp(NamedTuple):
    """The op ``groupmamba::{name}``, which has no gradient. A FLOP formula is one of `Op`'s."""

    name: str
    fake: Callable
    flops: Callable | None = None


def register(op: Op | InferenceOp) -> None:
    """Gives an op its fake kernels, gradient and FLOP formulas; once, after libgroupmamba is loaded."""
    if isinstance(op, InferenceOp):
        _register_inference(op.name, op.fake)
        if op.flops is not None:
            register_flop_formula(getattr(_ops, op.name))(op.flops)
        return
    _register_pair(op)
    if op.inference_fake is not None:
        _register_inference(op.name, op.inference_fake, f"; groupmamba::{op.name}_fwd has one")
    if op.flops is not None and op.backward_flops is not None:
        forms = ("_fwd",) if op.inference_fake is None else ("_fwd", "")
        register_flop_formula([getattr(_ops, op.name + form) for form in forms])(op.flops)
        register_flop_formula(getattr(_ops, f"{op.name}_bwd"))(op.backward_flops)


def _register_pair(op: Op) -> None:
    name, setup, backward = op.name, op.setup, op.backward
    torch.library.register_fake(f"groupmamba::{name}_fwd", op.fake)
    torch.library.register_fake(f"groupmamba::{name}_bwd", op.backward_fake)
    register_transforms(f"{name}_fwd", setup, backward)
    register_transforms(f"{name}_bwd", None, _no_double_backward(name))
    _overloads[f"{name}_fwd"] = compiled = getattr(_ops, f"{name}_fwd").default
    _overloads[f"{name}_bwd"] = getattr(_ops, f"{name}_bwd").default

    def forward(ctx, *args):
        output = _below_autograd(compiled, args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[name] = type(name, (torch.autograd.Function,), methods)


def _register_inference(name: str, fake: Callable, hint: str = "") -> None:
    """With a ``hint`` behind the message of its gradient, which raises."""
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
        return _run(op, args)


def _run(op: Callable, args: tuple):
    """``op(*args)``; of a GPU whose memory runs out torch's own error, which no library of the stable ABI can raise."""
    try:
        return op(*args)
    except RuntimeError as error:
        if type(error) is RuntimeError and "CUDA out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


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
    if _traced():
        return op(*args)
    return _run(op, args) if torch.is_grad_enabled() else _below_autograd(op, args)
