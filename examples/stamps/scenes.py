# SPDX-License-Identifier: Apache-2.0
"""Scenes: stamps, which are photographs with an alpha mask, pasted on backgrounds; each follows from a seed alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from groupmamba_ext._command import CommandError, one_line

CLASSES = ("animals", "food", "household", "plants", "town", "vehicles")  # folders of the package
REDUCED = 256  # pixels of a stamp's longer side
SPLITS = ("training", "validation")
HELD_OUT = 5  # one stamp in so many of a class is for validation
# Photographs that show nothing of the six classes.
BACKGROUNDS = {
    "training": ("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg"),
    "validation": ("brick.png", "moon.png", "page.png"),
}
SOLID = 128  # of 255, from which a pixel of a stamp counts as of the thing
SEEN, SMALLEST = 0.25, 48  # the part, and the pixels, of a thing that must be left to see


class Stamp(NamedTuple):
    """One photograph of a thing: its class, its file, and uint8 (H, W, 4)."""

    kind: int
    file: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Size:
    """Of scenes: pixels of the shorter and the longer side at most, and things in one at most."""

    shorter: int = 256
    longer: int = 320
    most: int = 5


class Scene(NamedTuple):
    """Pixels uint8 (H, W, 3), and of each thing its class and the mask (H, W) of what is seen of it, the front last."""

    pixels: np.ndarray
    things: list[tuple[int, np.ndarray]]


def find_stamps(root: Path) -> Path:
    """The folder of the classes in ``root``, or below it as the package has them.

    Raises:
        CommandError: it is not there.
    """
    for folder in (root, root / "usr/share/tuxpaint/stamps", root / "share/tuxpaint/stamps", root / "stamps"):
        if all((folder / name).is_dir() for name in CLASSES):
            return folder
    raise CommandError(f"{root} holds no folders {', '.join(CLASSES)}: it must be an unpacked tuxpaint-stamps-default")


def read_stamps(root: Path, split: str) -> list[Stamp]:
    """Those of a split, reduced to `REDUCED` pixels; images without an alpha mask are none.

    Raises:
        CommandError: a file can't be read, or a class has too few.
    """
    stamps = []
    for kind, name in enumerate(CLASSES):
        files = sorted((root / name).rglob("*.png"), key=lambda file: (file.stem, str(file)))
        found = [stamp for file in files if (stamp := _read(kind, file, root)) is not None]
        held_out = [stamp for i, stamp in enumerate(found) if i % HELD_OUT == HELD_OUT - 1]
        kept = held_out if split == "validation" else [s for i, s in enumerate(found) if i % HELD_OUT != HELD_OUT - 1]
        if not kept:
            raise CommandError(f"{root / name} holds too few images with an alpha mask: {len(found)}")
        stamps += kept
    return stamps


def _read(kind: int, file: Path, root: Path) -> Stamp | None:
    try:
        with Image.open(file) as picture:
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                return None
            reduced = reduce(picture.convert("RGBA"))
    except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
        raise CommandError(f"{file} can't be read as an image: {one_line(error)}") from error
    pixels = np.asarray(reduced)
    if not SMALLEST <= np.count_nonzero(pixels[..., 3] >= SOLID) < 0.98 * pixels.shape[0] * pixels.shape[1]:
        return None  # nothing, or a rectangle
    return Stamp(kind, str(file.relative_to(root)), pixels)


def reduce(picture: Image.Image) -> Image.Image:
    """At most `REDUCED` pixels of the longer side, cut to what is to see; colours of what is not are nobody's."""
    box = picture.getchannel("A").point(lambda value: 255 if value else 0).getbbox()
    if box is not None:
        picture = picture.crop(box)
    factor = REDUCED / max(picture.size)
    if factor < 1:
        size = [max(round(side * factor), 1) for side in picture.size]
        picture = picture.convert("RGBa").resize(size, Image.Resampling.BOX).convert("RGBA")
    return picture


def read_backgrounds(split: str) -> list[np.ndarray]:
    """Photographs that scikit-image's wheel ships, uint8 (H, W, 3).

    Raises:
        CommandError: scikit-image is missing, or has another set.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise CommandError("the backgrounds are scikit-image's: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in BACKGROUNDS[split] if not (folder / name).is_file()]
    if missing:
        raise CommandError(f"{folder} lacks {', '.join(missing)}")
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in BACKGROUNDS[split]]


def draw(stamps: Sequence[Stamp], backgrounds: Sequence[np.ndarray], size: Size, *seed: int) -> Scene:
    """The scene that follows from ``seed``: any whole numbers from 0 on, such as (seed, split, index)."""
    rng = np.random.default_rng(seed)
    sides = [size.shorter, int(rng.integers(size.shorter, size.longer + 1))]
    height, width = sides if rng.random() < 0.5 else sides[::-1]
    canvas = _background(rng, backgrounds, height, width)
    kinds = sorted({stamp.kind for stamp in stamps})
    by_kind = {kind: [stamp for stamp in stamps if stamp.kind == kind] for kind in kinds}
    things: list[tuple[int, np.ndarray, int]] = []
    for _ in range(int(rng.integers(1, size.most + 1))):
        kind = kinds[int(rng.integers(len(kinds)))]  # classes are as frequent as each other
        choice = by_kind[kind]
        stamp = choice[int(rng.integers(len(choice)))]
        mask = _paste(rng, canvas, stamp.pixels)
        things = [(k, m & ~mask, n) for k, m, n in things]
        things.append((kind, mask, int(mask.sum())))
    seen = [(k, m) for k, m, whole in things if m.sum() >= max(SEEN * whole, SMALLEST)]
    return Scene(canvas.clip(0, 255).astype(np.uint8), seen)


def _background(rng: np.random.Generator, photographs: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """A part of a photograph, mirrored or not, brighter or darker, float32 (height, width, 3)."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    most = min(photograph.shape[0] / height, photograph.shape[1] / width)
    part = min(float(rng.uniform(0.5, 1.0)) * most, most)
    rows, columns = max(int(height * part), 1), max(int(width * part), 1)
    top = int(rng.integers(photograph.shape[0] - rows + 1))
    left = int(rng.integers(photograph.shape[1] - columns + 1))
    crop = Image.fromarray(photograph[top : top + rows, left : left + columns])
    pixels = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)
    return (pixels[:, ::-1] if rng.random() < 0.5 else pixels) * rng.uniform(0.7, 1.3)


def _paste(rng: np.random.Generator, canvas: np.ndarray, stamp: np.ndarray) -> np.ndarray:
    """Pastes a stamp, turned, resized and mirrored, perhaps across the border; the mask (H, W) of its solid pixels."""
    height, width = canvas.shape[:2]
    picture = Image.fromarray(stamp)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.convert("RGBa").rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR, expand=True)
    factor = float(rng.uniform(0.2, 0.65)) * min(height, width) / max(picture.size)
    size = [max(round(side * factor), 4) for side in picture.size]
    pixels = np.asarray(picture.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR))
    colors, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:].astype(np.float32) / 255
    top = int(rng.integers(-size[1] // 4, height - 3 * size[1] // 4 + 1))
    left = int(rng.integers(-size[0] // 4, width - 3 * size[0] // 4 + 1))
    rows, columns = slice(max(top, 0), min(top + size[1], height)), slice(max(left, 0), min(left + size[0], width))
    inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    light = rng.uniform(0.8, 1.2)
    canvas[rows, columns] = canvas[rows, columns] * (1 - alpha[inside]) + light * colors[inside]  # premultiplied
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = alpha[inside][..., 0] >= SOLID / 255
    return mask
