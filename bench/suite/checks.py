# SPDX-License-Identifier: Apache-2.0
"""Right first: outputs and gradients against float64, before anything is timed.

A tensor passes if its relative error is at most twice that of plain PyTorch (float32 arithmetic on the same stored
inputs, rounded to the same dtype; for a layer, the same autocast region), or a few roundings of the dtype; and if its
worst element is within a wider bound of the same kind. A peer may be four times as far off: some round their steps to
the storage dtype, which is their choice and no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from groupmamba_ext.selftest import FLOOR
from suite.problem import Problem, as_tuple, autocast, leaves

FACTOR = 2.0  # times PyTorch's own error
WORST_FACTOR = 4.0  # the same for the worst element, whose error scatters more
PEER_SLACK = 4.0
MEASURES = ("relative", "worst element's")
WORST_FLOORS = 8.0  # a single element may be off by so many times the tolerance of the norm


@dataclass(frozen=True)
class Check:
    """The tensor that came closest to its tolerance or exceeded it most."""

    passed: bool
    tensor: str
    error: float
    allowed: float
    measure: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.measure} error {self.error:.2e}, allowed {self.allowed:.2e}"

    def json(self) -> dict:
        """For the report."""
        return asdict(self)


def _errors(got: Tensor, truth: Tensor, size: float) -> tuple[float, float]:
    """Relative error in the 2-norm, and of the worst element relative to itself plus the root mean square."""
    got, truth = got.detach().to(truth.dtype), truth.detach()
    if got.shape != truth.shape or not torch.isfinite(got).all():
        return float("inf"), float("inf")
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = got - truth
    scale = max(truth.norm().item(), size)
    if scale == 0:
        worst = difference.abs().max().item()
        return worst, worst
    rms = scale / truth.numel() ** 0.5
    return difference.norm().item() / scale, (difference.abs() / (truth.abs() + rms)).max().item()


def compare(
    results: dict[str, Tensor],
    truth: dict[str, Tensor],
    own: dict[str, Tensor],
    dtype: torch.dtype,
    slack: float = 1.0,
    worst: bool = True,
) -> Check:
    """Every entry of ``results`` with ``truth``; ``own`` are the results of plain PyTorch, which sets the tolerance.

    ``worst`` as False leaves out the worst element, whose tolerance needs a truth that is more precise than ``own``.

    A single number that is a sum over the image may cancel: its error is taken relative to the size that such a sum has
    by chance.
    """
    chance = (truth["x"] * truth["dx"]).norm().item() if "x" in truth and "dx" in truth else 0.0
    checks = []
    for name, got in results.items():
        size = chance if truth[name].numel() == 1 else 0.0
        errors = _errors(got, truth[name], size)
        floor = max(FLOOR[dtype], FLOOR.get(got.dtype, 0.0))
        plain = [e if e < float("inf") else 0.0 for e in _errors(own[name].to(got.dtype), truth[name], size)]
        limits = max(FACTOR * plain[0], floor), max(WORST_FACTOR * plain[1], WORST_FLOORS * floor)
        for error, limit, measure in list(zip(errors, limits, MEASURES, strict=True))[: 2 if worst else 1]:
            checks.append(Check(error <= slack * limit, name, error, slack * limit, measure))
    return max(checks, key=_severity)


def _severity(check: Check) -> tuple[bool, float]:
    """For the worst check: a failed one before any that passed, NaN (of a truth that is not finite) before figures."""
    ratio = check.error / check.allowed
    return not check.passed, float("inf") if math.isnan(ratio) else ratio


def _gradients(function: Callable, tensors: dict[str, Tensor], dys: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs and all gradients of ``function(**tensors)``."""
    outputs = as_tuple(function(**tensors))
    dys = tuple(dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True))
    gradients = torch.autograd.grad(outputs, list(tensors.values()), dys)
    named = {f"output {i}" if len(outputs) > 1 else "output": y for i, y in enumerate(outputs)}
    return named | {f"d{name}": g for name, g in zip(tensors, gradients, strict=True)}


class Truth:
    """The float64 results of a problem, made once, for the project's function and for the peers'."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.dtype = problem.autocast or next(iter(problem.inputs.values())).dtype
        batch = next(iter(problem.inputs.values())).shape[0]
        count = batch if problem.sample is None else min(batch, problem.sample)
        device = next(iter(problem.inputs.values())).device
        self.images = torch.linspace(0, batch - 1, count, device=device).round().long()
        self.dys = self._output_gradients(problem.function)
        self.truth = self._results(torch.float64)
        if problem.inputs.get("x") is not None:
            self.truth["x"] = self._some(problem.inputs["x"]).double()
        self.own = self._results(torch.float32)

    def _some(self, t: Tensor) -> Tensor:
        return t if self.problem.sample is None else t[self.images]

    def _output_gradients(self, function: Callable) -> tuple[Tensor, ...]:
        """Random on the images that are compared, zero on the others."""
        with torch.no_grad(), autocast(self.problem):
            outputs = as_tuple(function(**self.problem.inputs))
        generator = torch.Generator(outputs[0].device).manual_seed(2)
        dys = tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs)
        if self.problem.sample is not None:
            for dy in dys:
                chosen = dy[self.images].clone()
                dy.zero_()[self.images] = chosen
        return dys

    def _results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        problem = self.problem
        inputs = {name: self._some(t).detach().to(dtype) for name, t in problem.inputs.items()}
        tensors = leaves(inputs | {name: t.detach().to(dtype) for name, t in problem.parameters.items()})
        dys = tuple(self._some(dy).to(dtype) for dy in self.dys)

        def function(**tensors: Tensor):
            if dtype == torch.float64 or problem.autocast is None:
                return problem.truth(**tensors)
            with autocast(problem):
                return problem.truth(**tensors)

        found = _gradients(function, tensors, dys)
        return {name: t.detach() for name, t in found.items()}

    def check(self) -> Check:
        """The problem's function: outputs and every gradient."""
        problem = self.problem
        tensors = leaves(problem.inputs)

        def function(**tensors: Tensor):
            with autocast(problem):
                return problem.function(**{name: tensors[name] for name in problem.inputs})

        found = _gradients(function, tensors | problem.parameters, self.dys)
        results = {}
        for name, t in found.items():
            per_image = name.startswith("output") or name[1:] in problem.inputs
            results[name] = self._some(t) if per_image else t
        return compare(results, self.truth, self.own, self.dtype)

    def check_output(self, function: Callable, adapt: Callable | None = None) -> Check:
        """A peer's function: the outputs alone, since its other tensors may be laid out in its own way."""
        inputs = self.problem.inputs
        with torch.no_grad(), autocast(self.problem):
            outputs = as_tuple(function(**(inputs if adapt is None else adapt(inputs))))
        names = [name for name in self.truth if name.startswith("output")]
        results = {name: self._some(y) for name, y in zip(names, outputs, strict=True)}
        return compare(results, self.truth, self.own, self.dtype, PEER_SLACK)
