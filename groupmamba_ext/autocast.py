# SPDX-License-Identifier: Apache-2.0
"""Autocast of the ops' images; parameters keep their dtype, since kernels read either."""

from __future__ import annotations

import torch
from torch import Tensor

_CAST = (torch.float32, torch.float16, torch.bfloat16)


def autocast(*images: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts images to the autocast dtype where autocast is on; float64 is left alone, as torch does, and so is what the
    checks behind this refuse."""
    first = images[0]
    kind = first.device.type if isinstance(first, Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return images
    low = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(low) if isinstance(t, Tensor) and t.dtype in _CAST and t.layout is torch.strided else t for t in images
    )


def autocast_on_cuda(image: Tensor) -> Tensor:
    """`autocast` of one image on CUDA, in fewer steps."""
    if torch.is_autocast_enabled("cuda") and image.dtype != torch.float64:
        return image.to(torch.get_autocast_dtype("cuda"))
    return image
