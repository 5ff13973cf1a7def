# SPDX-License-Identifier: Apache-2.0
"""Classes of all pixels of images of any size: windows side by side, several scales, mirror images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba.training.segmentation.transforms import size_of

STRIDE_OF_MAPS, CHUNK = 32, 16


class Testing(NamedTuple):
    """How a segmenter sees images.

    Args:
        crop: pixels of a side of a window.
        stride: from window to window; None for the image as a whole.
        short_side: pixels of the image's shorter side at scale 1.
        scales: whose results are averaged.
        flip: whether results of mirror images are averaged in.
        batch: windows at once.
        mean, std: of the images.
    """

    crop: int
    stride: int | None
    short_side: int
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    batch: int = 16
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)


@torch.no_grad()
def segment(model: nn.Module, images: Sequence[Tensor], testing: Testing, amp: torch.dtype | None) -> list[Tensor]:
    """Classes (H, W), int64, of each image.

    Args:
        model: normalised images (batch, 3, S, S) to logits (batch, classes, S, S); in evaluation mode.
        images: uint8 (3, H, W), of any sizes, on the model's device.
        testing: how they are seen.
        amp: the dtype of autocast, or None.
    """
    sums: list[Tensor | None] = [None] * len(images)
    several = len(testing.scales) > 1 or testing.flip
    for scale in testing.scales:
        scaled = [_scaled(image, testing, scale) for image in images]
        for mirror in (False, True) if testing.flip else (False,):
            seen = [image.flip(-1) for image in scaled] if mirror else scaled
            for i, logits in enumerate(_logits(model, seen, testing, amp)):
                if several:  # probabilities, at the size of scale 1
                    size = size_of(images[i].shape[1], images[i].shape[2], testing.short_side)
                    logits = F.interpolate((logits.flip(-1) if mirror else logits)[None], size, mode="bilinear")[0]
                    logits = logits.softmax(0)
                total = sums[i]
                sums[i] = logits if total is None else total.add_(logits)
    return [
        classes_at(total, tuple(image.shape[1:]))
        for total, image in zip(sums, images, strict=True)
        if total is not None
    ]


def _scaled(image: Tensor, testing: Testing, scale: float) -> Tensor:
    """The image (3, h, w) as the model takes it."""
    size = size_of(image.shape[1], image.shape[2], testing.short_side * scale)
    values = F.interpolate(image[None].float() / 255, size, mode="bilinear", antialias=True)[0]
    return normalised(values, testing.mean, testing.std)


def normalised(values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) in [0, 1], normalised."""
    shift, scale = (values.new_tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    return (values - shift) / scale


def _forward(model: nn.Module, windows: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.autocast(windows.device.type, amp, enabled=amp is not None):
        return model(windows.contiguous(memory_format=torch.channels_last)).float()


def _logits(model: nn.Module, images: Sequence[Tensor], testing: Testing, amp: torch.dtype | None) -> list[Tensor]:
    """Logits (classes, h, w) of each normalised image (3, h, w)."""
    if testing.stride is None:
        return [_whole(model, image, amp) for image in images]
    padded = [_padded(image, testing.crop, testing.crop) for image in images]
    places = [
        (i, top, left)
        for i, image in enumerate(padded)
        for top in _starts(image.shape[1], testing.crop, testing.stride)
        for left in _starts(image.shape[2], testing.crop, testing.stride)
    ]
    sums: dict[int, Tensor] = {}
    counts = [image.new_zeros(image.shape[1:]) for image in padded]
    for first in range(0, len(places), testing.batch):
        some = places[first : first + testing.batch]
        windows = torch.stack([padded[i][:, y : y + testing.crop, x : x + testing.crop] for i, y, x in some])
        for (i, y, x), logits in zip(some, _forward(model, windows, amp), strict=True):
            if i not in sums:
                sums[i] = logits.new_zeros(len(logits), *padded[i].shape[1:])
            sums[i][:, y : y + testing.crop, x : x + testing.crop] += logits
            counts[i][y : y + testing.crop, x : x + testing.crop] += 1
    return [(sums[i] / counts[i])[:, : image.shape[1], : image.shape[2]] for i, image in enumerate(images)]


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin: ``stride`` apart, the last one at the end."""
    return sorted({min(start, length - crop) for start in range(0, length - crop + stride, stride)})


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    """At least so large, with zeros, the mean colour, at the right and the bottom."""
    return F.pad(image, (0, max(width - image.shape[2], 0), 0, max(height - image.shape[1], 0)))


def _whole(model: nn.Module, image: Tensor, amp: torch.dtype | None) -> Tensor:
    _, height, width = image.shape
    size = [-(-side // STRIDE_OF_MAPS) * STRIDE_OF_MAPS for side in (height, width)]
    return _forward(model, _padded(image, *size)[None], amp)[0, :, :height, :width]


def classes_at(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """The class, int64 (H, W), of logits (classes, h, w) after bilinear interpolation to ``size``.

    A few classes at a time: 150 of them at 2000 x 2000 pixels would be 2.4 GB.
    """
    best = logits.new_full(size, -float("inf"))
    found = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), CHUNK):
        values, indices = F.interpolate(logits[None, first : first + CHUNK], size, mode="bilinear")[0].max(0)
        better = values > best
        best = torch.where(better, values, best)
        found = torch.where(better, indices + first, found)
    return found
