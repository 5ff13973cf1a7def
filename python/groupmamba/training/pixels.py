# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the device: bytes, a quarter of what floating-point numbers are, and normalised there.

Random erasing fills rectangles with noise that no byte can hold, so what it draws travels beside the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate


class Pixels(NamedTuple):
    """One image, or a batch of them, before normalisation.

    ``values`` is (H, W, 3) or (batch, H, W, 3), uint8. ``erased`` (n,) int32 numbers pixels in row-major order, image
    after image, and ``noise`` (n, 3) float32 is what they hold instead, normalised.
    """

    values: Tensor
    erased: Tensor
    noise: Tensor

    @classmethod
    def empty(cls, height: int, width: int) -> Pixels:
        """A black image."""
        return cls(torch.zeros(height, width, 3, dtype=torch.uint8), *_nothing())

    @classmethod
    def stack(cls, images: Sequence[Pixels]) -> Pixels:
        """Images of one size to a batch, in memory that processes share where a worker calls it."""
        values = default_collate([image.values for image in images])
        pixels = values.shape[1] * values.shape[2]
        numbers = torch.cat([image.erased + i * pixels for i, image in enumerate(images)])
        return cls(values, numbers, torch.cat([image.noise for image in images]))

    def to(self, device: torch.device) -> Pixels:
        """On ``device``; from page-locked memory the host does not wait."""
        return Pixels(*(tensor.to(device, non_blocking=True) for tensor in self))


def _nothing() -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.int32), torch.empty(0, 3)


class ToPixels:
    """timm's transform up to the bytes; :class:`Normalize` does the rest, with the same result.

    Args:
        transform: of :func:`timm.data.create_transform`, ending in MaybeToTensor, Normalize and perhaps RandomErasing.
    """

    def __init__(self, transform: Any):
        names = [type(part).__name__ for part in transform.transforms]
        split = names.index("MaybeToTensor")
        if names[split:] not in (["MaybeToTensor", "Normalize"], ["MaybeToTensor", "Normalize", "RandomErasing"]):
            raise ValueError(f"transform must end in MaybeToTensor, Normalize and RandomErasing, got {names}")
        self.to_image = transform.transforms[:split]
        self.erase = transform.transforms[-1] if names[-1] == "RandomErasing" else None

    def __call__(self, picture: Any) -> Pixels:
        for part in self.to_image:
            picture = part(picture)
        values = torch.from_numpy(np.array(picture))
        if self.erase is None:
            return Pixels(values, *_nothing())
        rectangles = _Rectangles(values.shape)
        self.erase(rectangles)
        return Pixels(values, *rectangles.pixels())


class _Rectangles:
    """Stands in for the normalised image that timm's RandomErasing writes to, and remembers what it wrote."""

    dtype = torch.float32

    def __init__(self, shape: Sequence[int]):
        self.height, self.width, self.channels = shape
        self.written: list[tuple[slice, slice, Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def __setitem__(self, where: tuple[slice, slice, slice], values: Tensor) -> None:
        self.written.append((where[1], where[2], values))

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Their numbers and values; where rectangles overlap, the last one's."""
        if not self.written:
            return _nothing()
        numbers, noise = [], []
        for rows, columns, values in self.written:
            height, width = rows.stop - rows.start, columns.stop - columns.start
            row = torch.arange(rows.start, rows.stop, dtype=torch.int32)
            column = torch.arange(columns.start, columns.stop, dtype=torch.int32)
            numbers.append((row[:, None] * self.width + column).flatten())
            noise.append(values.expand(self.channels, height, width).permute(1, 2, 0).reshape(-1, self.channels))
        if len(numbers) == 1:
            return numbers[0], noise[0]
        last = {number: i for i, number in enumerate(torch.cat(numbers).tolist())}
        return torch.tensor(list(last), dtype=torch.int32), torch.cat(noise)[list(last.values())]


class Normalize:
    """Bytes to the images that a model takes: (batch, 3, H, W) float32, channels-last.

    A pixel is (value / 255 - mean) / std, or the noise of an erased one.

    Args:
        mean, std: of each channel.
        device: where batches are normalised.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.mean, self.std = (torch.tensor(list(values), device=device) for values in (mean, std))
        self.most = torch.full((1,), 255.0, device=device)  # by a Python number, a GPU multiplies with its reciprocal

    def __call__(self, batch: Pixels) -> Tensor:
        images = batch.values.float().div_(self.most).sub_(self.mean).div_(self.std)
        if batch.erased.numel():
            images.view(-1, images.shape[-1]).index_copy_(0, batch.erased.long(), batch.noise)
        return images.permute(0, 3, 1, 2)
