// SPDX-License-Identifier: Apache-2.0
// Arguments of the channel affinity.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

// gate = sigmoid(fc2(relu(fc1(pooled)))). Channel m of the gate is at m / group_dim * group_width + m % group_dim.
struct AffinityArgs {
    int batch = 0, dim = 0, hidden = 0, out_dim = 0, group_dim = 0, group_width = 0;
    const float* partials = nullptr;  // forward: (batch, strips, dim), sums over the strips of an image
    int strips = 0;
    float factor = 1.f;       // 1 / pixels of an image
    float* pooled = nullptr;  // (batch, dim): written by the forward
    ParamArg fc1_weight, fc1_bias, fc2_weight, fc2_bias;
    // Parameters that a block copies to shared memory: the first staged_count of fc1_weight, fc2_weight, fc1_bias and
    // fc2_bias; where it is 0, they are read in place.
    struct Staged {
        const void* from;
        int at, bytes;
    } staged[4] = {};
    int staged_count = 0, staged_bytes = 0;
    float* hidden_out = nullptr;  // (batch, hidden), after the relu
    float* gate = nullptr;        // (batch, out_dim / group_dim * group_width)
    // backward
    const float* dgate =
        nullptr;  // (batch, dgate_parts, dgate_stride), to be summed over the parts; laid out like gate
    int dgate_parts = 1;
    int64_t dgate_stride = 0;
    float* dpooled = nullptr;  // (batch, dim)
    float* scratch = nullptr;  // (batch, out_dim + hidden): gradients before the sigmoid, before the relu
    ParamOut dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias;
};

}  // namespace gm
