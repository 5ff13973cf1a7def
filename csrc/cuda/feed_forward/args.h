// SPDX-License-Identifier: Apache-2.0
// Arguments of the feed-forward kernel.
#pragma once

#include <cstdint>

#include "cuda/feed_forward/plan.h"

namespace gm {

struct FeedForwardArgs {
    FeedForwardPlan plan;
    int64_t batch;
    int height, width, channels, hidden_pad;
    ImageArg x, out;         // pixels and their channels aligned to 16 bytes
    void* hidden = nullptr;  // (batch, H, W, hidden_pad), the image before the convolution, or null
    bool residual = false;   // out = x + [scale of the image] * result
    KeptArg kept;
    float eps = 0.f;
    ParamArg norm_weight, norm_bias, fc2_bias;  // (C,)
    // In the dtype of the images, zeros behind `hidden`: (hidden_pad, C), (C, hidden_pad); with whole blocks of hidden
    // channels (hidden_blocks * 64,) and (hidden_blocks * 64, 3, 4), a tap (i, j) at i * 4 + j.
    const void *fc1_weight = nullptr, *fc2_weight = nullptr, *fc1_bias = nullptr, *conv_weight = nullptr;
    const float* conv_bias = nullptr;  // (hidden_blocks * 64,)
};

}  // namespace gm
