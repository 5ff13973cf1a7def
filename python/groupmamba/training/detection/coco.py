# SPDX-License-Identifier: Apache-2.0
"""Images and annotations in COCO's format, checked before anything is trained on them."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

from groupmamba.training.pictures import read_picture
from groupmamba.training.samples import BrokenAnnotation
from groupmamba_ext._command import CommandError, one_line

TRAINING_NAMES = ("train2017", "train2014", "train", "training")
VALIDATION_NAMES = ("val2017", "val2014", "val", "valid", "validation")
SHOWN = 60  # characters of a value that is wrong


class Split(NamedTuple):
    """Where the annotations and the images of one split are."""

    annotations: Path
    images: Path


def find_split(data: Path, names: Sequence[str], option: str, annotations: str | None, images: str | None) -> Split:
    """The split's files: those given, or those that are found in ``data``.

    Args:
        data: the folder DATA.
        names: that the split may have.
        option: the beginning of the options that name them.
        annotations, images: given, relative to ``data`` or not.

    Raises:
        CommandError: they are not there.
    """
    if not data.is_dir():
        raise CommandError(f"{data} is no folder")
    if annotations is not None:
        file = data / annotations
        if not file.is_file():
            raise CommandError(f"--{option}-annotations {annotations} is no file")
    else:
        patterns = [
            pattern.format(name)
            for name in names
            for pattern in (
                "annotations/instances_{}.json", "annotations/{}.json", "{}/_annotations.coco.json",
                "{}/annotations.json", "{}.json",
            )
        ]  # fmt: skip
        found = [data / pattern for pattern in patterns if (data / pattern).is_file()]
        if not found:
            raise CommandError(
                f"{data} holds no annotations such as annotations/instances_{names[0]}.json or {names[2]}/"
                f"_annotations.coco.json; --{option}-annotations names them"
            )
        file = found[0]
    if images is not None:
        folder = data / images
        if not folder.is_dir():
            raise CommandError(f"--{option}-images {images} is no folder")
        return Split(file, folder)
    folders = [data / prefix / name for prefix in ("", "images") for name in names]
    folder = next((folder for folder in folders if _has_images(folder)), None) or data / "images"
    if not folder.is_dir():
        raise CommandError(f"{data} holds no folder of images such as {names[0]}/; --{option}-images names it")
    return Split(file, folder)


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))


def read_annotations(file: Path) -> dict[str, Any]:
    """A file of annotations, each of which can be used.

    Raises:
        CommandError: it can't be read, or something in it can't be; the message names the file and the id.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(f"{file} can't be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{file} must hold images, annotations and categories, got {type(content).__name__}")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list):
            raise CommandError(f"{file} must hold a list {name!r}, got {_shown(content.get(name))}")
        if not all(isinstance(entry, dict) for entry in content[name]):
            raise CommandError(f"{file}: {name} must be objects")
    images = _by_id(file, "image", content["images"], "file_name")
    categories = _by_id(file, "category", content["categories"], "name")
    seen: set[int] = set()
    for entry in content["annotations"]:
        _check_annotation(file, entry, images, categories)
        if entry["id"] in seen:
            raise CommandError(f"{file}: annotation {entry['id']}: the id is there twice")
        seen.add(entry["id"])
    return content


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _by_id(file: Path, what: str, entries: list[dict], text: str) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if type(number) is not int:
            raise CommandError(f"{file}: {what} number {place} must have a whole number as id, got {_shown(number)}")
        if not isinstance(entry.get(text), str) or not entry[text]:
            raise CommandError(f"{file}: {what} {number}: {text} must be text, got {_shown(entry.get(text))}")
        if number in found:
            raise CommandError(f"{file}: {what} {number}: the id is there twice")
        found[number] = entry
    if not found:
        raise CommandError(f"{file} names no {what}")
    return found


def _check_annotation(file: Path, entry: dict, images: dict[int, dict], categories: dict[int, dict]) -> None:
    if type(entry.get("id")) is not int:
        raise CommandError(f"{file}: annotation {_shown(entry)} must have a whole number as id")
    problem = None
    for name, known in (("image_id", images), ("category_id", categories)):
        if not isinstance(entry.get(name), int) or entry[name] not in known:
            problem = f"{name} {_shown(entry.get(name))} is none of the file's"
    box = entry.get("bbox")
    if problem is None and not (isinstance(box, list) and len(box) == 4 and _finite(box) and min(box[2:]) >= 0):
        problem = f"bbox must be [x, y, width, height], finite, got {_shown(box)}"
    if problem is None:
        problem = _wrong_mask(entry.get("segmentation"), images[entry["image_id"]])
    if problem is not None:
        raise CommandError(f"{file}: annotation {entry['id']}: {problem}")
    entry.setdefault("iscrowd", 0)
    entry.setdefault("area", float(box[2] * box[3]))  # type: ignore[index]


def _finite(values: list) -> bool:
    try:
        return math.isfinite(math.fsum(values))
    except (TypeError, ValueError, OverflowError):
        return False


def _wrong_mask(mask: Any, image: dict) -> str | None:
    if mask is None or mask == []:
        return None
    if isinstance(mask, list):
        for polygon in mask:
            if not (isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and _finite(polygon)):
                return f"segmentation must be polygons of three points [x, y, ...] at least, got {_shown(polygon)}"
        return None
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), (str, list)):
        return f"segmentation must be polygons or a run-length code, got {_shown(mask)}"
    size, expected = mask.get("size"), [image.get("height"), image.get("width")]
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
        return f"segmentation must have a size [height, width], got {_shown(size)}"
    if None not in expected and size != expected:
        return f"segmentation has the size {size}, and the image {expected}"
    counts = mask["counts"]
    if isinstance(counts, list) and not (_finite(counts) and math.fsum(counts) == size[0] * size[1]):
        return f"the segmentation's counts must add up to {size[0]} x {size[1]} pixels"
    return None


class CocoImages(CocoDetection):
    """torchvision's dataset on annotations that are checked, with images by :func:`read_picture`."""

    def __init__(self, root: Path, content: dict[str, Any]):
        VisionDataset.__init__(self, root)
        self.coco = COCO()
        self.coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)

    def _load_image(self, id: int) -> Image.Image:
        try:
            return read_picture(Path(self.root) / self.coco.imgs[id]["file_name"])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
            raise OSError(one_line(error)) from error


class Objects:
    """The images of one split, with boxes, classes and masks.

    Args:
        split: where they are.
        categories: ids of the categories by class, of the training images; None for the file's own.
        crowds: whether regions that stand for many objects are kept, as validation needs them.
        empty: whether images without objects are kept.
        say: called with a line on what is left out.

    Raises:
        CommandError: an annotation is broken or of an unknown category, or there is no image.
    """

    def __init__(
        self,
        split: Split,
        *,
        categories: Sequence[int] | None = None,
        crowds: bool,
        empty: bool,
        say: Callable[[str], None],
    ):
        self.split, self.root = split, split.images
        content = read_annotations(split.annotations)
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        self.category_ids = sorted(names) if categories is None else list(categories)
        self._class_of = {number: i + 1 for i, number in enumerate(self.category_ids)}  # 0 is the background
        self.classes = [names.get(number, f"category {number}") for number in self.category_ids]
        flat = [entry for entry in content["annotations"] if not entry["iscrowd"] and min(entry["bbox"][2:]) <= 0]
        if flat:
            say(f"{split.annotations}: {len(flat)} boxes without area are left out, first annotation {flat[0]['id']}")
        left_out = {entry["id"] for entry in flat}
        kept = []
        for entry in content["annotations"]:
            if entry["id"] in left_out or (entry["iscrowd"] and not crowds):
                continue
            if entry["category_id"] not in self._class_of:
                raise CommandError(
                    f"{split.annotations}: annotation {entry['id']} is of category {entry['category_id']} "
                    f"({names[entry['category_id']]}), which the training images do not have"
                )
            kept.append(entry)
        content["annotations"] = kept
        self.without_mask = next((entry["id"] for entry in kept if not entry.get("segmentation")), None)
        self.has_masks = any(entry.get("segmentation") for entry in kept)
        if not empty:
            count = Counter(entry["image_id"] for entry in kept)
            images = [entry for entry in content["images"] if count[entry["id"]]]
            if len(images) < len(content["images"]):
                more = len(content["images"]) - len(images)
                say(f"{more} images without objects are left out; --empty-images trains on them too")
            if not images:
                raise CommandError(f"{split.annotations} has no image with an object")
            content["images"] = images
        self.data = CocoImages(split.images, content)
        self.masks = False

    def use_masks(self, masks: bool) -> None:
        """Whether targets have masks.

        Raises:
            CommandError: an annotation has none.
        """
        if masks and self.without_mask is not None:
            raise CommandError(
                f"{self.split.annotations}: annotation {self.without_mask} has no segmentation, and others have; "
                f"--no-masks trains on boxes alone"
            )
        self.masks = masks
        keys = {"boxes", "labels", "iscrowd", "area", *(["masks"] if masks else [])}
        self._wrapped = wrap_dataset_for_transforms_v2(self.data, target_keys=keys)

    def __len__(self) -> int:
        return len(self.data)

    def path_of(self, index: int) -> str:
        """The file of an image."""
        return str(self.root / self.data.coco.imgs[self.data.ids[index]]["file_name"])

    def load(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """An image, uint8 (3, H, W), and its objects: ``boxes`` (N, 4) as XYXY, ``labels`` int64 (N,) from 1 on,
        ``iscrowd``, ``area``, and ``masks`` uint8 (N, H, W).

        Raises:
            BrokenAnnotation: a mask can't be decoded.
            Exception: of many kinds, for an image that can't be read.
        """
        number = self.data.ids[index]
        try:
            picture, target = self._wrapped[index]
        except (OSError, MemoryError):  # of the image
            raise
        except Exception as error:  # pycocotools raises exceptions of many kinds on codes that are none
            ids = [annotation["id"] for annotation in self.data.coco.imgToAnns[number]]
            raise BrokenAnnotation(
                f"{self.split.annotations}: a segmentation of image {number} can't be decoded ({one_line(error)}), of "
                f"annotations {', '.join(map(str, ids[:8]))}"
            ) from error
        image = F.to_image(picture)
        size = tuple(image.shape[1:])
        entry = self.data.coco.imgs[number]
        said = entry.get("height", size[0]), entry.get("width", size[1])
        if said != size:
            raise BrokenAnnotation(
                f"{self.split.annotations}: image {number} has {said[1]} x {said[0]} pixels, and its file "
                f"{self.path_of(index)} {size[1]} x {size[0]}"
            )
        if not self.data.coco.imgToAnns[number]:
            target = {
                "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
                "labels": torch.zeros(0, dtype=torch.int64),
                "iscrowd": torch.zeros(0, dtype=torch.int64),
                "area": torch.zeros(0),
            }
            if self.masks:
                target["masks"] = tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8))
            return image, target
        target["labels"] = torch.tensor([self._class_of[number] for number in target["labels"].tolist()])
        target["boxes"] = tv_tensors.wrap(target["boxes"].float(), like=target["boxes"])
        target["iscrowd"] = torch.tensor(target["iscrowd"], dtype=torch.int64)
        target["area"] = torch.tensor(target["area"], dtype=torch.float32)
        return image, target
