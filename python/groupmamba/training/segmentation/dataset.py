# SPDX-License-Identifier: Apache-2.0
"""Images and label images in folders, as ADE20K has them.

DATA/images/training/NAME.jpg     DATA/annotations/training/NAME.png      one channel, a class for each pixel
DATA/images/validation/NAME.jpg   DATA/annotations/validation/NAME.png    (or train, val)
DATA/objectInfo150.txt or DATA/classes.txt                                names of the classes, where there is one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

from groupmamba.training.pictures import read_picture, why_unreadable
from groupmamba.training.samples import BrokenAnnotation
from groupmamba_ext._command import CommandError, one_line

IGNORE = -1  # of a pixel without a class
UNLABELLED = 255  # in files of up to 254 classes, beside 0 where that is unlabelled too
TRAINING_NAMES, VALIDATION_NAMES = ("training", "train"), ("validation", "val")
LABEL_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")


class LabelledImages:
    """The images below ``DATA/images/SPLIT`` that have a label image.

    Args:
        data: the folder DATA.
        names: of the split, the first that is there.
        reduce_zero_label: 0 is unlabelled, and class 0 has the label 1.

    Raises:
        CommandError: a folder is missing or empty, or an image has no labels.
    """

    def __init__(self, data: Path, names: Sequence[str], reduce_zero_label: bool):
        if not data.is_dir():
            raise CommandError(f"{data} is no folder")
        split = next((name for name in names if (data / "images" / name).is_dir()), None)
        if split is None:
            raise CommandError(f"{data / 'images'} holds neither {' nor '.join(names)}")
        self.root, labels = data / "images" / split, data / "annotations" / split
        if not labels.is_dir():
            raise CommandError(f"{labels} is no folder")
        found = {path.relative_to(labels).with_suffix(""): path for path in _files(labels, LABEL_EXTENSIONS)}
        images = _files(self.root, IMG_EXTENSIONS)
        if not images:
            raise CommandError(f"{self.root} holds no image")
        self.samples: list[tuple[Path, Path]] = []
        for path in images:
            name = path.relative_to(self.root).with_suffix("")
            if name not in found:
                raise CommandError(f"{path} has no label image {labels / name}.png")
            self.samples.append((path, found[name]))
        used = {label for _, label in self.samples}
        self.labels_alone = sorted(path for path in found.values() if path not in used)  # without an image
        self.reduce_zero_label = reduce_zero_label
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.samples)

    def path_of(self, index: int) -> str:
        """The file of an image."""
        return str(self.samples[index][0])

    def load(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """The image, uint8 (3, H, W), and its classes, int32 (H, W), `IGNORE` where there is none.

        Raises:
            BrokenAnnotation: the label image can't be read, has another size, or a label that is no class.
            Exception: of many kinds, for an image that can't be read.
        """
        path, _ = self.samples[index]
        image = F.pil_to_tensor(read_picture(path))
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(self._classes(index, tuple(image.shape[1:]))))

    def check(self) -> bool:
        """Reads all label images. Whether any pixel has a class.

        Raises:
            CommandError: as `load` raises BrokenAnnotation.
        """

        def check_one(index: int) -> bool:
            try:
                with Image.open(self.samples[index][0]) as picture:
                    size = picture.height, picture.width
            except Exception:  # an image that can't be read is left out when it is loaded
                return False
            return bool((self._classes(index, size) != IGNORE).any())

        try:
            return any(_in_threads(check_one, range(len(self))))
        except BrokenAnnotation as error:
            raise CommandError(one_line(error)) from error

    def _classes(self, index: int, size: tuple[int, ...]) -> np.ndarray:
        """The classes of an image of ``size``, height and width."""
        path, annotation = self.samples[index]
        labels = read_labels(annotation)
        if labels.shape != size:
            raise BrokenAnnotation(
                f"{annotation} has {labels.shape[1]} x {labels.shape[0]} pixels, and the image {path.name} {size[1]} x "
                f"{size[0]}"
            )
        count = len(self.classes)
        classes = classes_of(labels, count, self.reduce_zero_label)
        if (highest := int(classes.max(initial=IGNORE))) >= count:
            raise BrokenAnnotation(
                f"{annotation} has the label {highest + self.reduce_zero_label}, and there are {count} classes, "
                f"{int(self.reduce_zero_label)} to {count - 1 + self.reduce_zero_label}"
            )
        return classes


def _in_threads(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    """``function`` of each of ``values``; of several exceptions the first one's counts. Pillow decodes side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, values))


def _files(root: Path, extensions: Sequence[str]) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in extensions and path.is_file())


def read_labels(path: Path) -> np.ndarray:
    """The labels (H, W) of a label image, as they stand there.

    Raises:
        BrokenAnnotation: it can't be read, or has several channels.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N"):
                raise BrokenAnnotation(f"{path} must have one channel, a class for each pixel, got {picture.mode}")
            return np.asarray(picture).astype(np.int32)
    except BrokenAnnotation:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
        raise BrokenAnnotation(f"{path} can't be read ({why_unreadable(error)})") from error


def classes_of(labels: np.ndarray, count: int, reduce_zero_label: bool) -> np.ndarray:
    """Classes from 0 on, `IGNORE` for pixels without one."""
    classes = labels - 1 if reduce_zero_label else labels.copy()  # so 0 becomes -1, which is IGNORE
    if count < UNLABELLED:
        classes[labels == UNLABELLED] = IGNORE
    return classes


def class_names(data: Path) -> list[str] | None:
    """From ``objectInfo150.txt``, a table with a column "Name", or ``classes.txt``, a name a line; None without.

    Raises:
        CommandError: the file is no text, or has no name in it.
    """
    for name in ("objectInfo150.txt", "classes.txt"):
        file = data / name
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{file} can't be read as text: {one_line(error)}") from error
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        if name == "objectInfo150.txt":
            lines = [line.split("\t")[-1].strip() for line in lines[1:]]
        if not lines:
            raise CommandError(f"{file} names no class")
        return lines
    return None


def settle_classes(data: Path, training: LabelledImages, asked: int | None, say: Callable[[str], None]) -> list[str]:
    """Names of the classes: those that DATA names, or as many as were asked for or as the labels have.

    Raises:
        CommandError: as many are named as were not asked for, or no pixel has a class.
    """
    names = class_names(data)
    if names is not None:
        if asked not in (None, len(names)):
            raise CommandError(f"--num-classes {asked}: {data} names {len(names)} classes")
        return names
    if asked is None:
        zero = training.reduce_zero_label
        try:
            highest = max(_in_threads(lambda sample: _highest(sample[1], zero), training.samples))
        except BrokenAnnotation as error:
            raise CommandError(one_line(error)) from error
        if highest < 0:
            raise CommandError(f"{training.root}: no pixel of the label images has a class")
        asked = highest + 1
        say(f"{asked} classes, by the highest label; --num-classes or DATA/classes.txt say otherwise")
    return unnamed(asked)


def unnamed(count: int) -> list[str]:
    """What so many classes are called that have no names."""
    return [f"class {i}" for i in range(count)]


def _highest(annotation: Path, reduce_zero_label: bool) -> int:
    return int(classes_of(read_labels(annotation), 0, reduce_zero_label).max(initial=IGNORE))
