# SPDX-License-Identifier: Apache-2.0
"""UPerNet: segmentation-models-pytorch's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import segmentation_models_pytorch as smp

from groupmamba.models.pretrained import weights_file
from groupmamba.vision.backbone import any_size, known

if TYPE_CHECKING:
    from segmentation_models_pytorch.base import SegmentationModel


def upernet(
    model: str = "groupmamba_tiny",
    num_classes: int = 150,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike | None = None,
    backbone_options: dict | None = None,
    decoder_channels: int = 512,
    **options: Any,
) -> SegmentationModel:
    """UPerNet (Xiao et al., ECCV 2018) on a GroupMamba backbone.

    Args:
        model: name of the backbone, of ``groupmamba.models`` or another one of timm with maps at strides 4 to 32.
        num_classes: classes of a pixel.
        pretrained, weights, backbone_options: as for :func:`mask_rcnn`.
        decoder_channels: of the decoder, 512 as in the paper's comparison.
        options: of :class:`segmentation_models_pytorch.UPerNet`: ``in_channels``, ``encoder_depth`` (3 to 5), ...

    Returns:
        The library's model: (batch, in_channels, H, W) to logits (batch, num_classes, H, W).

    Raises:
        ValueError: an unknown ``model``, an ``encoder_depth`` that the decoder does not take.
    """
    encoder_options = {**any_size(known(model)), **(backbone_options or {})}
    if weights is not None:  # by timm's name for it, since `weights` is an argument of the library's too
        overlay = encoder_options.get("pretrained_cfg_overlay") or {}
        encoder_options["pretrained_cfg_overlay"] = {**overlay, "file": weights_file(weights)}
    if not 3 <= options.get("encoder_depth", 5) <= 5:  # the decoder begins at stride 4, and needs two maps
        raise ValueError(f"encoder_depth must be 3, 4 or 5, got {options['encoder_depth']!r}")
    net = smp.UPerNet(
        f"tu-{model}",
        encoder_weights=True if pretrained or weights is not None else None,
        decoder_channels=decoder_channels,
        classes=num_classes,
        **options,
        **encoder_options,
    )
    # What save_pretrained keeps of these arguments: the weights that it writes are the ones to load.
    net.config["encoder_weights"] = None
    net.config.pop("pretrained_cfg_overlay", None)
    return net
