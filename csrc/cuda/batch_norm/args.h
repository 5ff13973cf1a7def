// SPDX-License-Identifier: Apache-2.0
// Arguments of the BatchNorm kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/args.h"
#include "cuda/common/tuning.h"

namespace gm {

// batch_norm_relu on rows (rows, channels), all of them contiguous and aligned to 16 bytes.
constexpr int kBatchNormUnit = 8, kBatchNormThreads = 256;  // channels of a thread; threads of a block
struct BatchNormArgs {
    const void *x = nullptr, *dy = nullptr;
    void *y = nullptr, *dx = nullptr;
    int64_t rows = 0;
    int channels = 0, blocks = 0;  // blocks of the sums
    ParamArg weight, bias;
    float eps = 0.f;
    float* stats = nullptr;     // (3, channels): mean, variance by rows - 1, 1 / sqrt(variance by rows + eps)
    float* means = nullptr;     // backward: (2, channels), of g and of g (x - mean) / deviation^2
    float* partials = nullptr;  // (blocks, 2, channels)
    ParamOut dweight, dbias;
};

// The weight (out, channels, taps, taps) of a convolution and the BatchNorm after it as one weight, (out, folded_taps,
// folded_taps, folded_channels), and a bias.
struct FoldArgs {
    ParamArg weight;  // of any strides
    int64_t strides[4] = {};
    int out = 0, channels = 0;
    ParamArg norm_weight, norm_bias, mean, variance;
    float eps = 0.f;
    bool blocks = false;  // for an image whose blocks of 2 x 2 pixels are channels
    int folded_taps = 0, folded_channels = 0;
    void *folded = nullptr, *bias = nullptr;
};

// `wanted`, unless that leaves a thread fewer than four rows.
inline int batch_norm_blocks(int64_t rows, int channels, int64_t wanted) {
    constexpr int64_t kLeastRows = 4;
    const int64_t rows_of_block = kBatchNormThreads / (channels / kBatchNormUnit) * kLeastRows;
    return static_cast<int>(std::min((rows + rows_of_block - 1) / rows_of_block, wanted));
}

}  // namespace gm
