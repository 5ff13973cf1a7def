# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN and Faster R-CNN: torchvision's, which takes images of any size and keeps channels last."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from groupmamba.vision.backbone import PyramidBackbone


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
        model: name of the backbone, see :class:`PyramidBackbone`.
        num_classes: with the background.
        pretrained, weights: of the backbone, see :func:`groupmamba.models.groupmamba_tiny`.
        backbone_options: further options of the backbone, such as ``{"drop_path_rate": 0.2}``.
        options: of :class:`torchvision.models.detection.MaskRCNN`: ``min_size``, ``max_size``, thresholds, ...

    Returns:
        torchvision's model: a list of images (3, H, W) in [0, 1] to detections, or in training with targets to losses.

    Raises:
        TypeError: torchvision's model does not have one of ``options``.
        ValueError: an unknown ``model``.
    """
    _check_options(options, MaskRCNN, FasterRCNN)
    backbone = _backbone(model, pretrained, weights, backbone_options)
    return _for_any_size(MaskRCNN(backbone, num_classes, **options))


def faster_rcnn(
    model: str = "groupmamba_tiny",
    num_classes: int = 91,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike | None = None,
    backbone_options: dict | None = None,
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN (Ren et al., NeurIPS 2015), for boxes without masks; arguments as for :func:`mask_rcnn`."""
    _check_options(options, FasterRCNN)
    backbone = _backbone(model, pretrained, weights, backbone_options)
    return _for_any_size(FasterRCNN(backbone, num_classes, **options))


def _check_options(options: dict[str, Any], *detectors: type) -> None:
    """torchvision's detectors take every argument, and leave those that they do not know unused."""
    known = {name: value for detector in detectors for name, value in inspect.signature(detector).parameters.items()}
    for name, value in options.items():
        if name not in known.keys() - {"self", "backbone", "num_classes", "kwargs"} | {"_skip_resize", "fixed_size"}:
            raise TypeError(f"{detectors[0].__name__} has no argument {name!r}, got {value!r}")
        if name in known and name not in ("min_size", "max_size") and (wrong := _wrong_kind(known[name], value)):
            raise TypeError(f"{detectors[0].__name__}: {name} must be {wrong}, got {value!r}")


def _wrong_kind(parameter: inspect.Parameter, value: Any) -> str | None:
    """What an argument must be, where ``value`` is something else: the detectors take anything, and fail in use."""
    default = parameter.default
    if isinstance(default, (int, float)):
        return None if isinstance(value, (int, float)) else "a number"
    if parameter.name.endswith(("_generator", "_head", "_predictor", "_pool")):
        return None if value is None or callable(value) else "a module"
    return None


def _backbone(model: str, pretrained: bool, weights: str | os.PathLike | None, options: dict | None) -> PyramidBackbone:
    options = {"pretrained": pretrained, **(options or {})}
    if weights is not None:
        options["weights"] = weights
    return PyramidBackbone(model, **options)


def _for_any_size(detector: Any) -> Any:
    old = detector.transform
    detector.transform = DetectorTransform(
        old.min_size,
        old.max_size,
        old.image_mean,
        old.image_std,
        old.size_divisible,
        old.fixed_size,
        _skip_resize=old._skip_resize,
    )
    return detector


class DetectorTransform(GeneralizedRCNNTransform):
    """torchvision's, for images of which one side would vanish too, and with batches that are channels-last at once."""

    fixed_size: tuple[int, int] | None

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        factor = self.max_size / max(height, width)
        if self.fixed_size is not None or min(height, width) * factor >= 1:
            return super().resize(image, target)
        self.fixed_size = max(int(width * factor), 1), max(int(height * factor), 1)
        try:
            return super().resize(image, target)
        finally:
            self.fixed_size = None

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        if torch.jit.is_tracing():
            return super().batch_images(images, size_divisible)
        height, width = (
            -(-max(image.shape[side] for image in images) // size_divisible) * size_divisible for side in (1, 2)
        )
        # Zeros in the order of channels-last, seen as (batch, 3, H, W).
        batch = images[0].new_zeros(len(images), height, width, images[0].shape[0]).permute(0, 3, 1, 2)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch
