# SPDX-License-Identifier: Apache-2.0
"""Fused ops for visual state-space models: the grouped selective scan of GroupMamba and its neighbours.

Needs torch alone. Importing works without a GPU and without the compiled library; the first call that needs what is
missing says so and names the cure.
"""

from groupmamba_ext import _load, reference
from groupmamba_ext._explain import explain
from groupmamba_ext._load import build_info
from groupmamba_ext._version import __version__
from groupmamba_ext.backend import backend
from groupmamba_ext.directions import DIRECTIONS
from groupmamba_ext.ops import OPS
from groupmamba_ext.ops.cross_selective_scan import cross_selective_scan
from groupmamba_ext.ops.depthwise_conv3x3 import depthwise_conv3x3
from groupmamba_ext.ops.grouped_selective_scan import grouped_selective_scan
from groupmamba_ext.ops.layer_norm_pool import layer_norm_pool
from groupmamba_ext.ops.modulated_layer_norm import modulated_layer_norm
from groupmamba_ext.registry import register

__all__ = [
    "DIRECTIONS",
    "__version__",
    "backend",
    "build_info",
    "cross_selective_scan",
    "depthwise_conv3x3",
    "explain",
    "grouped_selective_scan",
    "layer_norm_pool",
    "modulated_layer_norm",
    "reference",
]

if _load.native_available():
    for _op in OPS:
        register(_op)
