# SPDX-License-Identifier: Apache-2.0
"""UPerNet's training on ADE20K and folders like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.utils import draw_segmentation_masks

from groupmamba.training.card import Card
from groupmamba.training.data import BadImages, Batch
from groupmamba.training.dense import DenseTask, palette
from groupmamba.training.output import Panel
from groupmamba.training.samples import stacked
from groupmamba.training.segmentation.command import SCALES, SEGMENTER
from groupmamba.training.segmentation.dataset import (
    IGNORE,
    TRAINING_NAMES,
    VALIDATION_NAMES,
    LabelledImages,
    class_names,
    settle_classes,
    unnamed,
)
from groupmamba.training.segmentation.inference import Testing, normalised, segment
from groupmamba.training.segmentation.transforms import training_transform
from groupmamba.training.task import Source, Sources
from groupmamba_ext._command import CommandError

_IN_CARD = ("short_side", "decoder_channels", "reduce_zero_label", "window", "stride")


class PixelLoss(nn.Module):
    """Cross-entropy, the sum over pixels with a class divided by the number of all, as mmsegmentation has it: a batch
    without a class has a loss of 0, not of nan."""

    def forward(self, images: Tensor, logits: Tensor, classes: Tensor) -> Tensor:
        """``logits`` (batch, K, H, W), ``classes`` int64 (batch, H, W); a scalar."""
        return F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="sum") / classes.numel()


class Segmentation(DenseTask):
    """Images and label images, torchvision's transforms, mean intersection over union."""

    name = "segmentation"
    command = SEGMENTER
    collate = staticmethod(stacked)
    metrics = ("miou", "accuracy")
    best = "miou"
    panels = (
        Panel("loss", {"train_loss": "training"}),
        Panel("mean IoU, %", {"eval_miou": "model", "ema_miou": "moving average"}),
        Panel("pixel accuracy, %", {"eval_accuracy": "model", "ema_accuracy": "moving average"}),
    )
    heads = ("segmentation_head.",)

    def read(self) -> Sources:
        data, zero = Path(self.args.data), self.args.reduce_zero_label
        training = LabelledImages(data, TRAINING_NAMES, zero)
        validation = LabelledImages(data, VALIDATION_NAMES, zero)
        training.classes = settle_classes(data, training, self.args.num_classes, self.screen.say)
        if len(training.classes) < 2:
            raise CommandError(f"{data} has one class, {training.classes[0]}; there must be two at least")
        validation.classes = training.classes
        for images in (training, validation):
            if alone := images.labels_alone:
                self.screen.say(f"label images without an image are left out: {len(alone)}, such as {alone[0]}")
        # A run would come upon what is wrong there after a tenth of its steps.
        if not validation.check():
            self.screen.say(f"no pixel of {validation.root} has a class: validation measures nothing")
        if zero:
            self.screen.say("0 in label images is no class; --no-reduce-zero-label makes it one")
        return Sources(training, validation)

    def read_validation(self, card: Card) -> Source:
        data = Path(self.args.data)
        validation = LabelledImages(data, VALIDATION_NAMES, self.args.reduce_zero_label)
        assert card.classes is not None
        named, nameless = class_names(data), card.classes == unnamed(card.num_classes)
        if named is not None and (len(named) != card.num_classes or (named != card.classes and not nameless)):
            raise CommandError(
                f"{data} names {len(named)} classes, {', '.join(named[:3])}, ..., and the checkpoint knows "
                f"{card.num_classes}, {', '.join(card.classes[:3])}, ..."
            )
        validation.classes = card.classes
        return validation

    def make_card(self, sources: Sources) -> Card:
        args, classes = self.args, sources.training.classes
        options = {name: getattr(args, name) for name in _IN_CARD}
        kwargs = dict(args.model_kwargs or {})
        return Card(args.model, len(classes), kwargs, classes, self.name, img_size=args.img_size, options=options)

    @classmethod
    def arguments(cls, card: Card) -> dict[str, Any]:
        return {**card.options, "img_size": card.img_size}

    @classmethod
    def build(cls, card: Card, *, drop_path: float = 0.0, **backbone: Any) -> nn.Module:
        from groupmamba.vision import upernet

        options = {"drop_path_rate": drop_path} if drop_path else {}
        if "pretrained_cfg_overlay" in backbone:
            options["pretrained_cfg_overlay"] = backbone.pop("pretrained_cfg_overlay")
        return upernet(
            card.model,
            card.num_classes,
            decoder_channels=card.options["decoder_channels"],
            backbone_options={**options, **card.model_kwargs},
            **backbone,
        )

    def images_of(self, model: nn.Module) -> tuple[nn.Module, tuple[int, int]]:
        return model, (self.args.img_size, self.args.img_size)

    def training_transform(self, card: Card) -> Callable[[Any, Any], tuple[Any, Any]]:
        return training_transform(self.args, card.mean)

    def make_criterion(self, model: nn.Module, card: Card) -> nn.Module:
        return PixelLoss()

    def schedule(self, total: int) -> Mapping[str, Any]:
        return {"power": self.args.sched_power} if self.args.sched == "poly" else {}

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        values = normalised(images.float() / 255, self.card.mean, self.card.std)
        return values, batch.labels.to(self.device, non_blocking=True).long()

    def testing(self) -> Testing:
        """How validation and prediction see images."""
        args, card = self.args, self.card
        return Testing(
            args.img_size,
            args.stride if args.window == "slide" else None,
            args.short_side,
            SCALES if args.multi_scale else (1.0,),
            args.multi_scale,
            args.validation_batch_size or args.batch_size,
            card.mean,
            card.std,
        )

    def evaluate(
        self, models: Sequence[nn.Module], batches: DataLoader, amp: torch.dtype | None, bad: BadImages
    ) -> list[dict[str, float]]:
        count, testing = self.card.num_classes, self.testing()
        found: list[MetricCollection] = []
        for model in models:
            model.eval()
            options: dict[str, Any] = {"num_classes": count, "ignore_index": IGNORE}
            metric = MetricCollection(
                {
                    "miou": MulticlassJaccardIndex(average="macro", **options),
                    "accuracy": MulticlassAccuracy(average="micro", **options),
                    "classes": MulticlassJaccardIndex(average="none", zero_division=float("nan"), **options),
                }
            )
            found.append(metric.to(self.device))
        for batch in batches:
            bad.add(batch.bad)
            images = [image.to(self.device, non_blocking=True) for image in batch.images]
            for model, metric in zip(models, found, strict=True):
                for classes, truth in zip(segment(model, images, testing, amp), batch.labels, strict=True):
                    metric.update(classes[None], truth.to(self.device, non_blocking=True).long()[None])
        values = [metric.compute() for metric in found]
        self.details = [self._per_class(value["classes"].tolist()) for value in values]
        return [{name: 100 * float(value[name]) for name in self.metrics} for value in values]

    def _per_class(self, values: list[float]) -> list[str]:
        names = self.card.classes or []
        texts = ["absent" if value != value else f"{100 * value:.1f}%" for value in values]
        return [f"{name:<24} {text:>7}" for name, text in zip(names, texts, strict=False)]

    def drawn(
        self, model: nn.Module, image: Tensor, amp: torch.dtype | None, threshold: float | None
    ) -> tuple[Tensor, list[str]]:
        (classes,) = segment(model, [image], self.testing(), amp)
        counts = torch.bincount(classes.flatten(), minlength=self.card.num_classes).cpu()
        names = self.card.classes or []
        lines = [
            f"{names[index]:<24} {100 * counts[index].item() / classes.numel():5.1f}% of the pixels"
            for index in counts.argsort(descending=True).tolist()
            if counts[index]
        ]
        return draw_classes(image.cpu(), classes.cpu(), self.card.num_classes), lines

    def drawn_truth(self, image: Tensor, target: Any) -> Tensor:
        return draw_classes(image, target.as_subclass(Tensor), self.card.num_classes)

    def words(self, values: dict[str, float]) -> str:
        return f"mean IoU {values['miou']:.2f}%"


def draw_classes(image: Tensor, classes: Tensor, count: int) -> Tensor:
    """Classes (H, W) of pixels as colours on an image, uint8 (3, H, W), by torchvision; both on the CPU."""
    present = [index for index in classes.unique().tolist() if index != IGNORE]
    masks = torch.stack([classes == index for index in present]) if present else torch.zeros(0, *classes.shape).bool()
    colors = palette(count)
    return draw_segmentation_masks(image, masks, alpha=0.6, colors=[colors[index] for index in present])
