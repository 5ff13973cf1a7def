// SPDX-License-Identifier: Apache-2.0
// How the tensor-copy kernels cut a plane into slabs, and the tensor maps that move one.
//
// A slab is what a block's threads hold: along rows a stretch of row-major tokens; along columns as many whole columns
// as fit, or as many runs of a column that follow one another (cut_columns). Slabs are counted in row-major
// (column-major) order, whatever way the path goes through them. The backward's blocks have kSlabThreads threads; the
// forward's may have twice that and slabs of twice the size, two `parts`. States are saved for parts, by their number.
//
// Where planes are too few to give every block one, the blocks of a group share them, a team of `ways` to a plane: one
// takes every ways-th slab, and what enters a slab comes from the others through device memory (look_back in
// scan_sm90.cuh).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/params.h"
#include "cuda/scan_plan.h"
#include "cuda/tensor_map.h"

namespace gm {

// Slabs of a plane between states that all later ones may start from, where a team has more blocks than that.
constexpr int kSegment = 32;

// A number that kernels divide by, by multiplication (slab_walk.cuh): exact while it and what it divides have a product
// below 2^32.
struct Divisor {
    uint32_t inverse;  // 2^32 / divisor, rounded up; 0 for 1
    static Divisor of(int divisor) {
        return {divisor > 1 ? static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor) : 0u};
    }
};

struct SlabPlan {
    Divisor of_groups, of_columns, of_runs, of_ways;  // by the groups, by `columns` or 1, by `runs` or 1, by `ways`

    int tokens;         // slots of a slab
    int columns;        // whole columns of a slab, or 0
    int blocks;         // chunks of kFwdTokens tokens of a whole column, the last of them perhaps not full
    int run_rows;       // rows of a run, or 0
    int run_shift;      // log2 of its chunks
    int runs;           // of a column
    bool divides_runs;  // of_runs is exact
    int runs_of_slab;   // consecutive ones
    int row_slabs;      // of a plane along rows
    int column_slabs;
    int slabs;  // the larger of both
    int ways;   // blocks of a team, to whom a plane's slabs are dealt, each with sums of its own
    int teams;  // of a group where ways > 1; else the launch decides
};

inline SlabPlan plan_slabs(const ScanShape& shape, int parts) {
    const int height = shape.height, width = shape.width, lanes = shape.lanes;
    SlabPlan plan{};
    const int part_tokens = kSlabThreads / lanes * kFwdTokens;
    plan.tokens = parts * part_tokens;
    plan.row_slabs = static_cast<int>((static_cast<int64_t>(height) * width + plan.tokens - 1) / plan.tokens);
    const ColumnCut cut = cut_columns(height, width, shape.dim, part_tokens);
    plan.columns = parts * static_cast<int>(cut.columns);
    plan.run_rows = static_cast<int>(cut.rows);
    if (plan.columns > 0) {
        plan.blocks = (height + kFwdTokens - 1) / kFwdTokens;
        plan.column_slabs = (width + plan.columns - 1) / plan.columns;
    } else {
        while (kFwdTokens << plan.run_shift < plan.run_rows) ++plan.run_shift;
        plan.runs = (height + plan.run_rows - 1) / plan.run_rows;
        plan.runs_of_slab = plan.tokens / plan.run_rows;
        const int64_t all = static_cast<int64_t>(width) * plan.runs;
        plan.column_slabs = static_cast<int>((all + plan.runs_of_slab - 1) / plan.runs_of_slab);
    }
    plan.slabs = std::max(plan.row_slabs, plan.column_slabs);
    plan.ways = 1;
    plan.of_groups = Divisor::of(shape.groups);
    plan.of_columns = Divisor::of(std::max(plan.columns, 1));
    plan.of_runs = Divisor::of(std::max(plan.runs, 1));
    plan.divides_runs = static_cast<double>(plan.runs) * plan.runs * (width + plan.runs_of_slab) < 4e9;
    return plan;
}

// Shares the planes where that pays: where they are several slabs each and would leave a quarter of the blocks idle
// that the device runs at once, or more. Of the teams that take nearly the fewest slabs a block, within a sixteenth,
// the smallest: a block folds the aggregates of as many slabs as its team has blocks.
inline void share_planes(const ScanShape& shape, int64_t at_once, SlabPlan& plan) {
    const int64_t members = at_once / shape.groups;
    if (4 * shape.batch * shape.groups >= 3 * at_once || members <= shape.batch) return;
    if (std::min(plan.row_slabs, plan.column_slabs) <= 1) return;
    const auto up = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
    const auto ways = [&](int64_t teams) { return std::min<int64_t>(members / teams, plan.slabs); };
    const auto cost = [&](int64_t teams) { return up(shape.batch, teams) * up(plan.slabs, ways(teams)); };
    int64_t least = cost(1), teams = shape.batch;
    for (int64_t t = 2; t <= shape.batch; ++t) least = std::min(least, cost(t));
    while (16 * cost(teams) > 17 * least) --teams;
    plan.ways = static_cast<int>(ways(teams)), plan.teams = static_cast<int>(teams);
    plan.of_ways = Divisor::of(plan.ways);
}

// Floats of device memory, `width` channels wide, through which the blocks of a plane pass states on: two for every
// slab and channel, then, where a team is larger than a segment, one for every segment but the first, and channel.
__host__ __device__ inline int64_t exchange_of_plane(const SlabPlan& plan, int width) {
    const int64_t segments = plan.ways > kSegment ? (plan.slabs - 1) / kSegment : 0;
    return (2 * plan.slabs + segments) * width;
}
inline int64_t exchange_floats(const ScanShape& shape, const SlabPlan& plan) {
    return plan.ways == 1 ? 0 : shape.batch * shape.groups * exchange_of_plane(plan, shape.lanes * kVec);
}

// How the coordinates of a slab's boxes follow from its first (column, row); see slab_maps.cpp.
struct SlabMapKind {
    int row_shift;     // log2 of the row-major tokens fused with the channels
    bool column_fuse;  // columns are fused with the channels
    int boxes[2];      // of a slab along rows, along whole columns: 2 where one would have too many tokens
};

// False where the copy engine can't move `image`: addresses or strides that are not multiples of 16 bytes, or a driver
// that refuses. map[0] moves a slab along rows, map[1] one along columns.
bool make_slab_maps(const ImageArg& image, const ScanShape& shape, const SlabPlan& plan, DType dtype,
                    CUtensorMap (&map)[2], SlabMapKind& kind);

}  // namespace gm
