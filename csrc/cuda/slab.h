// SPDX-License-Identifier: Apache-2.0
// How the tensor-copy kernels cut a plane into slabs, and the tensor maps that move one.
//
// A slab is what 128 threads hold: up to kBwdSlab / lanes tokens. Along rows it is a run of row-major tokens; along
// columns it is as many whole columns as fit, or a piece of one column where not even one fits. Slabs are counted in
// row-major (column-major) order; a reversed path walks them from the last to the first.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/params.h"
#include "cuda/scan_plan.h"

namespace gm {

constexpr int kSlabThreads = kBwdSlab / kFwdTokens;  // 128

struct SlabPlan {
    int tokens;     // of a full slab along rows: kBwdSlab / lanes
    int columns;    // whole columns of a slab; 0 where a column is cut into pieces of `tokens`
    int blocks;     // chunks of kFwdTokens tokens of a column (or piece), the last of them perhaps not full
    int pieces;     // pieces of a column, else 1
    int row_slabs;  // slabs of a plane along rows
    int column_slabs;
};

inline SlabPlan plan_slabs(int height, int width, int lanes) {
    SlabPlan plan{};
    const int chunks = kSlabThreads / lanes;
    plan.tokens = chunks * kFwdTokens;
    plan.row_slabs = static_cast<int>((static_cast<int64_t>(height) * width + plan.tokens - 1) / plan.tokens);
    plan.blocks = (height + kFwdTokens - 1) / kFwdTokens;
    plan.columns = std::min(chunks / plan.blocks, width);
    plan.pieces = 1;
    if (plan.columns == 0) {
        plan.blocks = chunks;
        plan.pieces = (height + plan.tokens - 1) / plan.tokens;
    }
    plan.column_slabs = plan.columns > 0 ? (width + plan.columns - 1) / plan.columns : width * plan.pieces;
    return plan;
}

// True where every slab starts at a multiple of plan.tokens along its path, whatever the direction: then the states
// that the portable kernels save and read are those at slab starts.
inline bool slabs_follow_path(const SlabPlan& plan, int height, int width) {
    const bool rows = static_cast<int64_t>(height) * width % plan.tokens == 0;
    const bool columns = plan.columns > 0 ? plan.columns * height == plan.tokens && width % plan.columns == 0
                                          : height % plan.tokens == 0;
    return rows && columns;
}

// Tensor maps of one image tensor: [0] moves a slab along rows, [1] one along columns. Coordinates of a slab's box are
// (0, first token, 0, group, batch) along rows and (0, column, row, group, batch) along columns; where channels and
// tokens are contiguous the first two are fused so that the engine moves longer runs, see slab_maps.cpp.
struct SlabMaps {
    CUtensorMap map[2];
    int row_fuse = 1;     // row-major tokens fused into the first dimension
    int column_fuse = 0;  // 1: (column, channel) fused into the first dimension
};

// False where the tensor cannot be described (strides that are not multiples of 16 bytes, boxes too large) or the
// driver is too old; the caller then takes the portable kernels.
bool make_slab_maps(const ImageArg& image, const ScanShape& shape, const SlabPlan& plan, DType dtype, SlabMaps& maps);

}  // namespace gm
