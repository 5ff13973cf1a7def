# SPDX-License-Identifier: Apache-2.0
"""Images and their classes as segmenters are trained with them: torchvision's transforms, and two that it lacks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from groupmamba.training.segmentation.dataset import IGNORE

LONGEST = 4  # times the shorter side: 2048 beside 512, as the recipe's img_scale
TRIES = 10
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 180  # mmsegmentation's PhotoMetricDistortion


def size_of(height: int, width: int, short_side: float) -> tuple[int, int]:
    """(height, width) with ``short_side`` pixels of the shorter side, or fewer where the longer one would have more
    than `LONGEST` times as many; never without a pixel."""
    factor = min(short_side / min(height, width), LONGEST * short_side / max(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


class RandomRescale(v2.Transform):
    """Resizes so that the shorter side has ``short_side`` times a random factor of pixels, by :func:`size_of`."""

    def __init__(self, short_side: int, scale: Sequence[float]):
        super().__init__()
        self.short_side, self.scale = short_side, tuple(scale)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        return {"size": list(size_of(height, width, self.short_side * factor))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"], antialias=True)


class VariedCrop(v2.Transform):
    """A random crop, another one (up to ten times) where one class has more than ``max_share`` of its labelled pixels.

    Images that are smaller are padded at the right and the bottom first, without a class.
    """

    def __init__(self, size: int, max_share: float, fill: Sequence[float]):
        super().__init__()
        self.size, self.max_share, self.fill = size, max_share, [float(value) for value in fill]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        mask = next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        room = max(height - self.size, 0), max(width - self.size, 0)
        top = left = 0
        for _ in range(TRIES):
            top, left = (int(torch.randint(0, most + 1, ()).item()) for most in room)
            labels = mask[..., top : top + self.size, left : left + self.size]
            labels = labels[labels != IGNORE]
            if labels.numel() == 0:
                continue
            counts = torch.bincount(labels.flatten())
            if counts.max() <= self.max_share * counts.sum():
                break
        return {"top": top, "left": left}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        padding = [0, 0, max(self.size - width, 0), max(self.size - height, 0)]
        fill = float(IGNORE) if isinstance(inpt, tv_tensors.Mask) else self.fill
        return F.crop(F.pad(inpt, padding, fill=fill), params["top"], params["left"], self.size, self.size)


def training_transform(args: argparse.Namespace, mean: Sequence[float]) -> v2.Transform:
    """Image and classes to a crop of ``args.img_size``: uint8 (3, S, S) and int32 (S, S)."""
    fill = [255 * value for value in mean]
    if args.no_aug:
        steps: list[v2.Transform] = [RandomRescale(args.img_size, (1, 1)), _CentreCrop(args.img_size, 1.0, fill)]
    else:
        jitters = (
            v2.ColorJitter(brightness=BRIGHTNESS),
            v2.ColorJitter(contrast=CONTRAST),
            v2.ColorJitter(saturation=SATURATION),
            v2.ColorJitter(hue=HUE),
        )
        steps = [
            RandomRescale(args.short_side, args.scale),
            VariedCrop(args.img_size, args.max_class_share, fill),
            v2.RandomHorizontalFlip(args.hflip),
            *(v2.RandomApply([jitter], p=args.color_jitter) for jitter in jitters),
        ]
    return v2.Compose([*steps, v2.ToPureTensor()])


class _CentreCrop(VariedCrop):
    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"top": max(height - self.size, 0) // 2, "left": max(width - self.size, 0) // 2}
