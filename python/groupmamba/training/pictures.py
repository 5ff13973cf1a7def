# SPDX-License-Identifier: Apache-2.0
"""Files of images, as 8-bit colours."""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from groupmamba_ext._command import one_line

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # Pillow's modes of 16-bit grey images; it would clip them at 255


def read_picture(path: str | os.PathLike) -> Image.Image:
    """The image as RGB; of 16-bit grey values the upper 8 bits, of an alpha channel nothing.

    Raises:
        OSError and what else Pillow's decoders raise: the file is no image.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that Pillow does not understand
        picture = Image.open(file)
        if picture.mode in _DEEP:
            values = np.asarray(picture).astype(np.int64).clip(0, 65535)
            picture = Image.fromarray((values >> 8).astype(np.uint8))
        return picture.convert("RGB")


def why_unreadable(error: BaseException) -> str:
    """What an exception of `read_picture` says, without the file's name, which stands before it in every message."""
    if isinstance(error, UnidentifiedImageError):
        return "no image in a format that Pillow knows"
    return (isinstance(error, OSError) and error.strerror) or one_line(error)
