# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN's training on COCO and data in its format."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from groupmamba.training.card import Card
from groupmamba.training.data import BadImages, Batch
from groupmamba.training.dense import DenseTask, palette
from groupmamba.training.detection.annotations import TRAINING_NAMES, VALIDATION_NAMES, find_split
from groupmamba.training.detection.coco import Objects
from groupmamba.training.detection.command import DETECTOR
from groupmamba.training.detection.transforms import TrainingTransform
from groupmamba.training.distributed import Processes
from groupmamba.training.output import Panel, Screen
from groupmamba.training.samples import listed
from groupmamba.training.step import Step
from groupmamba.training.task import Source, Sources
from groupmamba_ext._command import CommandError

KINDS = {"bbox": "box", "segm": "mask"}  # of COCO's evaluation, and their names here
FIGURES = {"map": "map", "map_50": "map50", "map_75": "map75"}  # torchmetrics' names, and those here
SURE = 0.5  # from which a mask's value on a pixel is of the object


class DetectionStep(Step):
    """A step of a model that computes its losses itself: targets go into it, and the criterion sums up what comes."""

    def _loss(self, images: Any, labels: Any) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None, cache_enabled=False):
            return self.criterion(self.model(images, labels))


class SumOfLosses(nn.Module):
    """The losses of torchvision's detectors, each with the weight 1, as they are meant."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([loss.float() for loss in losses.values()]).sum()


class Detection(DenseTask):
    """Annotations in COCO's format, torchvision's transforms and detectors, mean average precision."""

    name = "detection"
    command = DETECTOR
    collate = staticmethod(listed)
    no_graph = "images differ in size"
    graphed = "backbone"
    step = DetectionStep
    heads = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

    def __init__(self, args: argparse.Namespace, processes: Processes, device: torch.device, screen: Screen):
        super().__init__(args, processes, device, screen)
        self._measure(not args.no_masks)

    def _measure(self, masks: bool) -> None:
        self.masks = masks
        kinds = tuple(KINDS.values()) if masks else (KINDS["bbox"],)
        self.metrics = tuple(f"{kind}_{figure}" for kind in kinds for figure in FIGURES.values())
        self.best = f"{kinds[-1]}_map"
        self.panels = (
            Panel("loss", {"train_loss": "training"}),
            *(
                Panel(f"{kind} mAP, %", {f"eval_{kind}_map": "model", f"ema_{kind}_map": "moving average"})
                for kind in kinds
            ),
        )

    def _split(self, names: Sequence[str], which: str) -> Any:
        args = self.args
        annotations, images = getattr(args, f"{which}_annotations"), getattr(args, f"{which}_images")
        return find_split(Path(args.data), names, which, annotations, images)

    def read(self) -> Sources:
        args, say = self.args, self.screen.say
        splits = self._split(TRAINING_NAMES, "train"), self._split(VALIDATION_NAMES, "val")
        training = Objects(splits[0], crowds=False, empty=args.empty_images, say=say)
        validation = Objects(splits[1], categories=training.category_ids, crowds=True, empty=True, say=say)
        _check_names(splits[1].annotations, validation.classes, training.classes, str(splits[0].annotations))
        self._say_if_empty(validation)
        masks = not args.no_masks and (training.has_masks or validation.has_masks)
        if not masks and not args.no_masks:
            say("the annotations have no masks: boxes alone, by Faster R-CNN")
        for source in (training, validation):
            source.use_masks(masks)
        self._measure(masks)
        return Sources(training, validation)

    def _say_if_empty(self, validation: Objects) -> None:
        if not validation.has_objects:
            self.screen.say(f"{validation.split.annotations} has no object: validation measures nothing")

    def read_validation(self, card: Card) -> Source:
        ids, split = card.options["category_ids"], self._split(VALIDATION_NAMES, "val")
        validation = Objects(split, categories=ids, crowds=True, empty=True, say=self.screen.say)
        _check_names(split.annotations, validation.classes, card.classes or [], "the checkpoint")
        self._say_if_empty(validation)
        masks = card.options["masks"] and validation.has_masks
        validation.use_masks(masks)
        self._measure(masks)
        return validation

    def make_card(self, sources: Sources) -> Card:
        args, training = self.args, sources.training
        assert isinstance(training, Objects)
        options = {
            "masks": self.masks,
            "category_ids": training.category_ids,
            "min_size": list(args.min_size),
            "max_size": args.max_size,
            "detector_kwargs": dict(args.detector_kwargs or {}),
        }
        kwargs = dict(args.model_kwargs or {})
        return Card(args.model, len(training.classes), kwargs, training.classes, self.name, options=options)

    @classmethod
    def arguments(cls, card: Card) -> dict[str, Any]:
        options = card.options
        return {
            "no_masks": not options["masks"],
            "min_size": tuple(options["min_size"]),
            "max_size": options["max_size"],
            "detector_kwargs": dict(options["detector_kwargs"]),
        }

    @classmethod
    def build(cls, card: Card, *, drop_path: float = 0.0, **backbone: Any) -> nn.Module:
        from groupmamba.vision import faster_rcnn, mask_rcnn

        options = {"drop_path_rate": drop_path} if drop_path else {}
        if "pretrained_cfg_overlay" in backbone:
            options["pretrained_cfg_overlay"] = backbone.pop("pretrained_cfg_overlay")
        make = mask_rcnn if card.options["masks"] else faster_rcnn
        return make(
            card.model,
            card.num_classes + 1,
            min_size=tuple(card.options["min_size"]),
            max_size=card.options["max_size"],
            image_mean=list(card.mean),
            image_std=list(card.std),
            backbone_options={**options, **card.model_kwargs},
            **card.options["detector_kwargs"],
            **backbone,
        )

    def images_of(self, model: nn.Module) -> tuple[nn.Module, tuple[int, int]]:
        height, width = (-(-side // 32) * 32 for side in (self.args.min_size[-1], self.args.max_size))
        return model.get_submodule("backbone"), (height, width)

    def training_transform(self, card: Card) -> Callable[[Any, Any], tuple[Any, Any]]:
        return TrainingTransform(self.args)

    def make_criterion(self, model: nn.Module, card: Card) -> nn.Module:
        return SumOfLosses()

    def schedule(self, total: int) -> Mapping[str, Any]:
        args = self.args
        if args.sched == "multistep":
            # timm's milestone m is the step m - 1
            return {"decay_t": [round(part * total) + 1 for part in args.decay_at], "decay_rate": args.decay_rate}
        return {"power": args.sched_power} if args.sched == "poly" else {}

    def to_device(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        images = [image.to(self.device, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            {name: value.to(self.device, non_blocking=True) for name, value in target.items()}
            for target in batch.labels
        ]
        return images, targets

    def evaluate(
        self, models: Sequence[nn.Module], batches: DataLoader, amp: torch.dtype | None, bad: BadImages
    ) -> list[dict[str, float]]:
        kinds = tuple(KINDS) if self.masks else ("bbox",)
        found = []
        for model in models:
            model.eval()
            # torchmetrics can't gather lists of which processes have more or fewer images.
            metric = MeanAveragePrecision(iou_type=kinds, class_metrics=self.detailed, sync_on_compute=False)
            metric.warn_on_many_detections = False
            found.append(metric)
        for batch in batches:
            bad.add(batch.bad)
            if not batch.images:
                continue
            images = [image.to(self.device, non_blocking=True).float() / 255 for image in batch.images]
            targets = [
                {**target, **({"masks": target["masks"].bool()} if self.masks else {})} for target in batch.labels
            ]
            for model, metric in zip(models, found, strict=True):
                metric.update(_on_cpu(detect(model, images, amp)), targets)
        for metric in found:
            for name, values in metric.metric_state.items():
                setattr(metric, name, self.processes.interleaved(values))
        results = [metric.compute() for metric in found]
        self.details = [self._per_class(value) if self.detailed else [] for value in results]
        return [self._named(value) for value in results]

    def _named(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        named = {}
        for kind, ours in KINDS.items():
            for figure, short in FIGURES.items():
                value = values.get(f"{kind}_{figure}", values.get(figure) if kind == "bbox" else None)
                if f"{ours}_{short}" in self.metrics and value is not None:
                    named[f"{ours}_{short}"] = 100 * float(value) if value >= 0 else float("nan")  # -1: no object
        return named

    def _per_class(self, values: Mapping[str, Tensor]) -> list[str]:
        lines = []
        seen = values["classes"].reshape(-1).tolist()
        keys = [f"{kind}_map_per_class" for kind in KINDS if f"{kind}_map_per_class" in values] or ["map_per_class"]
        columns = [values[key].reshape(-1).tolist() for key in keys]
        for row, label in enumerate(seen):
            texts = ["absent" if column[row] < 0 else f"{100 * column[row]:.1f}%" for column in columns]
            lines.append(f"{(self.card.classes or [])[label - 1]:<24} " + " ".join(f"{text:>7}" for text in texts))
        return lines

    def drawn(
        self, model: nn.Module, image: Tensor, amp: torch.dtype | None, threshold: float | None
    ) -> tuple[Tensor, list[str]]:
        (found,) = detect(model, [image.float() / 255], amp)
        sure = found["scores"] >= (SURE if threshold is None else threshold)
        found = {name: values[sure].cpu() for name, values in found.items()}
        classes = self.card.classes or []
        names = [classes[label - 1] for label in found["labels"].tolist()]
        lines = [
            f"{name:<24} {100 * score:5.1f}%  x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}"
            for name, score, (x0, y0, x1, y1) in zip(
                names, found["scores"].tolist(), found["boxes"].tolist(), strict=True
            )
        ]
        return draw_objects(image.cpu(), found, names, len(classes)), lines or ["nothing"]

    def drawn_truth(self, image: Tensor, target: Any) -> Tensor:
        classes = self.card.classes or []
        found = {name: values.as_subclass(Tensor) for name, values in target.items()}
        return draw_objects(image, found, [classes[label - 1] for label in found["labels"].tolist()], len(classes))

    def words(self, values: dict[str, float]) -> str:
        kinds = [kind for kind in KINDS.values() if f"{kind}_map" in self.metrics]
        return ", ".join(f"{kind} mAP {values[f'{kind}_map']:.2f}%" for kind in kinds)


def _check_names(file: Path, names: Sequence[str], known: Sequence[str], whose: str) -> None:
    """CommandError where a file gives a category another name than ``known`` of the same id; what it does not name
    has the name "category ID"."""
    for theirs, ours in zip(names, known, strict=True):
        if ours != theirs and not theirs.startswith("category "):
            raise CommandError(f"{file} calls a category {theirs}, which {whose} calls {ours}")


def _on_cpu(results: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value.cpu() for name, value in result.items()} for result in results]


def draw_objects(image: Tensor, found: Mapping[str, Tensor], names: Sequence[str], classes: int) -> Tensor:
    """Masks and boxes with their names on an image, uint8 (3, H, W), by torchvision, a colour for each class.

    Args:
        image: on the CPU.
        found: ``boxes``, ``labels`` from 1 on, and perhaps ``masks``.
        names: a text for each box.
        classes: how many there are.
    """
    colors = palette(classes)
    chosen = [colors[label - 1] for label in found["labels"].tolist()]
    if not chosen:
        return image
    if "masks" in found:
        image = draw_segmentation_masks(image, found["masks"].bool(), alpha=0.5, colors=chosen)
    boxes = found["boxes"].clone()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    return draw_bounding_boxes(image, boxes, list(names), chosen, width=2)


@torch.no_grad()
def detect(model: nn.Module, images: Sequence[Tensor], amp: torch.dtype | None) -> list[dict[str, Tensor]]:
    """Of each image (3, H, W) in [0, 1] float ``boxes`` (N, 4) as XYXY, ``scores`` and ``labels``, and of a model with
    masks bool ``masks`` (N, H, W)."""
    with torch.autocast(images[0].device.type, amp, enabled=amp is not None):
        found = model(list(images))
    for result in found:
        result["boxes"], result["scores"] = result["boxes"].float(), result["scores"].float()
        if "masks" in result:
            result["masks"] = result["masks"][:, 0] >= SURE
    return found
