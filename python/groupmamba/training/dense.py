# SPDX-License-Identifier: Apache-2.0
"""What detection and segmentation have in common: a backbone inside a library's model, runs by steps, annotations."""

from __future__ import annotations

import argparse
import colorsys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

from groupmamba.training.card import Card, check_images, find_weights, made, read_card
from groupmamba.training.checkpoint import read_weights
from groupmamba.training.data import Batch
from groupmamba.training.samples import Sample, Samples, listed, loader
from groupmamba.training.step import Plan
from groupmamba.training.task import Source, Sources, Task
from groupmamba_ext._command import CommandError, UsageError

SHOWN = 4  # names in a message
SHARE_OF_WARMUP = 10  # of a short run the warm-up takes one part in ten


class DenseTask(Task):
    """A task whose model has a backbone inside."""

    card: Card  # known after `make_loaders` or `validation_loader`
    heads: ClassVar[tuple[str, ...]]  # beginnings of names of parameters that depend on the number of classes

    @classmethod
    @abstractmethod
    def build(cls, card: Card, *, drop_path: float = 0.0, **backbone: Any) -> nn.Module:
        """The model that a card describes; ``backbone``: ``pretrained`` or ``weights`` of the backbone."""

    @abstractmethod
    def images_of(self, model: nn.Module) -> tuple[nn.Module, tuple[int, int]]:
        """The part of a model that takes images as they are batched, and the height and width of such an image."""

    @abstractmethod
    def make_card(self, sources: Sources) -> Card:
        """The card of the run."""

    @classmethod
    @abstractmethod
    def arguments(cls, card: Card) -> dict[str, Any]:
        """The options of training that validation and prediction with a checkpoint need."""

    collate: ClassVar[Callable[[Sequence[Sample]], Batch]]  # samples of training to a batch

    @abstractmethod
    def training_transform(self, card: Card) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Of an image and its target."""

    def make_loaders(
        self, sources: Sources, card: Card, orders: tuple[Sampler, Sampler], pin: bool
    ) -> tuple[DataLoader, DataLoader]:
        args = self.args
        training: Any = sources.training
        samples = Samples(training, self.training_transform(card), args.seed, args.max_bad_images)
        return (
            loader(samples, orders[0], args.workers, self.collate, pin=pin, keep=True),
            self.validation_loader(sources.validation, card, orders[1], pin),
        )

    def validation_loader(self, source: Any, card: Card, order: Sampler, pin: bool) -> DataLoader:
        """Batches of validation images, as they are, in this order."""
        self.card = card
        return loader(Samples(source, v2.ToPureTensor(), 0, 0), order, self.args.workers, listed, pin=pin)

    @abstractmethod
    def read_validation(self, card: Card) -> Source:
        """The validation images of ``args.data`` with the classes of a checkpoint.

        Raises:
            CommandError: something is missing, broken, or of other classes.
        """

    detailed = False  # whether `evaluate` keeps details, for the command that validates
    details: list[list[str]]  # a line on each class, for each model that `evaluate` has seen

    @abstractmethod
    def drawn(
        self, model: nn.Module, image: Tensor, amp: torch.dtype | None, threshold: float | None
    ) -> tuple[Tensor, list[str]]:
        """What is found in an image, uint8 (3, H, W), drawn on it, and in lines.

        Args:
            model: in evaluation mode.
            image: on its device.
            amp: the dtype of autocast, or None.
            threshold: lowest score of what is shown, where there are scores.
        """

    @abstractmethod
    def drawn_truth(self, image: Tensor, target: Any) -> Tensor:
        """A target, as a source of images loads it, drawn on its image, uint8 (3, H, W), as `drawn` does it."""

    def make_model(self, sources: Sources, fresh: bool) -> tuple[nn.Module, Card]:
        args = self.args
        torch.manual_seed(args.seed)
        card = self.make_card(sources)
        whole = None
        backbone: dict[str, Any] = {"pretrained": bool(args.pretrained and fresh)}
        if args.weights is not None and fresh:
            file = find_weights(args.weights)
            theirs = read_card(file)
            if theirs is not None and theirs.task == self.name:
                whole = file
            elif theirs is not None and theirs.task != "classification":
                raise UsageError(f"--weights {args.weights} is for {theirs.task}, not for {self.name}")
            elif args.model.startswith("groupmamba"):
                backbone["weights"] = file
            else:
                backbone.update(pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        model = built(type(self), card, drop_path=args.drop_path, **backbone)
        part, size = self.images_of(model)
        check_images(part, args.model, size)
        if whole is not None:
            for line in load_whole(model, whole, self.heads):
                self.screen.say(line)
        if args.grad_checkpointing:
            able = [part for part in model.modules() if hasattr(part, "set_grad_checkpointing")]
            if not able:
                raise UsageError(f"--grad-checkpointing: {args.model} does not have it")
            able[0].set_grad_checkpointing(True)
        return model, card

    def plan(self, steps: int) -> Plan:
        args = self.args
        total = args.steps or args.epochs * steps
        warmup = args.warmup_steps
        if warmup >= total and warmup != self.command.options["warmup_steps"].default:
            raise UsageError(f"--warmup-steps {warmup} must be fewer than the {total} steps of the run")
        if warmup > total // SHARE_OF_WARMUP and warmup == self.command.options["warmup_steps"].default:
            warmup = total // SHARE_OF_WARMUP
            self.screen.say(f"warm-up: {warmup} of {total} steps in place of the recipe's {args.warmup_steps}")
        return Plan(total, warmup, total, after_warmup=False, options=self.schedule(total))

    def schedule(self, total: int) -> Mapping[str, Any]:
        """More arguments of timm's scheduler, in a run of ``total`` steps."""
        return {}


def built(task: type[DenseTask], card: Card, **options: Any) -> nn.Module:
    """As :meth:`DenseTask.build`.

    Raises:
        UsageError: there is no such backbone, or it does not take an option.
        CommandError: its weights can't be had or do not fit.
    """
    return made(card.model, lambda: task.build(card, **options))


def load_whole(model: nn.Module, file: Path, heads: Sequence[str]) -> list[str]:
    """Loads a checkpoint of the same task strictly; ``heads`` for other classes keep their values. What is said of it.

    Raises:
        CommandError: the file can't be read or does not fit.
    """
    state, ours = read_weights(file), model.state_dict()
    other = [name for name in state if name in ours and ours[name].shape != state[name].shape]
    problems = {
        "Missing keys": [name for name in ours if name not in state],
        "Unexpected keys": [name for name in state if name not in ours],
        "Wrong shapes": [name for name in other if not name.startswith(tuple(heads))],
    }
    texts = [f"{title}: {', '.join(names[:SHOWN])}" for title, names in problems.items() if names]
    if texts:
        raise CommandError(f"{file} does not fit the model. {'; '.join(texts)}")
    model.load_state_dict({**state, **{name: ours[name] for name in other}})
    if not other:
        return []
    return [f"the checkpoint is for other classes: {', '.join(other)} keep their initial values"]


def dense_model_of(file: Path, card: Card, task: type[DenseTask]) -> nn.Module:
    """The model of a checkpoint of a dense task, in evaluation mode.

    Raises:
        CommandError: the file can't be read or does not fit.
    """
    model = built(task, card)
    load_whole(model, file, ())
    return model.eval()


def task_arguments(task: type[DenseTask], card: Card, given: Mapping[str, Any]) -> argparse.Namespace:
    """Options for a checkpoint, beside those that were ``given``."""
    from groupmamba.training import options

    known = {"model": card.model, "model_kwargs": dict(card.model_kwargs), **task.arguments(card)}
    return options.complete({**known, **{name: v for name, v in given.items() if v is not None}}, command=task.command)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours for so many classes, neighbours far apart: hues by the golden ratio, in three brightnesses."""
    found = []
    for i in range(count):
        color = colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85, (1.0, 0.75, 0.55)[i % 3])
        found.append(tuple(round(255 * value) for value in color))
    return found
