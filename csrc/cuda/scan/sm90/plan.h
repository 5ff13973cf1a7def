// SPDX-License-Identifier: Apache-2.0
// How the sm_90 scan kernels cut a plane (one group of one image) into tiles, and the tensor maps by which TMA moves a
// tile.
//
// A tile is what the threads of a block hold at a time. Along rows it is a stretch of tokens in row-major order. Along
// columns it is as many whole columns as fit, or as many runs (pieces of a column) as fit, one after another: see
// cut_columns in ../plan.h. Tiles are numbered in row-major or column-major order, whichever way the path goes through
// them. Blocks of the backward have kTileThreads threads. Those of the forward may have twice as many; their tile then
// has twice the size and two `parts`. States are saved once for each part, under its number.
//
// Where it is faster, several blocks share a plane. The `blocks_per_plane` blocks of a team take the tiles of a plane
// in turn, and the state that enters a tile comes from the other blocks through device memory (look_back.cuh). There
// are two reasons to share. With too few planes, some multiprocessors would have nothing to do. And where images are
// stored so that the channels of a group are fewer bytes than one memory access moves, the groups of an image should
// be read at about the same time, while the cache still holds what belongs to the other groups: with a plane a block,
// too many images would be read at a time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/common/tensor_map.h"
#include "cuda/common/tuning.h"
#include "cuda/scan/args.h"
#include "cuda/scan/plan.h"

namespace gm {

// Tiles between two states that any later tile may start from, in teams of more blocks than that (look_back.cuh).
constexpr int kSegment = 32;

// A divisor that kernels divide by with one multiplication (tile_scheduler.cuh). Exact while the product of the
// divisor and the dividend is below 2^32.
struct Divisor {
    uint32_t inverse;  // 2^32 / divisor, rounded up; 0 for 1
    static Divisor of(int divisor) {
        return {divisor > 1 ? static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor) : 0u};
    }
};

struct TilePlan {
    Divisor of_groups, of_columns, of_runs,
        of_blocks_per_plane;  // groups; `columns` or 1; `runs` or 1; `blocks_per_plane`

    int tokens;         // token slots of a tile
    int columns;        // whole columns of a tile; 0 where tiles are made of runs
    int blocks;         // chunks of kFwdTokens tokens in a whole column; the last one may be partly filled
    int run_rows;       // rows of a run; 0 where tiles are made of whole columns
    int run_shift;      // log2 of the chunks of a run
    int runs;           // runs of a column
    bool divides_runs;  // of_runs is exact
    int runs_per_tile;  // they follow one another on the path
    int row_tiles;      // tiles of a plane along rows
    int column_tiles;
    int tiles;             // the larger of both
    int blocks_per_plane;  // blocks of a team; each leaves a row of partial sums
    int teams;             // teams of a group where blocks_per_plane > 1; else the launch decides
};

inline TilePlan plan_tiles(const ScanShape& shape, int parts) {
    const int height = shape.height, width = shape.width, lanes = shape.lanes;
    TilePlan plan{};
    const int part_tokens = kTileThreads / lanes * kFwdTokens;
    plan.tokens = parts * part_tokens;
    plan.row_tiles = static_cast<int>((static_cast<int64_t>(height) * width + plan.tokens - 1) / plan.tokens);
    const ColumnCut cut = cut_columns(height, width, shape.dim, part_tokens);
    plan.columns = parts * static_cast<int>(cut.columns);
    plan.run_rows = static_cast<int>(cut.rows);
    if (plan.columns > 0) {
        plan.blocks = (height + kFwdTokens - 1) / kFwdTokens;
        plan.column_tiles = (width + plan.columns - 1) / plan.columns;
    } else {
        while (kFwdTokens << plan.run_shift < plan.run_rows) ++plan.run_shift;
        plan.runs = (height + plan.run_rows - 1) / plan.run_rows;
        plan.runs_per_tile = plan.tokens / plan.run_rows;
        const int64_t all = static_cast<int64_t>(width) * plan.runs;
        plan.column_tiles = static_cast<int>((all + plan.runs_per_tile - 1) / plan.runs_per_tile);
    }
    plan.tiles = std::max(plan.row_tiles, plan.column_tiles);
    plan.blocks_per_plane = 1;
    plan.of_groups = Divisor::of(shape.groups);
    plan.of_columns = Divisor::of(std::max(plan.columns, 1));
    plan.of_runs = Divisor::of(std::max(plan.runs, 1));
    plan.of_blocks_per_plane = Divisor::of(plan.blocks_per_plane);
    plan.divides_runs = static_cast<double>(plan.runs) * plan.runs * (width + plan.runs_per_tile) < 4e9;
    return plan;
}

// `at_once`: blocks that the device runs at once. `cached`: images that fit in its L2 cache, or 0 where a memory
// access never serves two groups. Takes the number of blocks of the least time by a model of it (tuning.h).
inline void share_planes(const ScanShape& shape, int64_t at_once, double cached, TilePlan& plan) {
    using namespace tuning;
    if (std::min(plan.row_tiles, plan.column_tiles) <= 1) return;
    const int64_t members = std::max<int64_t>(at_once / shape.groups, 1);
    const auto time = [&](int64_t teams, int64_t blocks_per_plane) {
        const int64_t planes = (shape.batch + teams - 1) / teams,
                      tiles = (planes * plan.tiles + blocks_per_plane - 1) / blocks_per_plane;
        const double lost =
            cached > 0. ? std::clamp((static_cast<double>(teams) / cached - kShareCached) / kShareRise, 0., 1.) : 0.;
        const double waits = blocks_per_plane > 1 ? kShareWaits * std::log2(static_cast<double>(blocks_per_plane)) : 0.;
        return static_cast<double>(tiles) * (1. + kShareLost * lost + waits) + (blocks_per_plane > 1 ? kShareOnce : 0.);
    };
    double least = time(std::min(members, shape.batch), 1);
    for (int64_t teams = std::min(members / 2, shape.batch); teams > 0; --teams) {
        const int64_t blocks_per_plane = std::min<int64_t>(members / teams, plan.tiles);
        const double taken = time(teams, blocks_per_plane);
        if (taken >= least) continue;
        least = taken, plan.blocks_per_plane = static_cast<int>(blocks_per_plane), plan.teams = static_cast<int>(teams);
    }
    plan.of_blocks_per_plane = Divisor::of(plan.blocks_per_plane);
}

// Groups of 65 to 96 channels (GroupMamba's 87, padded to 88) take 24 lanes a token instead of 32, in blocks of 96
// threads instead of 128: the same tiles, without a warp that is a third idle (43 to 35 us at 352 x 14,
// docs/kernel-history). They take up to 6 step features, enough for ceil(channels / 16); a larger rank would cost
// every tile instructions.
constexpr int kNarrowLanes = 24, kNarrowRank = 6;
inline int sm90_lanes(const ScanShape& shape) {
    const bool narrow = shape.lanes == 32 && shape.dim <= kNarrowLanes * kVec && shape.rank <= kNarrowRank;
    return narrow ? kNarrowLanes : shape.lanes;
}

// Floats of device memory through which the blocks of a plane pass states on, for `width` channels: two for each tile
// and channel (its aggregate), then, in teams larger than a segment, one for each segment but the first and channel
// (the state that enters it).
__host__ __device__ inline int64_t inter_block_floats_per_plane(const TilePlan& plan, int width) {
    const int64_t segments = plan.blocks_per_plane > kSegment ? (plan.tiles - 1) / kSegment : 0;
    return (2 * plan.tiles + segments) * width;
}
inline int64_t inter_block_floats(const ScanShape& shape, const TilePlan& plan) {
    return plan.blocks_per_plane == 1
               ? 0
               : shape.batch * shape.groups * inter_block_floats_per_plane(plan, sm90_lanes(shape) * kVec);
}

// How the coordinates of a tile's boxes follow from its first column and row; see tma_maps.cpp.
struct TileMapKind {
    int row_shift;     // log2 of the row-major tokens that are fused with the channels into one dimension
    bool column_fuse;  // columns are fused with the channels into one dimension
    int row_boxes;     // boxes of a tile along rows: 2 where one box would have too many tokens
};

// Tensor maps of an image of `groups` groups of `channels` channels: `shape.dim`, or fewer where they are padded, or
// more where a tile has a slice of them. map[0] moves a tile along rows, map[1] one along columns. False where TMA
// can't move it: an address or a stride that is not a multiple of 16 bytes, or a driver that refuses.
bool make_tile_maps(const ImageArg& image, int groups, int channels, const ScanShape& shape, const TilePlan& plan,
                    DType dtype, CUtensorMap (&map)[2], TileMapKind& kind);

}  // namespace gm
