# SPDX-License-Identifier: Apache-2.0
"""What a row of the benchmark is about: a case, its tensors, and the calls that its passes are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suite.measure import nbytes

PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """A batch of images."""

    batch: int
    channels: int
    height: int
    width: int

    @property
    def image(self) -> str:
        """Without the batch, as tables print it."""
        return f"{self.channels}x{self.height}x{self.width}"

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.height * self.width


@dataclass
class Problem:
    """The tensors of a case on a device, and the functions that take them.

    Attributes:
        inputs: what is rotated; every timed call takes one set of them by name.
        parameters: what all calls share, by name; differentiated like the inputs.
        function: ``function(**inputs)``, holding the parameters itself where there are any.
        truth: ``truth(**inputs, **parameters)`` in plain PyTorch, in the dtype of what it is given.
        autocast: the dtype of the autocast region around ``function``, if it runs in one.
        sample: compare at most so many images of the batch with the truth; None for all.
        flops: floating-point operations of the ``forward`` and the ``backward`` pass (:mod:`suite.flops`).
    """

    inputs: dict[str, Tensor]
    function: Callable
    truth: Callable
    parameters: dict[str, Tensor] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    sample: int | None = None
    flops: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One benchmark: an op at a shape in a dtype and storage."""

    op: str
    label: str
    shape: Shape
    dtype: torch.dtype
    storage: str
    prepare: Callable[[torch.device], Problem]
    passes: tuple[str, ...] = PASSES
    series: str = "stages"

    @property
    def title(self) -> str:
        """For the progress bar and messages."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.label} {self.shape.image} batch {self.shape.batch} {dtype} {self.storage}"


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a function with one or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def autocast(problem: Problem) -> contextlib.AbstractContextManager:
    """The region that the calls of ``problem`` run in."""
    if problem.autocast is None:
        return contextlib.nullcontext()
    kind = next(iter(problem.inputs.values())).device.type
    return torch.autocast(kind, dtype=problem.autocast)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same storage as new leaves of autograd."""
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


class Calls:
    """The passes of ``function`` over sets of inputs, as ``call(i)``.

    ``forward`` runs without gradients. ``backward`` is `torch.autograd.grad` for every input and parameter, through a
    forward done before and kept (``retain_graph=True``). ``forward+backward`` is both, one after the other.
    """

    def __init__(self, problem: Problem, sets: int):
        self.problem = problem
        copies = [problem.inputs] + [{k: t.clone() for k, t in problem.inputs.items()} for _ in range(sets - 1)]
        self.sets = [leaves(c) for c in copies]
        with torch.no_grad(), autocast(problem):
            outputs = as_tuple(problem.function(**self.sets[0]))
        self.output_bytes = nbytes(outputs)
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        first = tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs)
        self.gradients = [first] + [tuple(t.clone() for t in first) for _ in range(sets - 1)]

    def flops(self, kind: str) -> int | None:
        """Floating-point operations of a pass; None where they are not counted."""
        if not self.problem.flops:
            return None
        return sum(self.problem.flops[part] for part in kind.split("+"))

    def bytes(self, kind: str) -> int:
        """What a pass has to move: every input and output once, gradients included."""
        inputs = nbytes(self.problem.inputs.values()) + nbytes(self.problem.parameters.values())
        forward, backward = inputs + self.output_bytes, 2 * inputs + self.output_bytes
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[kind]

    def call(
        self,
        kind: str,
        function: Callable | None = None,
        parameters: dict[str, Tensor] | None = None,
        adapt: Callable | None = None,
    ) -> Callable:
        """``call(i)`` for a pass of ``function`` (the problem's by default).

        Args:
            kind: of :data:`PASSES`.
            parameters: those of ``function``; the problem's by default.
            adapt: makes the inputs of ``function`` from the problem's.
        """
        function = function or self.problem.function
        shared = list((self.problem.parameters if parameters is None else parameters).values())
        problem = self.problem
        sets = self.sets
        if adapt is not None:
            with torch.no_grad():
                sets = [leaves(adapt(tensors)) for tensors in sets]

        def forward(i: int):
            with autocast(problem):
                return as_tuple(function(**sets[i]))

        def backward(i: int, outputs: tuple[Tensor, ...], retain: bool):
            wanted = [*sets[i].values(), *shared]
            return torch.autograd.grad(outputs, wanted, self.gradients[i], retain_graph=retain)

        if kind == "forward":
            return torch.no_grad()(forward)
        if kind == "forward+backward":
            return lambda i: backward(i, forward(i), False)
        kept = [forward(i) for i in range(len(sets))]
        return lambda i: backward(i, kept[i], True)
