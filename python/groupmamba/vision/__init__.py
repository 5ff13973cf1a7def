# SPDX-License-Identifier: Apache-2.0
"""Detection and segmentation on GroupMamba backbones: Mask R-CNN and Faster R-CNN with FPN (torchvision), UPerNet
(segmentation-models-pytorch). Needs the extra ``vision``.

All are the libraries' own models: losses, post-processing and data handling are theirs. ``groupmamba train-detector``
and ``train-segmenter`` train them. :mod:`groupmamba.vision.mm` registers the backbone for mmdetection and
mmsegmentation.
"""

try:
    import segmentation_models_pytorch  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(f"groupmamba.vision needs {error.name}: pip install 'groupmamba[vision]'") from error

from groupmamba.vision.backbone import FPN_CHANNELS, PyramidBackbone
from groupmamba.vision.detection import faster_rcnn, mask_rcnn
from groupmamba.vision.segmentation import upernet

__all__ = ["FPN_CHANNELS", "PyramidBackbone", "faster_rcnn", "mask_rcnn", "upernet"]
