// SPDX-License-Identifier: Apache-2.0
// Arguments of the depthwise convolution.
#pragma once

#include "cuda/common/args.h"
#include "cuda/depthwise_conv/plan.h"

namespace gm {

// depthwise_conv3x3; block shapes in plan.h.
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
    ConvSm90Plan sm90;
    ImageArg x, y;
    DropPathArg drop_path;  // y is 0 in the images whose branch is dropped
    ParamArg weight, bias;  // (G, D, 3, 3), (G, D)
};

struct ConvBwdArgs {
    ConvShape shape;
    ConvBwdPlan plan;
    ConvSm90Plan sm90;
    ImageArg dy, x, dx;
    ImageArg y;             // the forward's result computed once more, or absent
    DropPathArg drop_path;  // as in the forward: dx is 0 where the branch is dropped
    ParamArg weight, bias;
    // Sums for each channel that a block leaves: dweight, dbias and, where there is one more, the sum of dx.
    int sums = kConvTaps + 1;
    float* partials = nullptr;  // rows of (G, D, 3, 3), then (G, D) for each of the others
};

}  // namespace gm
