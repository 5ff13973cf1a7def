// SPDX-License-Identifier: Apache-2.0
// How the tensor-copy kernels cut a plane into slabs, and the tensor maps that move one.
//
// A slab is what a block's threads hold: along rows a stretch of row-major tokens; along columns as many whole columns
// as fit, or as many runs of a column that follow one another (cut_columns). Slabs are counted in row-major
// (column-major) order, whatever way the path goes through them. The backward's blocks have kSlabThreads threads; the
// forward's may have twice that and slabs of twice the size, two `parts`. States are saved for parts, by their number.
//
// Where that is faster, blocks of a group share its planes, teams of `ways` blocks: a team takes its planes' slabs in
// turn, and what enters a slab comes from the others through device memory (look_back.cuh). There are two
// reasons to share: too few planes to give every block one, and images that lie so that a group's channels of a token
// are less than what the memory moves at once. The groups of an image must then be read before the cache has lost what
// belongs to others, and blocks that have a plane each read too many images at a time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/common/tensor_map.h"
#include "cuda/scan/args.h"
#include "cuda/scan/plan.h"

namespace gm {

// Slabs of a plane between states that all later ones may start from, where a team has more blocks than that.
constexpr int kSegment = 32;

// A number that kernels divide by, by multiplication (walk.cuh): exact while it and what it divides have a product
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
    int ways;   // blocks of a team, each with sums of its own
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
    plan.of_ways = Divisor::of(plan.ways);
    plan.divides_runs = static_cast<double>(plan.runs) * plan.runs * (width + plan.runs_of_slab) < 4e9;
    return plan;
}

// `at_once`: blocks that the device runs at once. `cached`: images that its cache holds, 0 where groups share none of
// their memory's accesses. The times are in units of a slab's, fitted to what an H100 takes (bench/NOTES.md).
inline void share_planes(const ScanShape& shape, int64_t at_once, double cached, SlabPlan& plan) {
    // A slab's wait for others, for every doubling of the team; once, a launch of blocks that must all run and, but in
    // a layer's forward, clearing memory; and what a slab takes longer where more images are read at once than the
    // cache holds.
    constexpr double kWaits = 0.09, kOnce = 1., kLost = 0.65;
    if (std::min(plan.row_slabs, plan.column_slabs) <= 1) return;
    const int64_t members = std::max<int64_t>(at_once / shape.groups, 1);
    const auto time = [&](int64_t teams, int64_t ways) {
        const int64_t planes = (shape.batch + teams - 1) / teams, slabs = (planes * plan.slabs + ways - 1) / ways;
        const double lost = cached > 0. ? std::clamp((static_cast<double>(teams) / cached - 0.4) / 1.2, 0., 1.) : 0.;
        const double waits = ways > 1 ? kWaits * std::log2(static_cast<double>(ways)) : 0.;
        return static_cast<double>(slabs) * (1. + kLost * lost + waits) + (ways > 1 ? kOnce : 0.);
    };
    double least = time(std::min(members, shape.batch), 1);
    for (int64_t teams = std::min(members / 2, shape.batch); teams > 0; --teams) {
        const int64_t ways = std::min<int64_t>(members / teams, plan.slabs);
        const double taken = time(teams, ways);
        if (taken >= least) continue;
        least = taken, plan.ways = static_cast<int>(ways), plan.teams = static_cast<int>(teams);
    }
    plan.of_ways = Divisor::of(plan.ways);
}

// Groups of 65 to 96 channels (GroupMamba's 87 are kept as 88) take 24 lanes a token in place of 32, in blocks of 96
// threads in place of 128: the same slabs, and no warp that is a third idle (forward v11 in bench/NOTES.md).
// Their rank in the field is 5 or 6; what a larger one needs would cost every slab instructions.
constexpr int kNarrowLanes = 24, kNarrowRank = 6;
inline int sm90_lanes(const ScanShape& shape) {
    const bool narrow = shape.lanes == 32 && shape.dim <= kNarrowLanes * kVec && shape.rank <= kNarrowRank;
    return narrow ? kNarrowLanes : shape.lanes;
}

// Floats of device memory, `width` channels wide, through which the blocks of a plane pass states on: two for every
// slab and channel, then, where a team is larger than a segment, one for every segment but the first, and channel.
__host__ __device__ inline int64_t exchange_of_plane(const SlabPlan& plan, int width) {
    const int64_t segments = plan.ways > kSegment ? (plan.slabs - 1) / kSegment : 0;
    return (2 * plan.slabs + segments) * width;
}
inline int64_t exchange_floats(const ScanShape& shape, const SlabPlan& plan) {
    return plan.ways == 1 ? 0 : shape.batch * shape.groups * exchange_of_plane(plan, sm90_lanes(shape) * kVec);
}

// How the coordinates of a slab's boxes follow from its first (column, row); see tma_maps.cpp.
struct SlabMapKind {
    int row_shift;     // log2 of the row-major tokens fused with the channels
    bool column_fuse;  // columns are fused with the channels
    int row_boxes;     // of a slab along rows: 2 where one would have too many tokens
};

// False where the copy engine can't move `image`: addresses or strides that are not multiples of 16 bytes, or a driver
// that refuses. map[0] moves a slab along rows, map[1] one along columns.
bool make_slab_maps(const ImageArg& image, const ScanShape& shape, const SlabPlan& plan, DType dtype,
                    CUtensorMap (&map)[2], SlabMapKind& kind);

}  // namespace gm
