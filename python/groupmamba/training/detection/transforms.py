# SPDX-License-Identifier: Apache-2.0
"""Images and their objects as detectors are trained with them: torchvision's transforms, and a crop that it lacks.

Images are resized to the size that the model takes by the model itself, on its device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from groupmamba.training.detection.command import CROP_FROM, CROP_SIZE

SMALLEST = 1  # pixels of a side of a box that is kept


class AbsoluteCrop(v2.Transform):
    """A random crop whose height and width are each drawn from ``size`` pixels, or the image's own where that is less
    (mmdetection's RandomCrop of kind "absolute_range")."""

    def __init__(self, size: Sequence[int]):
        super().__init__()
        self.size = tuple(size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.size
        params: dict[str, Any] = {}
        sides = zip(("top", "left"), ("height", "width"), v2.query_size(flat_inputs), strict=True)
        for start, name, length in sides:
            side = int(torch.randint(min(low, length), min(high, length) + 1, ()).item())
            params[name] = side
            params[start] = int(torch.randint(0, length - side + 1, ()).item())
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class TrainingTransform:
    """Image and objects as the model is trained with them: uint8 (3, H, W); ``boxes``, ``labels``, ``masks``.

    Boxes are cut off at the image's border, and those that vanish are left out with what belongs to them.
    """

    def __init__(self, args: argparse.Namespace):
        steps: list[v2.Transform] = []
        if args.crop:
            smaller = v2.RandomShortestSize(list(CROP_FROM), max_size=4200)  # the recipe's longest side
            steps.append(v2.RandomApply([v2.Compose([smaller, AbsoluteCrop(CROP_SIZE)])], p=0.5))
        steps += [
            v2.RandomHorizontalFlip(args.hflip),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=SMALLEST),
            v2.ToPureTensor(),
        ]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.steps(image, {name: target[name] for name in ("boxes", "labels", "masks") if name in target})
