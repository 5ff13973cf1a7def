# SPDX-License-Identifier: Apache-2.0
"""Classification, the task of ``groupmamba train``: classes of images, with or without a teacher."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from groupmamba.training import teacher
from groupmamba.training.card import Card, check_classifier, create_model, find_weights, load, read_card
from groupmamba.training.data import (
    BadImages,
    Batch,
    Folder,
    Images,
    loader,
    training_transform,
    validation_folder,
    validation_transform,
)
from groupmamba.training.distillation import DistillationLoss
from groupmamba.training.distributed import Processes
from groupmamba.training.evaluate import accuracies
from groupmamba.training.option_table import TRAIN
from groupmamba.training.output import Panel, Screen
from groupmamba.training.pixels import Normalize
from groupmamba.training.seeds import seeded
from groupmamba.training.step import Plan
from groupmamba.training.task import Sources, Task
from groupmamba_ext._command import CommandError, UsageError


class Classification(Task):
    """Folders of images, timm's transforms, top-1 accuracy."""

    name = "classification"
    command = TRAIN
    metrics = ("loss", "top1", "top5")
    best = "top1"
    panels = (
        Panel("loss", {"train_loss": "training", "eval_loss": "validation", "ema_loss": "moving average"}),
        Panel("top-1 accuracy, %", {"eval_top1": "model", "ema_top1": "moving average"}),
    )

    def __init__(self, args: argparse.Namespace, processes: Processes, device: torch.device, screen: Screen):
        super().__init__(args, processes, device, screen)
        self.mixup: Any = None
        self.normalize: Normalize | None = None

    def check(self) -> None:
        path = self.args.kd_model_path
        if path is not None:
            if not Path(path).is_file():
                raise CommandError(f"--kd-model-path {path} is no file")
            self.args.kd_model_path = os.path.abspath(path)

    def read(self) -> Sources:
        data, expected = Path(self.args.data), self.args.num_classes
        validation = validation_folder(data)
        training = Folder(data / "train")
        if expected not in (None, len(training.classes)):
            raise CommandError(f"--num-classes {expected}: {training.root} holds {len(training.classes)} classes")
        if len(training.classes) < 2:
            raise CommandError(f"{training.root} holds one class, {training.classes[0]}; there must be two at least")
        return Sources(training, Folder(validation, training.classes))

    @property
    def even_batches(self) -> bool:
        return bool(self.args.mixup or self.args.cutmix)  # timm pairs image i with image n - 1 - i

    def make_model(self, sources: Sources, fresh: bool) -> tuple[nn.Module, Card]:
        args, classes = self.args, sources.training.classes
        torch.manual_seed(args.seed)
        options: dict[str, Any] = {"drop_path_rate": args.drop_path} if args.drop_path else {}
        if args.drop:
            options["drop_rate"] = args.drop
        options.update(args.model_kwargs or {})
        model = create_model(args.model, pretrained=args.pretrained and fresh, num_classes=len(classes), **options)
        check_classifier(model, args.model, args.img_size, len(classes))
        if args.weights is not None and fresh:
            file = find_weights(args.weights)
            theirs = read_card(file)
            if theirs is not None and theirs.task != self.name:
                raise UsageError(f"--weights {args.weights} is for {theirs.task}, not for {self.name}")
            for line in load(model, file):
                self.screen.say(line)
        if args.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise UsageError(f"--grad-checkpointing: {args.model} does not have it")
            model.set_grad_checkpointing(True)
        cfg = getattr(model, "pretrained_cfg", None) or {}
        card = Card(
            args.model,
            len(classes),
            dict(args.model_kwargs or {}),
            classes,
            img_size=args.img_size,
            crop_pct=args.crop_pct,
            interpolation=args.interpolation,
        )
        card.mean, card.std = tuple(cfg.get("mean", card.mean)), tuple(cfg.get("std", card.std))
        return model, card

    def make_loaders(
        self, sources: Sources, card: Card, orders: tuple[Sampler, Sampler], pin: bool
    ) -> tuple[DataLoader, DataLoader]:
        args = self.args
        transform = training_transform(args, card.mean, card.std)
        images = Images(sources.training, transform, args.seed, args.max_bad_images, args.img_size)
        check = validation_transform(args.img_size, card)
        held_out = Images(sources.validation, check, args.seed, 0, args.img_size)
        self.mixup, self.normalize = mixup(args, card.num_classes), Normalize(card.mean, card.std, self.device)
        return (
            loader(images, orders[0], args.workers, pin=pin, keep=True),
            loader(held_out, orders[1], args.workers, pin=pin),
        )

    def make_criterion(self, model: nn.Module, card: Card) -> DistillationLoss:
        args = self.args
        labels = label_loss(args, self.mixup is not None)
        assert card.classes is not None
        name = teacher.wanted(args, card.num_classes, model, self.screen.say)
        if name is None:
            args.no_kd, args.kd_model_name, args.kd_model_path = True, None, None
            return DistillationLoss(labels, None, kind="none")
        model.set_distilled_training(True)
        knows = teacher.build(name, args.kd_model_path, card.num_classes, card.classes, card.mean, card.std)
        knows.to(self.device).to(memory_format=torch.channels_last)
        return DistillationLoss(
            labels, knows, kind=args.kd_token_distill_type, alpha=1 - args.task_loss_weight, tau=args.kd_temperature
        )

    def plan(self, steps: int) -> Plan:
        args = self.args
        warmup = args.warmup_epochs * steps
        total = args.epochs * steps + (warmup if args.warmup_prefix else 0)
        return Plan(total, warmup, total - warmup, after_warmup=True)

    def begin_epoch(self, epoch: int) -> None:
        if self.mixup is not None and self.args.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.args.mixup_off_epoch

    def to_device(self, batch: Batch) -> tuple[Any, Any]:
        assert self.normalize is not None
        return self.normalize(batch.images.to(self.device)), batch.labels.to(self.device, non_blocking=True)

    def mixed(self, batch: tuple[Any, Any], step: int, piece: int) -> tuple[Any, Any]:
        if self.mixup is None:
            return batch
        with seeded(self.args.seed, "mixup", step, piece, self.processes.rank):
            return self.mixup(*batch)

    def evaluate(
        self, models: Sequence[nn.Module], batches: DataLoader, amp: torch.dtype | None, bad: BadImages
    ) -> list[dict[str, float]]:
        assert self.normalize is not None
        found = accuracies(models, batches, self.normalize, self.device, amp, bad, self.processes)
        return [{name: getattr(result, name) for name in self.metrics} for result in found]

    def words(self, values: dict[str, float]) -> str:
        return f"top-1 {values['top1']:.2f}%"


def mixup(args: argparse.Namespace, num_classes: int) -> Any:
    """timm's Mixup, or None."""
    if not (args.mixup > 0 or args.cutmix > 0):
        return None
    from timm.data import Mixup

    return Mixup(
        args.mixup,
        args.cutmix,
        None,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def label_loss(args: argparse.Namespace, mixed: bool) -> nn.Module:
    """The loss by labels, as timm chooses it."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()
