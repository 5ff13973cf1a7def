// SPDX-License-Identifier: Apache-2.0
// Which convolutions the kernels between few channels take, and their blocks. From the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/integers.h"
#include "cuda/common/tuning.h"

namespace gm {

// Those of the stem: 3x3 of 32 channels, and 7x7 of 3 channels and stride 2 as 4x4 on blocks of 2x2 pixels.
constexpr bool takes_narrow_conv(int64_t in_channels, int64_t out_channels, int64_t taps) {
    return out_channels == 32 && ((in_channels == 32 && taps == 3) || (in_channels == 16 && taps == 4));
}

constexpr int kNarrowConvColumns = 128;  // of a tile: two products of 64 pixels

// Elements of a packed weight: the taps of a column of the kernel, and all but the first of them a second time.
constexpr int64_t narrow_conv_packed(int in_channels, int out_channels, int taps) {
    return int64_t{taps} * (2 * taps - 1) * in_channels * out_channels;
}

struct NarrowConvPlan {
    int strips = 1, columns = 1;  // of an image: strips of rows, tiles of columns
    int64_t blocks = 0;
};

// As many strips as take least time, in rounds of all blocks that run at once, where a block loads taps - 1 rows more
// than it computes and does once what takes as long as some rows.
inline NarrowConvPlan narrow_conv_plan(int64_t batch, int height, int width, int taps) {
    constexpr int64_t kOnce = 2, kAtOnce = 2 * tuning::kMultiprocessors;
    NarrowConvPlan plan;
    plan.columns = static_cast<int>(div_up(width, kNarrowConvColumns));
    int64_t least = INT64_MAX;
    for (int strips = 1; strips <= std::min(height, 256); ++strips) {
        const int64_t rounds = div_up(batch * plan.columns * strips, kAtOnce);
        const int64_t time = rounds * (div_up(height, strips) + taps - 1 + kOnce);
        if (time < least) least = time, plan.strips = strips;
    }
    plan.blocks = batch * plan.columns * plan.strips;
    return plan;
}

// The gradient of the weight: tiles of 112 or 128 columns, whichever leave fewer pixels empty.
struct NarrowConvWeightPlan {
    int tile = 0, columns = 1;  // columns of a tile, tiles of a row
    int blocks = 0;
};

inline NarrowConvWeightPlan narrow_conv_weight_plan(int64_t batch, int height, int width) {
    constexpr int kTiles[] = {112, 128};
    NarrowConvWeightPlan plan;
    int64_t least = INT64_MAX;
    for (const int tile : kTiles) {
        const int64_t columns = div_up(width, tile);
        if (columns * tile < least) least = columns * tile, plan.tile = tile, plan.columns = static_cast<int>(columns);
    }
    // A block leaves as many sums as the weight has elements: not for fewer than some pairs of rows.
    constexpr int64_t kLeastPairs = 8;
    const int64_t pairs = batch * plan.columns * div_up(height, 2);
    plan.blocks = static_cast<int>(std::min(div_up(pairs, kLeastPairs), tuning::kMultiprocessors));
    return plan;
}

}  // namespace gm
