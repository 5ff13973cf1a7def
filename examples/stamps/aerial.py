#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Boxed aerial photographs in COCO's format: those inside the wheel of ``deepforest``, which needs no installation.

    pip download --no-deps deepforest && unzip deepforest-*.whl 'deepforest/data/*'
    python examples/stamps/aerial.py deepforest/data TREES
    groupmamba train-detector TREES --steps 1200 -b 2 --min-size 320 400 480 --max-size 640

Photographs are cut into tiles. All tiles of one photograph are for validation. Trees are one class, alive or dead.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from PIL import Image

    from groupmamba.training.option_table import number
    from groupmamba_ext._command import CommandError, one_line, run_command
except ImportError as problem:
    sys.exit(f"aerial.py: needs this project installed: pip install '.[train]' ({problem})")

HELD_OUT = "2019_YELL_2_541000"  # beginning of the name of the photograph for validation
NAME = "tree"
SEEN = 0.5  # part of a box that a tile must hold


def read_boxes(file: Path) -> list[list[float]]:
    """Boxes [x0, y0, x1, y1] of a file in the format of Pascal VOC.

    Raises:
        CommandError: it is none.
    """
    try:
        entries = ElementTree.parse(file).getroot().iter("object")
        names = ("xmin", "ymin", "xmax", "ymax")
        return [[float(entry.findtext(f"bndbox/{name}", "")) for name in names] for entry in entries]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise CommandError(f"{file} holds no boxes that can be read: {one_line(error)}") from error


def tile_boxes(
    boxes: Sequence[tuple[str, list[float]]], left: int, top: int, side: int
) -> list[tuple[str, list[float]]]:
    """Those of which `SEEN` is in a tile, cut off at its border, as [x, y, width, height] in it."""
    found = []
    for x0, y0, x1, y1 in boxes:
        a, b, c, d = max(x0, left), max(y0, top), min(x1, left + side), min(y1, top + side)
        if c > a and d > b and (c - a) * (d - b) >= SEEN * (x1 - x0) * (y1 - y0):
            found.append([a - left, b - top, c - a, d - b])
    return found


def write(source: Path, data: Path, side: int) -> dict[str, int]:
    """Writes tiles and annotations; how many of each split there are.

    Raises:
        CommandError: the photographs are not there.
    """
    photographs = [file for file in sorted(source.glob("*.png")) if file.with_suffix(".xml").is_file()]
    splits = {"val": [f for f in photographs if f.name.startswith(HELD_OUT)],
              "train": [f for f in photographs if not f.name.startswith(HELD_OUT)]}  # fmt: skip
    if not all(splits.values()):
        raise CommandError(f"{source} holds no boxed photographs: it must be the folder deepforest/data of the wheel")
    counts = {}
    for split, files in splits.items():
        (data / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for file in files:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
            boxes = read_boxes(file.with_suffix(".xml"))
            for top in range(0, max(picture.height - side // 2, 1), side):
                for left in range(0, max(picture.width - side // 2, 1), side):
                    tile = picture.crop((left, top, min(left + side, picture.width), min(top + side, picture.height)))
                    number_of_tile = len(images) + 1
                    tile.save(data / split / f"{number_of_tile:04d}.png")
                    images.append({"id": number_of_tile, "file_name": f"{number_of_tile:04d}.png",
                                   "width": tile.width, "height": tile.height})  # fmt: skip
                    for box in tile_boxes(boxes, left, top, side):
                        annotations.append({"id": len(annotations) + 1, "image_id": number_of_tile, "bbox": box,
                                            "category_id": 1, "iscrowd": 0})  # fmt: skip
        categories = [{"id": 1, "name": NAME}]
        (data / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        counts[split] = len(images)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="aerial.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="deepforest/data out of the wheel")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder to write into")
    parser.add_argument("--side", type=number(64, 4096, whole=True), default=400, metavar="N", help="of a tile [400]")
    args = parser.parse_args(argv)

    def command() -> int:
        counts = write(args.source, args.data, args.side)
        print(f"{args.data}: {counts['train']} tiles for training, {counts['val']} for validation")
        return 0

    return run_command("aerial.py", command)


if __name__ == "__main__":
    sys.exit(main())
