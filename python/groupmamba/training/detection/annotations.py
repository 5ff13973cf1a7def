# SPDX-License-Identifier: Apache-2.0
"""Files of annotations in COCO's format: where they are, and whether what they say can be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

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
            raise CommandError(f"--{option}-annotations {annotations} is no file: {file} is looked for")
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
    if isinstance(counts, str) and (counts := run_lengths(counts)) is None:
        return f"the segmentation's counts are no code of run lengths, got {_shown(mask['counts'])}"
    if not (_finite(counts) and min(counts, default=0) >= 0 and math.fsum(counts) == size[0] * size[1]):
        return f"the segmentation's counts must add up to {size[0]} x {size[1]} pixels"
    return None


def run_lengths(code: str) -> list[int] | None:
    """The run lengths of COCO's compressed code, None where it is none.

    Each character is a number from 48 on: five bits of a run length, the lowest first, and a sixth that says that more
    follow. The fifth bit of the last is the sign. From the fourth on, run lengths are differences to the one before the
    last. pycocotools does not look for a code that ends too early.
    """
    bits = np.frombuffer(code.encode(errors="replace"), np.uint8).astype(np.int64) - 48
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        return None
    ends = np.flatnonzero(bits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 7:
        return None
    places = np.arange(len(bits)) - np.repeat(starts, sizes)
    values = np.add.reduceat((bits & 31) << (5 * places), starts)
    values -= np.where(bits[ends] & 16, np.int64(1) << (5 * sizes), 0)
    values[1::2], values[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return values.tolist()


def outside(entry: dict, image: dict) -> bool:
    """Whether nothing of an object lies in its image, where the file gives the image's size."""
    width, height = image.get("width"), image.get("height")
    if not (isinstance(width, int) and isinstance(height, int)):
        return False
    x, y, w, h = entry["bbox"]
    mask = entry.get("segmentation")
    points = [polygon[i::2] for polygon in mask for i in (0, 1)] if isinstance(mask, list) else []
    spans = [((x, x + w), (y, y + h)), *zip(points[::2], points[1::2], strict=True)]
    box, *polygons = (max(xs) <= 0 or max(ys) <= 0 or min(xs) >= width or min(ys) >= height for xs, ys in spans)
    return box or (bool(polygons) and all(polygons))
