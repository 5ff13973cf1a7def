// SPDX-License-Identifier: Apache-2.0
// Arguments of the depthwise convolution.
#pragma once

#include "cuda/common/args.h"
#include "cuda/depthwise_conv/plan.h"

namespace gm {

// depthwise_conv3x3; plans in plan.h.
struct ConvShape {
    int64_t batch;
    int height, width, groups, dim;
    Activation activation;
    bool aligned;  // every image allows aligned accesses, to 4 channels or, backward, 16 bytes; D is a multiple of 4 or
                   // 8
};

struct ConvFwdArgs {
    ConvShape shape;
    ConvFwdPlan plan;
    ImageArg x, y;
    KeptArg kept;           // y is 0 in the images that are not
    ParamArg weight, bias;  // (G, D, 3, 3), (G, D)
};

struct ConvBwdArgs {
    ConvShape shape;
    ConvBwdPlan plan;
    ImageArg dy, x, dx;
    ImageArg y;    // the forward's result once more, or absent
    KeptArg kept;  // as in the forward: dx is 0 in the others
    ParamArg weight, bias;
    // Sums of a channel that a block leaves: dweight, dbias and, with one more, of dx.
    int sums = kConvTaps + 1;
    float* partials = nullptr;  // rows of (G, D, 3, 3), then (G, D) for each of the others
};

}  // namespace gm
