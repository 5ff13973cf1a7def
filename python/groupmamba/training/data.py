# SPDX-License-Identifier: Apache-2.0
"""Images of folders: DATA/train/CLASS/IMAGE and DATA/validation (or val).

Which images make a batch, and every random draw for one of them, follow from (seed, epoch, index). So losses do not
depend on the number of workers, and a run goes on in the middle of an epoch as if it had never stopped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from groupmamba.training.card import Card
from groupmamba.training.pictures import read_picture, why_unreadable
from groupmamba.training.pixels import Pixels, ToPixels
from groupmamba.training.seeds import seed_of, seeded
from groupmamba_ext._command import CommandError, UsageError, one_line

if TYPE_CHECKING:
    from groupmamba.training.task import Source

VALIDATION_NAMES = ("validation", "val")
NAMES_SHOWN = 3


class Batch(NamedTuple):
    """Images, their labels or targets (of classes -1: can't be read), their indices, and (index, reason) of those that
    can't be read. ``incomplete``: there was no image to take the place of one of these."""

    images: Any
    labels: Any
    indices: Tensor
    bad: list[tuple[int, str]]
    incomplete: bool = False


class Broken(str):
    """A reason that ends the run at once: an annotation that can't be right, and is the user's to correct."""


class Folder:
    """The images below ``root``, in timm's order; their folders' names are the classes.

    Raises:
        CommandError: the folder, or what must be in it, is missing.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        from timm.data.readers.reader_image_folder import find_images_and_targets
        from torchvision.datasets.folder import IMG_EXTENSIONS  # timm's own are .png and .jpg alone

        self.root = root
        if not root.is_dir():
            raise CommandError(f"{root} is no folder")
        self.samples: list[tuple[str, int]]
        self.samples, numbers = find_images_and_targets(str(root), IMG_EXTENSIONS)
        if not self.samples:
            raise CommandError(f"{root} has no images in folders of classes ({', '.join(IMG_EXTENSIONS)})")
        self.classes = sorted(numbers, key=numbers.__getitem__)
        if "" in self.classes:
            stray = next(path for path, label in self.samples if self.classes[label] == "")
            raise CommandError(f"{stray} is in no folder of a class: {root} must hold CLASS/IMAGE")
        self._check_classes(classes)

    def _check_classes(self, expected: Sequence[str] | None) -> None:
        known = set(self.classes)
        held = {Path(path).relative_to(self.root).parts[0] for path, _ in self.samples}
        for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in held:
                raise CommandError(f"{entry.path} holds no image: an empty class")
        if expected is None or list(expected) == self.classes:
            return
        missing, more = [c for c in expected if c not in known], sorted(known - set(expected))
        parts = [f"{title} {_listed(names)}" for title, names in (("lacks", missing), ("has", more)) if names]
        raise CommandError(f"{self.root} must hold the {len(expected)} classes of the training images; it "
                           f"{' and '.join(parts)}")  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def path_of(self, index: int) -> str:
        """The file of an image."""
        return self.samples[index][0]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def validation_folder(data: Path) -> Path:
    """DATA/validation or DATA/val.

    Raises:
        CommandError: there is neither.
    """
    for name in VALIDATION_NAMES:
        if (data / name).is_dir():
            return data / name
    if not data.is_dir():
        raise CommandError(f"{data} is no folder")
    raise CommandError(f"{data} holds neither {' nor '.join(VALIDATION_NAMES)}")


class Images(Dataset):
    """Samples of a :class:`Folder`, by (epoch, index).

    Args:
        folder: where they are.
        transform: of timm, image to normalised tensor; what it draws follows from (seed, epoch, index).
        seed: of the run.
        tries: how many images after one that can't be read take its place in turn; 0 gives zeros and the label -1.
        size: pixels of a side, for these zeros.
    """

    def __init__(self, folder: Folder, transform: Callable, seed: int, tries: int, size: int):
        self.samples, self.root = folder.samples, folder.root
        self.transform = ToPixels(transform)
        self.seed, self.tries, self.size = seed, tries, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Pixels, int, int, list[tuple[int, str]]]:
        epoch, first = key
        bad: list[tuple[int, str]] = []
        for i in range(min(self.tries, len(self.samples) - 1) + 1):
            index = (first + i) % len(self.samples)
            path, label = self.samples[index]
            try:
                picture = read_picture(path)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
                bad.append((index, why_unreadable(error)))
                continue
            with seeded(self.seed, "image", epoch, first):
                return self.transform(picture), label, index, bad
        return Pixels.empty(self.size, self.size), -1, first, bad


def collate(samples: Sequence[tuple[Pixels, int, int, list[tuple[int, str]]]]) -> Batch:
    """Samples to a batch."""
    images, labels, indices, bad = zip(*samples, strict=True)
    found = [b for some in bad for b in some]
    return Batch(Pixels.stack(images), torch.tensor(labels), torch.tensor(indices), found, min(labels) < 0)


class TrainingOrder(Sampler):
    """(epoch, index) of the images of each batch of one process.

    The permutation of an epoch follows from (seed, epoch). Step b of all processes takes its images from b * G on, G
    being the total batch; these go in pieces of ``batch`` to the processes in turn. What is left over at the end is
    in no batch.
    """

    def __init__(self, images: int, batch: int, pieces: int, rank: int, world: int, seed: int):
        self.images, self.batch, self.pieces, self.rank, self.world, self.seed = (
            images,
            batch,
            pieces,
            rank,
            world,
            seed,
        )
        self.total = batch * pieces * world
        self.epoch = self.start = 0
        self.stop = self.steps

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.images // self.total

    def begin(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """The next iteration is over ``epoch`` from step ``start`` on, before step ``stop`` where it is given."""
        self.epoch, self.start, self.stop = epoch, start, self.steps if stop is None else stop

    def images_of(self, epoch: int, step: int) -> list[int]:
        """The images that all processes take in a step of an epoch."""
        return self._permutation(epoch)[step * self.total : (step + 1) * self.total]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.images, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._permutation(self.epoch)
        for step in range(self.start, self.stop):
            for piece in range(self.pieces):
                first = step * self.total + (piece * self.world + self.rank) * self.batch
                yield [(self.epoch, index) for index in order[first : first + self.batch]]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.pieces


class ValidationOrder(Sampler):
    """(0, index) of each image once: every ``world``-th for one process."""

    def __init__(self, images: int, batch: int, rank: int = 0, world: int = 1):
        self.mine, self.batch = list(range(rank, images, world)), batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(0, len(self.mine), self.batch):
            yield [(0, index) for index in self.mine[i : i + self.batch]]

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch)


class BadImages:
    """Counts and names, once each, images that can't be read.

    Raises:
        CommandError: by :meth:`add`, for the first that is too many, or if their folder has vanished.
    """

    def __init__(self, source: Source, allowed: int, say: Callable[[str], None]):
        self.source, self.allowed, self.say = source, allowed, say
        self.found: set[int] = set()

    def add(self, bad: list[tuple[int, str]]) -> None:
        for index, reason in bad:
            if isinstance(reason, Broken):
                raise CommandError(reason)
            if index in self.found:
                continue
            if not self.source.root.is_dir():
                raise CommandError(f"{self.source.root} has vanished")
            self.found.add(index)
            path = self.source.path_of(index)
            if len(self.found) > self.allowed:
                raise CommandError(
                    f"{path} can't be read ({reason}): number {len(self.found)} of such images in "
                    f"{self.source.root}, more than --max-bad-images {self.allowed}"
                )
            self.say(f"skipped {path}, which can't be read ({reason}); {len(self.found)} so far")

    def check_some_left(self) -> None:
        """CommandError where none of all images can be read."""
        if len(self.found) == len(self.source):
            raise CommandError(f"no image of {self.source.root} can be read")


def training_transform(args: argparse.Namespace, mean: Sequence[float], std: Sequence[float]) -> Any:
    """timm's transform for training.

    Raises:
        UsageError: timm does not know the policy.
    """
    from timm.data import create_transform

    try:
        transform = create_transform(
            args.img_size,
            is_training=True,
            no_aug=args.no_aug,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation=args.train_interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, ValueError, LookupError) as error:  # timm's, of policies that it does not know
        raise UsageError(f"--aa {args.aa}: {one_line(error)}") from error
    for policy in transform.transforms:
        _allow_no_bits(policy)
    return transform


def _allow_no_bits(policy: Any) -> None:
    """Lets operations of an augmentation policy of timm posterize to 0 bits, the strongest of "PosterizeIncreasing".

    Pillow made a black image of that up to version 12, and raises from 13 on: one image in 600 of the default policy.
    """
    from timm.data import auto_augment

    def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
        if bits_to_keep < 1:
            return Image.new(image.mode, image.size)
        return auto_augment.posterize(image, bits_to_keep, **options)

    found = [*getattr(policy, "ops", ()), *(op for sub in getattr(policy, "policy", ()) for op in sub)]
    for operation in found:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize


def validation_transform(size: int, card: Card) -> Any:
    """timm's transform for validation: the centre of the image, ``card.crop_pct`` of its shorter side."""
    from timm.data import create_transform

    return create_transform(
        size, crop_pct=card.crop_pct, interpolation=card.interpolation, mean=tuple(card.mean), std=tuple(card.std)
    )


def loader(
    images: Dataset,
    order: Sampler,
    workers: int,
    collate: Callable[[Sequence[Any]], Batch] = collate,
    *,
    pin: bool,
    keep: bool = False,
) -> DataLoader:
    """Batches of ``images`` in ``order``; ``keep`` the workers from epoch to epoch."""
    return DataLoader(
        images,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=keep and workers > 0,
    )
