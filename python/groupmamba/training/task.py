# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a task: its data, its model, its loss and how it is measured. One engine serves all tasks."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from groupmamba.training.card import Card
from groupmamba.training.data import BadImages, Batch
from groupmamba.training.distributed import Processes
from groupmamba.training.option_table import Command
from groupmamba.training.output import Panel, Screen
from groupmamba.training.step import Plan, Step

_TASKS = {
    "classification": ("groupmamba.training.classification", "Classification"),
    "detection": ("groupmamba.training.detection.task", "Detection"),
    "segmentation": ("groupmamba.training.segmentation.task", "Segmentation"),
}


class Source(Protocol):
    """The images of one split, and where they are."""

    root: Path
    classes: list[str]

    def __len__(self) -> int: ...

    def path_of(self, index: int) -> str:
        """The file of an image."""
        ...


class Sources(NamedTuple):
    """Training and validation images."""

    training: Source
    validation: Source


class Task(ABC):
    """A task of one run; the engine calls its methods in the order in which they stand here.

    Args:
        args: all options.
        processes: of the run.
        device: of this process.
        screen: where lines go.
    """

    name: ClassVar[str]
    command: ClassVar[Command]
    metrics: tuple[str, ...]  # that `evaluate` gives, in the order of summary.csv's columns; known after `read`
    best: str  # the metric, the higher the better, by which checkpoints are ranked
    panels: tuple[Panel, ...]  # of curves.png
    no_graph: ClassVar[str | None] = None  # why a step can't be a CUDA graph
    graphed: ClassVar[str] = ""  # the submodule whose passes then are graphs; the model itself by default
    step: ClassVar[type[Step]] = Step

    def __init__(self, args: argparse.Namespace, processes: Processes, device: torch.device, screen: Screen):
        self.args, self.processes, self.device, self.screen = args, processes, device, screen

    def check(self) -> None:  # noqa: B027  # of most tasks nothing
        """UsageError or CommandError for options that can't work on this machine."""

    @abstractmethod
    def read(self) -> Sources:
        """Where the images are.

        Raises:
            CommandError: something is missing or broken.
        """

    @property
    def even_batches(self) -> bool:
        """Whether a batch must have an even number of images."""
        return False

    @abstractmethod
    def make_model(self, sources: Sources, fresh: bool) -> tuple[nn.Module, Card]:
        """The model, by the seed, if ``fresh`` with ``--weights`` or ``--pretrained`` in it, and its card.

        Raises:
            UsageError, CommandError: it can't be made so, or weights can't be had or do not fit.
        """

    @abstractmethod
    def make_loaders(
        self, sources: Sources, card: Card, orders: tuple[Sampler, Sampler], pin: bool
    ) -> tuple[DataLoader, DataLoader]:
        """Batches of training and validation, in these orders; ``pin`` for page-locked memory."""

    @abstractmethod
    def make_criterion(self, model: nn.Module, card: Card) -> nn.Module:
        """The loss, as `step` takes it."""

    @abstractmethod
    def plan(self, steps: int) -> Plan:
        """How many steps there are and how the learning rate goes; ``steps`` in an epoch."""

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027
        """Called before the first batch of an epoch, and before the next one of an epoch that goes on."""

    def mixed(self, batch: tuple[Any, Any], step: int, piece: int) -> tuple[Any, Any]:
        """Images and labels as `to_device` gave them, for piece ``piece`` of a step."""
        return batch

    @abstractmethod
    def evaluate(
        self,
        models: Sequence[nn.Module],
        batches: DataLoader,
        amp: torch.dtype | None,
        bad: BadImages,
    ) -> list[dict[str, float]]:
        """`metrics` of each model, in evaluation mode, over the validation images of all processes."""

    @abstractmethod
    def to_device(self, batch: Batch) -> tuple[Any, Any]:
        """Normalised images and labels of a batch on the device, without waiting for it."""

    @abstractmethod
    def words(self, values: dict[str, float]) -> str:
        """Metrics as they stand in the line at the end of an epoch."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of summary.csv: each metric of the model and of its moving average."""
        return tuple(f"{whose}_{metric}" for whose in ("eval", "ema") for metric in self.metrics)


def task_of(name: str) -> type[Task]:
    """The task of that name."""
    module, attribute = _TASKS[name]
    return getattr(import_module(module), attribute)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
