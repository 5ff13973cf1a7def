// SPDX-License-Identifier: Apache-2.0
// The feed-forward network as one kernel: its tiles, and which shapes it takes. From the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/args.h"
#include "cuda/common/tuning.h"

namespace gm {

// A block computes 14 columns by 14 or 7 rows of the result from 16 columns by 16 or 9 rows of x: 16 pixels are the
// rows of a tensor-core product, of which the last two have no neighbour to the right. 14 divides the sides of the
// usual stages.
constexpr int kFeedForwardColumns = 14;
constexpr int kFeedForwardBlock = 64;  // channels of x, and of the hidden image, in one step
// Wider images would need more registers for their sums than there are; their products are also large enough for
// cuBLAS.
constexpr int kFeedForwardChannels = 192;

// With 128 the products between the steps of the backward's convolution take longer than memory does: 913 us for 876,
// 128 x 28 x 28 both ways.
constexpr int kFeedForwardBwdChannels = 64;

// With 14 rows 31% of x and the hidden image are computed twice, with 7 rows 47%: 352 and 431 us at 64 x 56 x 56 with
// an earlier convolution, although three blocks then fit on a multiprocessor and not two. With more than 64 channels
// the sums of 14 rows take more registers than two blocks have.
constexpr int feed_forward_rows(int channel_blocks) { return channel_blocks == 1 ? 14 : 7; }

struct FeedForwardPlan {
    int channel_blocks;           // of kFeedForwardBlock channels
    int tile_columns, tile_rows;  // tiles of an image
    int hidden_blocks;
    int64_t blocks;
};

inline FeedForwardPlan feed_forward_plan(int64_t batch, int height, int width, int channels, int hidden) {
    const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
    FeedForwardPlan p{};
    p.channel_blocks = up(channels, kFeedForwardBlock);
    p.tile_columns = up(width, kFeedForwardColumns);
    p.tile_rows = up(height, feed_forward_rows(p.channel_blocks));
    p.hidden_blocks = up(hidden, kFeedForwardBlock);
    p.blocks = batch * p.tile_rows * p.tile_columns;
    return p;
}

// Why several kernels are the faster way, or null where one is.
inline const char* why_not_feed_forward(int64_t batch, int height, int width, int channels, int hidden, DType dtype) {
    if (dtype == DType::kFloat) return "images are float32, not float16 or bfloat16";
    if (channels > kFeedForwardChannels) return "there are more than 192 channels";
    if (channels % 8 != 0) return "the channels are no multiple of 8";
    const FeedForwardPlan p = feed_forward_plan(batch, height, width, channels, hidden);
    if (p.blocks < tuning::kFeedForwardTiles) return "there are too few tiles for the GPU";
    const double computed = static_cast<double>(p.blocks) * kFeedForwardColumns * feed_forward_rows(p.channel_blocks);
    const bool filled = static_cast<double>(batch) * height * width >= tuning::kFeedForwardFilled * computed;
    return filled ? nullptr : "the image fills its tiles of 14 columns badly";
}

}  // namespace gm
