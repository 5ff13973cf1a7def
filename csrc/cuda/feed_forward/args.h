// SPDX-License-Identifier: Apache-2.0
// Arguments of the feed-forward kernels.
#pragma once

#include <cstdint>

#include "cuda/depthwise_conv/args.h"
#include "cuda/feed_forward/plan.h"

namespace gm {

struct FeedForwardArgs {
    FeedForwardPlan plan;
    int64_t batch;
    int height, width, channels, hidden_pad;
    ImageArg x, out;        // pixels and their channels aligned to 16 bytes
    bool residual = false;  // out = x + [drop-path factor of the image] * result
    DropPathArg drop_path;
    float eps = 0.f;
    ParamArg norm_weight, norm_bias, fc2_bias;  // (C,)
    // In the dtype of the images, with zeros after `hidden`: fc1_weight (hidden_pad, C), fc2_weight (C, hidden_pad);
    // fc1_bias (hidden_blocks * 64,), conv_weight (hidden_blocks * 64, 3, 4), whose tap (i, j) is at i * 4 + j.
    const void *fc1_weight = nullptr, *fc2_weight = nullptr, *fc1_bias = nullptr, *conv_weight = nullptr;
    const float* conv_bias = nullptr;  // (hidden_blocks * 64,)
};

// The backward from dout to the gradient of the hidden image, with the activated image and the sums of the convolution:
// `conv` without x and dy.
struct FeedForwardBwdArgs {
    ConvBwdArgs conv;
    int channels = 0;                                         // of a pixel of xn and dout, zeros behind C included
    const void *xn = nullptr, *dout = nullptr;                // (batch, height, width, channels)
    const void *fc1_weight = nullptr, *fc2_weight = nullptr;  // (hidden, channels), (channels, hidden)
    const void* fc1_bias = nullptr;                           // (hidden,), all three in the dtype of the images
    float scale = 1.f;                                        // what the branch is multiplied by
};

}  // namespace gm
