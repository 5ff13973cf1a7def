# SPDX-License-Identifier: Apache-2.0
"""What is timed of a whole model: evaluation, training without and with an optimizer; each says what it computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.problem import as_tuple

LABELS = 10  # of the training images; every model has more classes
LEARNING_RATE = 1e-5  # some hundred steps on one batch leave the weights in range


def autocast(device: torch.device, dtype: torch.dtype):
    """The region that models run in: none for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def images(batch: int, side: int, device: torch.device) -> Tensor:
    """Random images, channels-last, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(batch, side, side, 3, device=device).normal_(generator=generator)
    return x.permute(0, 3, 1, 2)


def labels_of(x: Tensor) -> Tensor:
    """One label an image."""
    return torch.arange(len(x), device=x.device) % LABELS


def loss_of(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross-entropy of every head with the same labels, at least in float32."""
    return sum(F.cross_entropy(y if y.dtype == torch.float64 else y.float(), labels) for y in as_tuple(outputs))


class ModelCall:
    """``call(i)`` for the timer.

    Args:
        function: the model, or what `torch.compile` made of it.
        model: the model, already in training or evaluation.
        x: the images.
        dtype: of autocast; float32 for none.
    """

    def __init__(self, function: Callable, model: nn.Module, x: Tensor, dtype: torch.dtype):
        self.function, self.x, self.dtype = function, x, dtype
        self.labels = labels_of(x)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self, i: int) -> object:
        raise NotImplementedError

    def fault(self) -> str | None:
        """What is wrong with what one more call computes; None if nothing is."""
        raise NotImplementedError


class Evaluation(ModelCall):
    """The logits, without gradients."""

    def __call__(self, i: int) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad(), autocast(self.x.device, self.dtype):
            return self.function(self.x)

    def fault(self) -> str | None:
        return None if _finite(as_tuple(self(0))) else "logits are not finite"


class Training(ModelCall):
    """Forward, loss and the gradients of all parameters."""

    def __call__(self, i: int) -> tuple[Tensor | None, ...]:
        with autocast(self.x.device, self.dtype):
            loss = loss_of(self.function(self.x), self.labels)
        return torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)

    def fault(self) -> str | None:
        return None if _finite([g for g in self(0) if g is not None]) else "gradients are not finite"


class Step(ModelCall):
    """Forward, loss, backward and one step of fused AdamW, whose gradients are None before and after."""

    def __init__(self, function: Callable, model: nn.Module, x: Tensor, dtype: torch.dtype):
        super().__init__(function, model, x, dtype)
        cuda = x.device.type == "cuda"  # capturable: what a step needs to be part of a graph
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, fused=True, capturable=cuda)
        with warnings.catch_warnings():  # of a capturable optimizer outside a graph, once
            warnings.simplefilter("ignore")
            self(0)

    def __call__(self, i: int) -> Tensor:
        with autocast(self.x.device, self.dtype):
            loss = loss_of(self.function(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def fault(self) -> str | None:
        if not _finite([self(0)]):
            return "the loss is not finite"
        wrong = [name for name, p in self.parameters.items() if not _finite([p])]
        return f"{len(wrong)} parameters are not finite after the steps, {wrong[0]!r} first" if wrong else None


def _finite(tensors) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


CALLS = {"eval": Evaluation, "train": Training, "latency": Evaluation, "step": Step}
KINDS = tuple(CALLS)  # the step last: it changes the weights
TRAINS = ("train", "step")
