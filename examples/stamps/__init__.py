# SPDX-License-Identifier: Apache-2.0
"""Photographs of things pasted on photographs: data for a detector and a segmenter that can be had offline."""
