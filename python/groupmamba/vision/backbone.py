# SPDX-License-Identifier: Apache-2.0
"""Backbones with a feature pyramid, of this project's models or timm's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import groupmamba.models as models
from groupmamba.layers.tracing import keepable

FPN_CHANNELS = 256


class PyramidBackbone(nn.Module):
    """A model of ``groupmamba.models``, or another one of timm with maps at strides 4 to 32, with a feature pyramid
    over its four stages, as torchvision's detectors take it.

    Each map is normalised, as detectors on Swin and ConvNeXt have it: the first three maps of this project's models are
    by themselves, the last one and those of other models get a LayerNorm.

    Args:
        model: ``"groupmamba_tiny"``, ``"groupmamba_small"``, ``"groupmamba_base"``, or a name of timm's.
        options: of :func:`timm.create_model`: ``pretrained``, ``weights``, ``drop_path_rate``, ``variant``, ...

    Shape: (batch, 3, H, W) to five maps of 256 channels at strides 4 to 64, named "0", "1", "2", "3", "pool".

    Raises:
        ValueError: an unknown ``model``, or one without these four maps.
    """

    def __init__(self, model: str, **options: Any):
        super().__init__()
        self.body = _feature_model(known(model), **options)
        channels = self.body.feature_info.channels()
        if self.body.feature_info.reduction() != [4, 8, 16, 32]:
            raise ValueError(
                f"model must have maps at strides 4, 8, 16 and 32, got {model!r} with "
                f"{self.body.feature_info.reduction()}"
            )
        normed = len(channels) - 1 if model.startswith("groupmamba") else 0
        self.norms = nn.ModuleList(LayerNorm2d(n) if i >= normed else nn.Identity() for i, n in enumerate(channels))
        self.fpn = FeaturePyramidNetwork(channels, FPN_CHANNELS, LastLevelMaxPool())
        self.out_channels = FPN_CHANNELS

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = [keepable(norm(feature)) for norm, feature in zip(self.norms, self.body(x), strict=True)]
        return self.fpn(OrderedDict((str(i), feature) for i, feature in enumerate(maps)))


def _feature_model(model: str, **options: Any) -> nn.Module:
    if model.startswith("groupmamba"):
        return timm.create_model(model, features_only=True, **options)
    options = {**any_size(model), **options}
    return timm.create_model(model, features_only=True, feature_cls="getter", out_indices=(-4, -3, -2, -1), **options)


def any_size(model: str) -> dict[str, Any]:
    """Options by which a model of timm takes images of any size that is a multiple of 32."""
    return {"strict_img_size": False} if model.startswith("swin") else {}


def known(model: str) -> str:
    """The name itself.

    Raises:
        ValueError: there is no such model.
    """
    if not timm.is_model(model):
        names = ", ".join(repr(name) for name in models.__all__ if timm.is_model(name))
        raise ValueError(f"model must be one of {names}, or another model of timm, got {model!r}")
    return model
