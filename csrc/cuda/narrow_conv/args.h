// SPDX-License-Identifier: Apache-2.0
// Arguments of the convolutions between few channels.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"
#include "cuda/narrow_conv/plan.h"

namespace gm {

// Images x (batch, height, width, in_channels) and y (batch, out_height, out_width, out_channels), contiguous and
// aligned to 16 bytes; stride 1. `pad` rows and columns of zeros around x do not lie in memory.
struct NarrowConvShape {
    int64_t batch = 0;
    int height = 0, width = 0, out_height = 0, out_width = 0;
    int in_channels = 0, out_channels = 0, taps = 0, pad = 0;
};

// y = conv(x, weight)
struct NarrowConvArgs {
    NarrowConvShape shape;
    const void *x = nullptr, *weight = nullptr;  // weight: as launch_narrow_conv_pack leaves it
    void* y = nullptr;
    ParamArg bias;  // ptr null where absent
    bool relu = false;
    NarrowConvPlan plan;
};

// The weight as the kernel has it in shared memory.
struct NarrowConvPackArgs {
    ParamArg weight;          // (out_channels, in_channels, taps, taps) of any strides
    int64_t strides[4] = {};  // in elements
    bool transposed = false;  // the way back: weight is (in_channels, out_channels, taps, taps), its taps reversed
    int in_channels = 0, out_channels = 0, taps = 0;
    void* packed = nullptr;  // narrow_conv_packed elements
};

// dweight = sum over pixels of x and dy
struct NarrowConvWeightArgs {
    NarrowConvShape shape;
    const void *x = nullptr, *dy = nullptr;
    NarrowConvWeightPlan plan;
    float* partials = nullptr;  // (plan.blocks, out_channels, in_channels, taps, taps)
};

}  // namespace gm
