# SPDX-License-Identifier: Apache-2.0
"""The teacher of a run: which one, with its own number of classes, and how it sees the student's images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupmamba.training.card import create_model, model_of, read_card
from groupmamba.training.recipe import TEACHER, TEACHER_CLASSES
from groupmamba_ext._command import CommandError, UsageError, one_line


class Teacher(nn.Module):
    """A frozen model that takes images normalised for the student.

    Whether its own normalisation differs is settled here, once: the forward compares nothing and reads nothing back.

    Args:
        model: images to (batch, classes) logits.
        mean, std: normalisation that the images have.
        own_mean, own_std: normalisation that the model expects.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        own_mean: Sequence[float],
        own_std: Sequence[float],
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.same = tuple(mean) == tuple(own_mean) and tuple(std) == tuple(own_std)
        shape = (1, -1, 1, 1)
        ours, theirs = torch.tensor([mean, std]), torch.tensor([own_mean, own_std])
        self.register_buffer("scale", (ours[1] / theirs[1]).view(shape), persistent=False)
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(shape), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images if self.same else images * self.scale + self.shift)


def wanted(args: argparse.Namespace, num_classes: int, student: nn.Module, say: Callable[[str], None]) -> str | None:
    """The teacher's name, ``""`` where its file is to name it, or None for no distillation, said in one line.

    Raises:
        CommandError: a teacher was named explicitly and the student can't learn from one.
    """
    if args.no_kd:
        return None
    explicit = args.kd_model_name is not None or args.kd_model_path is not None
    if not (hasattr(student, "set_distilled_training") and getattr(student, "distillation", True)):
        if explicit:
            raise CommandError(f"a teacher was named, and {args.model} has no distillation head")
        say(f"without distillation: {args.model} has no distillation head")
        return None
    if explicit:
        return args.kd_model_name or ""
    if num_classes != TEACHER_CLASSES:
        say(
            f"without distillation: the recipe's teacher {TEACHER} knows {TEACHER_CLASSES:,} classes, not "
            f"{num_classes:,}; name one by --kd-model-name or --kd-model-path"
        )
        return None
    return TEACHER


def build(
    name: str, path: str | None, num_classes: int, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Teacher:
    """The teacher, with its weights.

    Args:
        name: of timm or this project; ``""``: what the file at ``path`` says, or else the recipe's.
        path: its checkpoint; None for timm's own weights.
        num_classes, classes: of the student, which the teacher must have by itself.
        mean, std: normalisation of the student's images.

    Raises:
        CommandError: the teacher can't be had or does not fit.
    """
    known: Sequence[str] | None = None
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise CommandError(f"--kd-model-path {path} is no file")
        says = read_card(file)
        model, card = model_of(file, name or (None if says is not None else TEACHER))
        if card.task != "classification":
            raise CommandError(f"--kd-model-path {path} is for {card.task}, not for classification")
        known, count, own = card.classes, card.num_classes, (card.mean, card.std)
        name = card.model
    else:
        try:
            model = create_model(name, "--kd-model-name", pretrained=True)
        except UsageError:
            raise
        except Exception as error:  # whatever a network does
            raise CommandError(
                f"the teacher {name} can't be had ({type(error).__name__}: {one_line(error)[:120]}): give its file by "
                f"--kd-model-path, or train without one by --no-kd"
            ) from error
        cfg: Any = model.pretrained_cfg
        count, own = int(model.num_classes), (cfg["mean"], cfg["std"])  # type: ignore[arg-type]
    if count != num_classes:
        raise CommandError(f"the teacher {name} knows {count:,} classes and the student {num_classes:,}")
    if known is not None and list(known) != list(classes):
        raise CommandError(
            f"the teacher {name} knows other classes than the student: {', '.join(known[:3])}... and "
            f"{', '.join(classes[:3])}..."
        )
    return Teacher(model, mean, std, *own)
