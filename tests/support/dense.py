# SPDX-License-Identifier: Apache-2.0
"""Small data sets of rectangles and discs, in the formats of COCO and ADE20K, and runs of the commands on them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from support.training import KWARGS, command

SHAPES, COLORS = ("rectangle", "disc"), ((220, 60, 40), (60, 90, 230))
COMMON = ["--device", "cpu", "-j", "0", "--log-interval", "1", "--model-kwargs", *KWARGS]
SEGMENTER = [*COMMON, "-b", "4", "--img-size", "32", "--short-side", "32", "--decoder-channels", "16"]
DETECTOR = [*COMMON, "-b", "2", "--min-size", "64", "--max-size", "96", "--detector-kwargs",
            "rpn_pre_nms_top_n_train=50", "rpn_post_nms_top_n_train=20", "rpn_pre_nms_top_n_test=50",
            "rpn_post_nms_top_n_test=20", "box_batch_size_per_image=16"]  # fmt: skip


Shapes = list[tuple[int, np.ndarray]]


def draw(rng: np.random.Generator, height: int, width: int, count: int) -> tuple[np.ndarray, Shapes]:
    """A noisy image, and (class, mask) of each shape on it; later ones are in front."""
    pixels = rng.normal(128, 20, (height, width, 3))
    rows, columns = np.mgrid[:height, :width]
    found: Shapes = []
    for _ in range(count):
        kind, side = int(rng.integers(2)), int(rng.integers(10, 18))
        top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
        if kind == 0:
            mask = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        else:
            radius = side / 2
            mask = (rows - top - radius + 0.5) ** 2 + (columns - left - radius + 0.5) ** 2 <= radius**2
        found = [(k, m & ~mask) for k, m in found]
        found.append((kind, mask))
        pixels[mask] = np.array(COLORS[kind]) + rng.normal(0, 10, (int(mask.sum()), 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), [(k, m) for k, m in found if m.any()]


def make_coco(root: Path, train: int = 6, val: int = 3, sizes=((48, 64), (64, 40)), masks: bool = True) -> Path:
    """DATA/annotations/instances_{train,val}.json with run-length codes, DATA/train and DATA/val."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            pixels, shapes = draw(rng, height, width, 1 + i % 3)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            images.append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
            for kind, mask in shapes:
                annotations.append(annotation(100 * (i + 1) + len(annotations), 10 + i, (3, 7)[kind], mask, masks))
        categories = [{"id": 3, "name": SHAPES[0]}, {"id": 7, "name": SHAPES[1]}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def annotation(number: int, image: int, category: int, mask: np.ndarray, with_mask: bool = True) -> dict:
    rows, columns = np.nonzero(mask)
    box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    flat = mask.T.ravel()  # by columns
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
    if with_mask:
        entry["segmentation"] = {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
    return entry


def make_ade(root: Path, train: int = 9, validation: int = 4, sizes=((48, 64), (64, 40))) -> Path:
    """DATA/{images,annotations}/{training,validation}: 0 unlabelled at the border, 1 the ground, 2 and 3 the shapes."""
    rng = np.random.default_rng(1)
    for split, count in (("training", train), ("validation", validation)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels, shapes = draw(rng, *sizes[i % len(sizes)], 3)
            labels = np.ones(pixels.shape[:2], np.uint8)
            for kind, mask in shapes:
                labels[mask] = 2 + kind
            labels[:2] = 0
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("ground\nrectangle\ndisc\n")
    return root


def segmenter(data: Path, run: Path, *options: str) -> int:
    """The exit status of a run of a small segmenter in this process."""
    return command("train-segmenter", str(data), "--output", str(run), *SEGMENTER, *options)


def detector(data: Path, run: Path, *options: str) -> int:
    """The exit status of a run of a small detector in this process."""
    return command("train-detector", str(data), "--output", str(run), *DETECTOR, *options)


def change_annotations(data, change, split="train"):
    file = data / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def objects(data, split="train", **more):
    from groupmamba.training.detection.annotations import Split
    from groupmamba.training.detection.coco import Objects

    given = {"crowds": False, "empty": True, "say": lambda text: None, **more}
    found = Objects(Split(data / "annotations" / f"instances_{split}.json", data / split), **given)
    found.use_masks(found.has_masks)
    return found
