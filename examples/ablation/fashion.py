# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST on the device: 28 x 28 pixels as bytes, made into batches there, nothing decoded twice.

Zalando's pictures of clothes (Xiao, Rasul, Vollgraf, arXiv 1708.07747): 60,000 to train on, 10,000 to test on, ten
classes. Debian has them as the package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from groupmamba.training.seeds import seed_of
from groupmamba_ext._command import CommandError, one_line

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
MEAN, STD = 0.2860, 0.3530  # of the training pixels, from 0 to 1
SHIFT = 2  # pixels by which a training image moves at most, each way
_UNSIGNED_BYTE = 8


class Split(NamedTuple):
    """Images (n, height, width) uint8 and labels (n,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def find(data: Path | None) -> Path:
    """The folder with the four idx files.

    Raises:
        CommandError: it is not there.
    """
    folder = DEBIAN if data is None else data
    if not folder.is_dir():
        advice = "install the Debian package dataset-fashion-mnist, or name a folder by --data" if data is None else ""
        raise CommandError(f"{folder} is no folder{': ' if advice else ''}{advice}")
    return folder


def read(folder: Path, split: str, device: torch.device) -> Split:
    """The ``"train"`` or ``"t10k"`` half of the four files, gzipped or not.

    Raises:
        CommandError: a file is missing, is no idx file of bytes, or does not fit the other.
    """
    images, labels = (_read_idx(folder, f"{split}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise CommandError(f"{folder} holds images of shape {images.shape} and labels of shape {labels.shape}: {split}")
    if not len(labels) or labels.max() >= CLASSES:
        raise CommandError(f"{folder}: {split} must hold labels from 0 to {CLASSES - 1}")
    return Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device, torch.int64))


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file: two zero bytes, the type, the number of dimensions, the sizes (big-endian), the values."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise CommandError(f"{folder} holds no {name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
        if (zeros, kind) != (0, _UNSIGNED_BYTE):
            raise ValueError(f"its first bytes are {data[:4].hex()}")
        return values.reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise CommandError(f"{path} is no idx file of bytes: {one_line(error)}") from error


def shown(images: Tensor, side: int) -> Tensor:
    """Bytes (n, h, w) to normalised float32 images (n, 3, side, side) in channels-last format."""
    large = F.interpolate(images[:, None].float(), (side, side), mode="bilinear", align_corners=False)
    normal = (large / 255 - MEAN) / STD
    return normal.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class Batches:
    """Batches of training images, augmented: moved by up to 2 pixels (black comes in), mirrored half the time.

    The order of an epoch follows from (seed, epoch), and what happens to an image from (seed, epoch, index): arms of
    one seed see the same images in the same batches.

    Args:
        split: on the device.
        batch: images a batch; what is left over sits the epoch out.
        side: pixels of a side of a batch's images.
        seed: of the run.
    """

    def __init__(self, split: Split, batch: int, side: int, seed: int):
        self.split, self.batch, self.side, self.seed = split, batch, side, seed
        self.padded = F.pad(split.images, (SHIFT,) * 4)
        height, width = split.images.shape[1:]
        device = split.images.device
        self.rows, self.columns = torch.arange(height, device=device), torch.arange(width, device=device)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.split) // self.batch

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (batch, 3, side, side) float32, normalised, channels-last, and labels (batch,) of one epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
        order = torch.randperm(len(self.split), generator=generator)
        moves = torch.randint(2 * SHIFT + 1, (len(self.split), 2), generator=generator)
        mirrored = torch.rand(len(self.split), generator=generator) < 0.5
        device = self.split.images.device
        order, moves, mirrored = (drawn.to(device) for drawn in (order, moves, mirrored))
        for i in range(len(self)):
            index = order[i * self.batch : (i + 1) * self.batch]
            yield self._augmented(index, moves[index], mirrored[index]), self.split.labels[index]

    def _augmented(self, index: Tensor, moves: Tensor, mirrored: Tensor) -> Tensor:
        rows = self.rows + moves[:, :1]
        columns = torch.where(mirrored[:, None], self.columns.flip(0), self.columns) + moves[:, 1:]
        return shown(self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]], self.side)
