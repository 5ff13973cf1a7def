# SPDX-License-Identifier: Apache-2.0
"""The ops, a module each: checks, call, fake kernels, gradient, FLOPs. The maths is in `groupmamba_ext.reference`.

The first five are public functions of `groupmamba_ext`. The others, on CUDA alone, queue the kernels and products of a
whole layer, or what stands between layers, from one call; `groupmamba.GroupedMamba2d` and the models take them where
`can_fuse` and `takes_image` say so, and compose the public ops elsewhere.
"""

from groupmamba_ext.ops import (
    batch_norm_fold,
    batch_norm_relu,
    cross_selective_scan,
    depthwise_conv3x3,
    feed_forward,
    grouped_mamba_layer,
    grouped_selective_scan,
    layer_norm_pool,
    modulated_layer_norm,
    narrow_conv,
    pixels_to_channels,
    token_norm,
)

OPS = (
    grouped_selective_scan.OP,
    cross_selective_scan.OP,
    depthwise_conv3x3.OP,
    layer_norm_pool.OP,
    modulated_layer_norm.OP,
    token_norm.OP,
    batch_norm_relu.OP,
    batch_norm_fold.OP,
    pixels_to_channels.OP,
    narrow_conv.OP,
    narrow_conv.RELU_OP,
    grouped_mamba_layer.OP,
    feed_forward.OP,
)
