# SPDX-License-Identifier: Apache-2.0
"""The photograph of ``groupmamba demo``: any file that Pillow reads, as (rows, columns, 3) in [0, 1]."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from groupmamba_ext._command import CommandError, is_out_of_memory, one_line

MAX_ASPECT = 4  # of the longer to the shorter side: the middle of anything longer is shown
BACKGROUND = (255, 255, 255)  # behind transparent pixels


@dataclass
class Photo:
    """A photograph and what its user should know of it."""

    pixels: Tensor  # (rows, columns, 3) in [0, 1]
    notes: list[str]


def _rgb(image: Image.Image) -> Image.Image:
    """The image upright, in RGB with 8 bits a channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # One channel of 16 or 32 bits, or of floating-point numbers, which Pillow would clip at 255.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        values = values - values.min()
        return Image.fromarray((255 * values / max(values.max(), 1e-300)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _read(path: Path, notes: list[str]) -> Image.Image:
    if not path.is_file():
        raise CommandError(f"IMAGE must be an existing file, got {'the folder ' if path.is_dir() else ''}{path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    notes.append(f"the first of {frames:,} images in the file")
                return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CommandError(
            f"IMAGE {path} has more pixels than Pillow's limit against decompression bombs, "
            f"PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS or 0:,}"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise CommandError(f"IMAGE {path} is not an image that Pillow can read") from error
    except Exception as error:  # a broken file raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        if is_out_of_memory(error):
            raise
        raise CommandError(f"IMAGE {path} cannot be read: {one_line(error)}") from error


def _middle(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image, or its middle where a side is more than MAX_ASPECT times as long as the other."""
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    notes.append(f"the middle {width:,} x {height:,} of {image.width:,} x {image.height:,} pixels")
    return image.crop((left, top, left + width, top + height))


def load_photo(path: Path | None, size: int, stride: int) -> Photo:
    """The photograph at ``path``, or scikit-learn's, its longer side about ``size``, both multiples of ``stride``.

    Raises:
        CommandError: the file is missing, not an image, broken, or larger than Pillow's limit.
    """
    notes: list[str] = []
    if path is None:
        from sklearn.datasets import load_sample_image

        photo = Image.fromarray(load_sample_image("china.jpg"))
    else:
        photo = _read(path, notes)
    photo = _middle(photo, notes)
    scale = size / max(photo.size)
    width, height = (max(round(side * scale / stride), 1) * stride for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return Photo(torch.from_numpy(pixels / 255), notes)
