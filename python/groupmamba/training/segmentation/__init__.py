# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation, the task of ``groupmamba train-segmenter``: UPerNet on folders of images and label images."""
