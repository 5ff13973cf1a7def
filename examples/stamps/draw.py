#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draws scenes into a folder, for ``groupmamba train-detector`` and ``train-segmenter``. See docs/stamps.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import numpy as np
    from PIL import Image
    from pycocotools import mask as coco

    from groupmamba.training.option_table import number
    from groupmamba_ext._command import CommandError, run_command
except ImportError as problem:
    sys.exit(f"draw.py: needs this project installed: pip install '.[train]' ({problem})")

from stamps.scenes import (  # noqa: E402
    CLASSES,
    SPLITS,
    Scene,
    Size,
    draw,
    find_stamps,
    read_backgrounds,
    read_stamps,
    reduce,
)

BACKGROUND = 1  # label of pixels without a thing; 0 would be unlabelled
IN_ONE_GO = 25


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    whole = number(1, whole=True)
    parser = argparse.ArgumentParser(prog="draw.py", description=__doc__)
    parser.add_argument("stamps", type=Path, metavar="STAMPS", help="where tuxpaint-stamps-default is unpacked")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder to draw into")
    parser.add_argument("--reduce", action="store_true", help="write the stamps themselves, at 256 pixels")
    parser.add_argument("--train", type=whole, default=3000, metavar="N", help="scenes for training [3000]")
    parser.add_argument("--validation", type=whole, default=300, metavar="N", help="scenes for validation [300]")
    parser.add_argument(
        "--size", type=number(64, 2048, whole=True), default=256, help="pixels of the shorter side [256]"
    )
    parser.add_argument("--seed", type=number(0, whole=True), default=0, help="of all scenes [0]")
    parser.add_argument("--workers", type=whole, default=os.cpu_count(), metavar="N", help="processes")
    return parser.parse_args(argv)


def write_reduced(source: Path, target: Path) -> tuple[int, int]:
    """Writes the stamps of the six classes at 256 pixels, in the same folders; how many, and their bytes."""
    count = total = 0
    for name in CLASSES:
        for file in sorted((source / name).rglob("*.png")):
            to = target / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as picture:
                has_mask = "A" in picture.getbands() or "transparency" in picture.info
                if has_mask:
                    reduce(picture.convert("RGBA")).save(to, optimize=True)
                    count, total = count + 1, total + to.stat().st_size
    return count, total


class Painter:
    """Draws scenes of one split; stamps and backgrounds are read once in each process."""

    def __init__(self, stamps: Path, split: str, size: Size, seed: int):
        self.stamps, self.backgrounds = read_stamps(stamps, split), read_backgrounds(split)
        self.split, self.size, self.seed = split, size, seed

    def scene(self, index: int) -> Scene:
        return draw(self.stamps, self.backgrounds, self.size, self.seed, SPLITS.index(self.split), index)


_PAINTERS: dict[tuple[Any, ...], Painter] = {}


def paint(stamps: Path, data: Path, split: str, size: Size, seed: int, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Writes the images and label images of some scenes; their entries for the annotations."""
    key = stamps, split, size, seed
    painter = _PAINTERS.setdefault(key, Painter(*key)) if key not in _PAINTERS else _PAINTERS[key]
    entries = []
    for index in indices:
        scene = painter.scene(index)
        name = f"{index:05d}"
        Image.fromarray(scene.pixels).save(data / "images" / split / f"{name}.jpg", quality=92)
        labels = np.full(scene.pixels.shape[:2], BACKGROUND, np.uint8)
        for kind, mask in scene.things:
            labels[mask] = BACKGROUND + 1 + kind
        Image.fromarray(labels).save(data / "annotations" / split / f"{name}.png")
        height, width = labels.shape
        image = {"id": index, "file_name": f"{name}.jpg", "height": height, "width": width}
        entries.append({"image": image, "things": [_thing(kind, mask) for kind, mask in scene.things]})
    return entries


def _thing(kind: int, mask: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(mask, np.uint8))
    return {
        "category_id": kind + 1,
        "bbox": coco.toBbox(code).tolist(),
        "area": int(coco.area(code)),
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode()},
        "iscrowd": 0,
    }


def write(stamps: Path, data: Path, split: str, count: int, size: Size, seed: int, workers: int) -> None:
    """Draws the scenes of one split, in several processes; what is drawn does not depend on how many."""
    for kind in ("images", "annotations"):
        (data / kind / split).mkdir(parents=True, exist_ok=True)
    parts = [range(first, min(first + IN_ONE_GO, count)) for first in range(0, count, IN_ONE_GO)]
    given = (repeat(stamps), repeat(data), repeat(split), repeat(size), repeat(seed), parts)
    if workers == 1:
        found = list(map(paint, *given))
    else:
        with ProcessPoolExecutor(workers) as pool:
            found = list(pool.map(paint, *given))
    images, annotations = [], []
    for entry in (entry for part in found for entry in part):
        images.append(entry["image"])
        for thing in entry["things"]:
            annotations.append({"id": len(annotations) + 1, "image_id": entry["image"]["id"], **thing})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    args = parse(argv)
    return run_command("draw.py", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    """Draws what was asked for.

    Raises:
        CommandError: the stamps or the backgrounds are not there, or DATA is in use.
    """
    stamps = find_stamps(args.stamps)
    if args.data.exists() and any(args.data.iterdir()):
        raise CommandError(f"{args.data} must be an empty folder, or none yet")
    if args.reduce:
        count, total = write_reduced(stamps, args.data)
        print(f"{args.data}: {count} stamps, {total / 2**20:.1f} MiB")
        return 0
    size = Size(args.size, args.size * 5 // 4)
    for split, count in zip(SPLITS, (args.train, args.validation), strict=True):
        write(stamps, args.data, split, count, size, args.seed, args.workers)
    (args.data / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")
    print(f"{args.data}: {args.train} scenes for training, {args.validation} for validation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
