# SPDX-License-Identifier: Apache-2.0
"""What the layers are to torch.fx (leaves of a graph), torch.jit.script (a clear error) and torch.export (any size)."""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.experimental import _config as symbolic_config


class Leaf:
    """A mixin for modules whose ``forward`` asks for sizes, devices and dtypes: a tracer sees one call, not its inside.

    ``torch.compile``, ``torch.export`` and ``torch.jit.trace``, which know these, go through ``forward`` as it is.
    """

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__}: its kernels are chosen in Python. "
            "torch.jit.trace, torch.export.export and torch.compile take it."
        )


def fx_call(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """The call of ``module`` as a node of the graph that torch.fx traces.

    Raises:
        RuntimeError: ``module`` itself is what is traced.
    """
    name = x.tracer.path_of_module(module)
    if not name:
        raise RuntimeError(
            f"torch.fx can't trace {type(module).__name__} by itself: it is a leaf of the graphs of models around it. "
            "torch.export.export and torch.compile look inside."
        )
    return x.tracer.create_proxy("call_module", name, (x, *args), kwargs)


def any_size() -> contextlib.AbstractContextManager:
    """Where ``torch.export`` traces a model for many sizes, one program for those that leave a single pixel, too.

    The fake tensors of torch ask of every tensor's strides whether a side is 1, which fixes that it is not; inside this
    context they assume nothing of it.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return symbolic_config.patch(backed_size_oblivious=True)
    return contextlib.nullcontext()


def keepable(x: Tensor) -> Tensor:
    """``x``, a 4-D view that a backward keeps, as no view where ``torch.compile`` traces for a CPU.

    In models with convolutions its inductor can't sort the strides of such views if sizes are symbols (torch 2.14:
    "cannot determine truth value of Relational"). It takes a clone away, but not two changes of sign, which cost
    nothing where they become part of what computes ``x``.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == "cpu":
        return x.neg().neg()
    return x
