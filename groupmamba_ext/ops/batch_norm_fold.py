# SPDX-License-Identifier: Apache-2.0
"""`batch_norm_fold`: a BatchNorm in evaluation mode as part of the convolution before it, on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupmamba_ext._checks import same_device
from groupmamba_ext.backend import takes_image
from groupmamba_ext.registry import InferenceOp, call_inference

NAME = "batch_norm_fold"


def takes_batch_norm_fold(image: Tensor, *parameters: Tensor) -> bool:
    """True where `batch_norm_fold` takes an image, with a convolution's weight and a BatchNorm's tensors."""
    typed = image.dtype in (torch.float16, torch.bfloat16)
    return typed and all(t.dtype in (image.dtype, torch.float32) for t in parameters) and takes_image(image)


def batch_norm_fold(
    image: Tensor,
    weight: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    *,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as part of the convolution before it, in one launch where
    `takes_batch_norm_fold`; without a gradient.

    Args:
        image: what the convolution reads; only its dtype, that of the results, counts here.
        weight: (O, C, K, K), of any strides.
        norm: (O,) each: weight, bias, running mean, running variance.
        blocks: the image has blocks of 2x2 pixels as channels (``groupmamba.models.entry_conv``); K is 3, 7,
            11, ...

    Returns:
        The convolution's weight, channels-last, (O, C, K, K) or with ``blocks`` (O, 4 C', (K + 1) / 2, (K + 1) / 2), C'
        being C rounded up to even; and its bias, (O,).
    """
    return call_inference(NAME, image, weight, *norm, float(eps), blocks)


def _fake(image, weight, norm_weight, norm_bias, mean, variance, eps, blocks):
    same_device(NAME, (image, weight, norm_weight, norm_bias, mean, variance))
    out, channels, taps, _ = weight.shape
    if blocks:
        channels, taps = 4 * (channels + channels % 2), (taps + 1) // 2
    folded = image.new_empty((out, taps, taps, channels)).permute(0, 3, 1, 2)
    return folded, image.new_empty((out,))


OP = InferenceOp(NAME, _fake)
