# SPDX-License-Identifier: Apache-2.0
"""Object detection and instance segmentation, the task of ``groupmamba train-detector``: Mask R-CNN, COCO's format."""
