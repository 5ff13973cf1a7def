# SPDX-License-Identifier: Apache-2.0
"""Detection and segmentation on GroupMamba backbones: Mask R-CNN with FPN (torchvision), UPerNet
(segmentation-models-pytorch). Needs the extra ``vision``.

Both are the libraries' own models: training loops, losses, post-processing and data handling are theirs.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

try:
    import segmentation_models_pytorch as smp
    import timm
    from torchvision.models.detection import MaskRCNN
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
except ImportError as error:
    raise ImportError(f"groupmamba.vision needs {error.name}: pip install 'groupmamba[vision]'") from error

import groupmamba.models as models
from groupmamba.models.pretrained import weights_file

if TYPE_CHECKING:
    from segmentation_models_pytorch.base import SegmentationModel

FPN_CHANNELS = 256


class PyramidBackbone(nn.Module):
    """A model of ``groupmamba.models`` with a feature pyramid over its four stages, as torchvision's detectors take it.

    Args:
        model: ``"groupmamba_tiny"``, ``"groupmamba_small"`` or ``"groupmamba_base"``.
        options: of :func:`timm.create_model`: ``pretrained``, ``weights``, ``drop_path_rate``, ``variant``, ...

    Shape: (batch, 3, H, W) to five maps of 256 channels at strides 4 to 64, named "0", "1", "2", "3", "pool".
    """

    def __init__(self, model: str, **options: Any):
        super().__init__()
        self.body = timm.create_model(_known(model), features_only=True, **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), FPN_CHANNELS, LastLevelMaxPool())
        self.out_channels = FPN_CHANNELS

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))


def _known(model: str) -> str:
    if model not in models.__all__ or not timm.is_model(model):
        names = ", ".join(repr(name) for name in models.__all__ if timm.is_model(name))
        raise ValueError(f"model must be one of {names}, got {model!r}")
    return model


def mask_rcnn(
    model: str = "groupmamba_tiny",
    num_classes: int = 91,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike | None = None,
    backbone_options: dict | None = None,
    **options: Any,
) -> MaskRCNN:
    """Mask R-CNN (He et al., ICCV 2017) with a feature pyramid on a GroupMamba backbone.

    Args:
        model: name of the backbone.
        num_classes: with the background.
        pretrained, weights: of the backbone, see :func:`groupmamba.models.groupmamba_tiny`.
        backbone_options: further options of the backbone, such as ``{"drop_path_rate": 0.2}``.
        options: of :class:`torchvision.models.detection.MaskRCNN`: ``min_size``, ``max_size``, thresholds, ...

    Returns:
        torchvision's model: a list of images (3, H, W) in [0, 1] to detections, or in training with targets to losses.

    Raises:
        ValueError: an unknown ``model``.
    """
    backbone = PyramidBackbone(model, pretrained=pretrained, weights=weights, **(backbone_options or {}))
    return MaskRCNN(backbone, num_classes, **options)


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
        model: name of the backbone.
        num_classes: classes of a pixel.
        pretrained, weights, backbone_options: as for :func:`mask_rcnn`.
        decoder_channels: of the decoder, 512 as in the paper's comparison.
        options: of :class:`segmentation_models_pytorch.UPerNet`: ``in_channels``, ``encoder_depth`` (3 to 5), ...

    Returns:
        The library's model: (batch, in_channels, H, W) to logits (batch, num_classes, H, W).

    Raises:
        ValueError: an unknown ``model``, an ``encoder_depth`` that the decoder does not take.
    """
    encoder_options = dict(backbone_options or {})
    if weights is not None:  # by timm's name for it, since `weights` is an argument of the library's too
        overlay = encoder_options.get("pretrained_cfg_overlay") or {}
        encoder_options["pretrained_cfg_overlay"] = {**overlay, "file": weights_file(weights)}
    if not 3 <= options.get("encoder_depth", 5) <= 5:  # the decoder begins at stride 4, and needs two maps
        raise ValueError(f"encoder_depth must be 3, 4 or 5, got {options['encoder_depth']!r}")
    net = smp.UPerNet(
        f"tu-{_known(model)}",
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
