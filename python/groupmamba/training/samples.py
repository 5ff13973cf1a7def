# SPDX-License-Identifier: Apache-2.0
"""Images with targets as large as they are: masks, boxes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from groupmamba.training import data
from groupmamba.training.data import Batch, Broken
from groupmamba.training.pictures import why_unreadable
from groupmamba.training.seeds import seeded
from groupmamba_ext._command import one_line

OPEN_FILES = 1 << 16


class BrokenAnnotation(Exception):
    """What an annotation says can't be; the message names its file, and what in it."""


class Annotated(Protocol):
    """A source of images with their targets."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Any, Any]:
        """An image and its target, as torchvision's tv_tensors.

        Raises:
            BrokenAnnotation: as it says.
            Exception: of many kinds, for an image that can't be read.
        """
        ...


Sample = tuple[Any, Any, int, list[tuple[int, str]]]


class Samples(Dataset):
    """Samples by (epoch, index).

    Args:
        source: of images and targets.
        transform: of both; what it draws follows from (seed, epoch, index).
        seed: of the run.
        tries: how many images after one that can't be read take its place in turn; 0 gives None.
    """

    def __init__(self, source: Annotated, transform: Callable[[Any, Any], tuple[Any, Any]], seed: int, tries: int):
        self.source, self.transform, self.seed, self.tries = source, transform, seed, tries

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, first = key
        bad: list[tuple[int, str]] = []
        for i in range(min(self.tries, len(self.source) - 1) + 1):
            index = (first + i) % len(self.source)
            try:
                image, target = self.source.load(index)
            except MemoryError:
                raise
            except BrokenAnnotation as error:
                bad.append((index, Broken(one_line(error))))
                break
            except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
                bad.append((index, why_unreadable(error)))
                continue
            with seeded(self.seed, "image", epoch, first):
                return *self.transform(image, target), index, bad
        return None, None, first, bad


def stacked(samples: Sequence[Sample]) -> Batch:
    """Samples of one size to a batch."""
    batch = listed(samples)
    if batch.incomplete:
        return batch
    return batch._replace(images=torch.stack(batch.images), labels=torch.stack(batch.labels))


def listed(samples: Sequence[Sample]) -> Batch:
    """Samples of any size to a batch of lists, without those that can't be read."""
    read = [sample for sample in samples if sample[0] is not None]
    return Batch(
        [sample[0] for sample in read],
        [sample[1] for sample in read],
        torch.tensor([sample[2] for sample in read], dtype=torch.int64),
        [found for sample in samples for found in sample[3]],
        incomplete=len(read) < len(samples),
    )


def _allow_open_files() -> None:
    """Raises the limit of open files as far as a user may: each tensor that a worker hands over is one, a batch of
    targets has hundreds, and sixteen workers reach the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def loader(
    samples: Samples,
    order: Sampler,
    workers: int,
    collate: Callable[[Sequence[Sample]], Batch],
    *,
    pin: bool,
    keep: bool = False,
) -> DataLoader:
    """Batches of ``samples`` in ``order``; ``keep`` the workers from epoch to epoch."""
    if workers > 0:
        _allow_open_files()
    return data.loader(samples, order, workers, collate, pin=pin, keep=keep)
