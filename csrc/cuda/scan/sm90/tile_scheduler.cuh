// SPDX-License-Identifier: Apache-2.0
// Which tiles a block of the sm_90 scan kernels takes, and which tokens of a tile a thread takes.
//
// A flip costs nothing: a reversed path takes tiles, chunks and tokens in reverse. A chunk is 7 tokens of one
// row-major stretch or of one column, and belongs to the lanes of one token. Along columns, chunks of neighbouring
// threads lie in neighbouring columns, so that their rows of shared memory are adjacent and meet no bank twice;
// `order` is the place of a chunk on the path.
//
// Tokens beyond the plane's last row or column are read as zeros. They lie at the end of the path (reversed: at its
// start), where they change nothing. Those beyond the end of a column lie inside the path: their steps are set to 0,
// which leaves the state as it is.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/scan/sm90/args.h"
#include "cuda/scan/sm90/select.h"

namespace gm {

constexpr int kSm90Stages = 2;

__device__ __forceinline__ int operator/(int n, Divisor by) {
    return by.inverse == 0 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), by.inverse));
}

// Constants of a block whose tile has kParts parts, each of kTileThreads / scan_lanes chunks; kLanes threads share a
// token. kWhole: every lane has 4 channels and LayerNorm counts them all. kRuns: along columns tiles are made of runs.
// kBare: a scan of a cross scan, without z, norm and gates; all groups read one image u and, in the backward, one dy.
// kProducts: steps, and the gradients behind them, by tensor cores (phases/step_products.cuh).
template <int kLanesOfToken, bool kWholeWidth, int kPartsPerTile, bool kRunsOfColumns, bool kBareScan,
          bool kProductSteps = false>
struct Sm90Block {
    static constexpr int kLanes = kLanesOfToken, kParts = kPartsPerTile;
    static constexpr bool kWhole = kWholeWidth, kRuns = kRunsOfColumns, kBare = kBareScan, kProducts = kProductSteps;
    static constexpr int kWidth = kLanes * kVec;  // channels that the lanes have room for
    static constexpr int kChunks = kParts * kTileThreads / (kLanes == kNarrowLanes ? 32 : kLanes);
    static constexpr int kThreads = kChunks * kLanes, kTokens = kChunks * kFwdTokens;
    // An octet is eight neighbouring lanes. It never lies in two warps; the lanes of a token may.
    static constexpr bool kInWarp = 32 % kLanes == 0;
    static constexpr int kOctets = kLanes / 8;  // of a token
    // The chunk scan (chunk_scan.cuh): chunks of a scan lane, scan lanes of a channel, and the floats of padding
    // behind a lane's chunks. The padding puts the channels that a warp reads into banks of their own; at least 4
    // floats keep 16-byte alignment. With 8 chunks a lane in blocks of 2 parts, token-major images at 56 x 56 would
    // take 6% less time, but blocks that are not whole would spill.
    static constexpr int kLaneChunks = kWhole ? 4 * kParts : 4;
    static constexpr int kScanLanes = kChunks / kLaneChunks;
    static constexpr int kPad = kScanLanes == 1 ? 0 : kScanLanes > 8 ? 4 : 32 / kScanLanes;
    static constexpr int kAggregates = kScanLanes * (kLaneChunks * kWidth + kPad);
    // Fetching features: a thread has kFetchTokens tokens, and of each of them every kSharers-th feature.
    static constexpr int kFetchTokens = kTokens > kThreads ? 2 : 1;
    static constexpr int kSharers = kLanes > 8 ? kLanes / 8 / kParts : 1;
    static_assert(kParts == 1 || kLanes <= 8);
    // Of products, the places of a tile's tokens (product_features.cuh): one more than there are, and an even number.
    static constexpr int kPlaces = (kTokens + 2) / 2 * 2;
    static constexpr int kFeatures = kProducts ? kProductFeatures : kSm90Features<kLanes>;
    static constexpr int kFetch = (kFeatures + kSharers - 1) / kSharers;
    // Blocks of 24 lanes compute with this many step features even if there are fewer: loops over them are unrolled.
    static constexpr int kConstantRank = kLanes == kNarrowLanes ? kFeatures - 2 : 0;

    __device__ static int aggregate(int chunk) { return chunk * kWidth + chunk / kLaneChunks * kPad; }
    __host__ __device__ static int dim(const ScanShape& s) { return kWhole ? kWidth : s.dim; }
    // Channels of saved states and of partial sums: those that exist, fewer than dim() where they are padded; of a bare
    // scan all for which a slice has room.
    __host__ __device__ static int real_dim(const ScanShape& s) {
        return kWhole ? kWidth : kBare ? s.dim : s.param_dim;
    }
    // The first channel of a group among its scan's, and the number of those that exist from there on.
    __host__ __device__ static int first_channel(const ScanShape& s, int group) {
        return kBare ? group / s.scans * s.dim : 0;
    }
    __host__ __device__ static int channels(const ScanShape& s, int group) {
        return kBare ? min(s.dim, s.param_dim - first_channel(s, group)) : real_dim(s);
    }
    // The place of its first channel among the parameters.
    __host__ __device__ static int64_t first_param(const ScanShape& s, int group) {
        if (kBare) return static_cast<int64_t>(group % s.scans) * s.param_dim + first_channel(s, group);
        return static_cast<int64_t>(group) * real_dim(s);
    }
    // Floats of a token's features in shared memory (B, C, dt_0, ...), a multiple of 4.
    __host__ __device__ static int width(const ScanShape& s) {
        if (kProducts) return rank_tiles(s) * kRankTile + 4;
        return kFeatures <= 4 ? 4 : kConstantRank > 0 ? kFeatures : (s.rank + 5) / 4 * 4;
    }
    // Step features that one matrix product takes, and how many times as many the rank is, rounded up.
    static constexpr int kRankTile = 8;
    __host__ __device__ static int rank_tiles(const ScanShape& s) { return (s.rank + kRankTile - 1) / kRankTile; }
    // Bytes of one tensor's tile in shared memory, a multiple of 128. The slot after the last token holds zeros;
    // threads without tokens or channels of their own read it, and nobody writes it.
    __host__ __device__ static int tile_bytes(const ScanShape& s) {
        return ((kTokens + 1) * dim(s) * 2 + 127) / 128 * 128;
    }
};

// A tile of a plane. `first` is its first column; along rows the row-major number of its first token; where tiles are
// made of runs the column-major number of its first run.
struct TileCursor {
    int batch, step, first;
};

// A run of a column, found by its column-major number.
struct ColumnRun {
    int column, row;  // of its first token
};
__device__ __forceinline__ ColumnRun run_of(const TilePlan& plan, int number) {
    const int column = plan.divides_runs ? number / plan.of_runs : number / plan.runs;
    return {column, (number - column * plan.runs) * plan.run_rows};
}

// The groups of a launch of bare scans are its scans of the first slice of channels, then those of the next: which scan
// and which slice a block has.
template <bool kBare>
struct ScanAndSlice {};
template <>
struct ScanAndSlice<true> {
    int scan, slice;
};

// The tiles of a block, all of one group: of every batch_step-th plane every blocks_per_plane-th tile, along the path
// or, kFromEnd, against it.
template <class Block, bool kFromEnd>
struct TileScheduler : ScanAndSlice<Block::kBare> {
    int block_in_plane, group, first_batch, batch_step, steps;  // block_in_plane: this block's number in its team
    bool reverse, columns, descending;
    int box_tokens, stride;

    TileScheduler() = default;
    __device__ TileScheduler(const ScanShape& s, const TilePlan& plan) {
        const int team = static_cast<int>(blockIdx.x) / plan.of_blocks_per_plane;
        block_in_plane = static_cast<int>(blockIdx.x) - team * plan.blocks_per_plane;
        first_batch = team / plan.of_groups;
        group = team - first_batch * s.groups;
        if constexpr (Block::kBare) this->slice = group / s.scans, this->scan = group - this->slice * s.scans;
        batch_step = static_cast<int>(gridDim.x) / plan.of_blocks_per_plane / plan.of_groups;
        const int direction = (s.directions[group >> 4] >> (2 * (group & 15))) & 3;
        reverse = direction & 1;
        columns = direction & 2;
        descending = reverse != kFromEnd;
        steps = columns ? plan.column_tiles : plan.row_tiles;
        stride = (descending ? -plan.blocks_per_plane : plan.blocks_per_plane) * unit(plan);
        box_tokens = columns && !runs() ? plan.columns * s.height : Block::kTokens;
    }
    __device__ __forceinline__ bool runs() const { return Block::kRuns && columns; }
    // The group of the features, and of an image of which each scan has one.
    __device__ __forceinline__ int own_group() const {
        if constexpr (Block::kBare)
            return this->scan;
        else
            return group;
    }
    __device__ __forceinline__ int first_channel(const ScanShape& s) const {
        if constexpr (Block::kBare)
            return this->slice * s.dim;
        else
            return 0;
    }
    // Tiles of this block; there may be none.
    __device__ __forceinline__ int total(const ScanShape& s, const TilePlan& plan) const {
        const uint32_t batch = static_cast<uint32_t>(s.batch), first = first_batch, every = batch_step;
        const int planes = static_cast<int>((batch - first + every - 1) / every);
        return (planes * steps - block_in_plane + plan.blocks_per_plane - 1) / plan.blocks_per_plane;
    }
    // The distance between the `first` of two tiles that follow one another.
    __device__ __forceinline__ int unit(const TilePlan& plan) const {
        return runs() ? plan.runs_per_tile : columns ? plan.columns : Block::kTokens;
    }
    __device__ __forceinline__ void place(const TilePlan& plan, TileCursor& at) const {
        at.first = (descending ? steps - 1 - at.step : at.step) * unit(plan);
    }
    __device__ __forceinline__ TileCursor first(const ScanShape& s, const TilePlan& plan) const {
        TileCursor at{first_batch, block_in_plane, 0};
        if (at.step >= steps) next_plane(at);
        place(plan, at);
        return at;
    }
    __device__ __forceinline__ void next_plane(TileCursor& at) const {
        while (at.step >= steps) at.step -= steps, at.batch += batch_step;
    }
    // True where this is the block's first tile of a plane.
    __device__ __forceinline__ bool enters(const TilePlan& plan, const TileCursor& at) const {
        return at.step < plan.blocks_per_plane;
    }
    __device__ __forceinline__ void advance(const ScanShape& s, const TilePlan& plan, TileCursor& at) const {
        at.step += plan.blocks_per_plane;
        if (at.step >= steps) {
            next_plane(at);
            place(plan, at);
        } else {
            at.first += stride;
        }
    }
    // The number of a part of a tile, `part` counted along the path. The second part of the last tile may lie beyond
    // all saved states.
    __device__ __forceinline__ int part(const TileCursor& at, int part) const {
        const int place = Block::kParts == 1 ? 0 : reverse ? 1 - part : part;
        return (descending ? steps - 1 - at.step : at.step) * Block::kParts + place;
    }
    // Visits the boxes that TMA moves of a tile of the image's group `of`: visit(coordinates, byte offset in shared
    // memory).
    template <class F>
    __device__ __forceinline__ void boxes(const ScanShape& s, const TilePlan& plan, const TileCursor& at, int of,
                                          const TileMapKind& kind, F&& visit) const {
        const bool fused = columns && kind.column_fuse;
        const int count = runs() ? plan.runs_per_tile : Block::kTokens > kBoxLimit && !columns ? kind.row_boxes : 1;
#pragma unroll 1
        for (int box = 0; box < count; ++box) {
            const int tokens = box * (runs() ? plan.run_rows : Block::kTokens / 2);
            ColumnRun run{at.first, tokens};
            if (runs()) run = run_of(plan, at.first + box);
            visit(Coordinates{fused ? run.column * Block::dim(s) : first_channel(s),
                              fused     ? 0
                              : columns ? run.column
                                        : (at.first + tokens) >> kind.row_shift,
                              columns ? run.row : 0, of, at.batch},
                  tokens * Block::dim(s) * 2);
        }
    }
    __device__ __forceinline__ int box_bytes(const ScanShape& s) const { return box_tokens * Block::dim(s) * 2; }
};

// This thread's chunk: the down-th 7 tokens of a column or run of the tile, or of the tile's one stretch along rows.
template <class Block>
struct TileChunk {
    int c0, down, order;
    int slot0, slot_step;  // token k of the path is in slot slot0 + k * slot_step
    bool active, idle, owns, reverse;

    template <class Scheduler>
    __device__ TileChunk(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler) {
        const int chunk = threadIdx.x / Block::kLanes;
        c0 = threadIdx.x % Block::kLanes * kVec;
        active = Block::kWhole || c0 < s.dim;
        reverse = scheduler.reverse;
        const bool whole_columns = scheduler.columns && !scheduler.runs();
        const int across = whole_columns ? plan.columns : 1, blocks = whole_columns ? plan.blocks : Block::kChunks;
        idle = chunk >= across * blocks;  // columns need not fill the tile
        down = chunk / (whole_columns ? plan.of_columns : Divisor{});
        const int column = chunk - down * across;
        int place = idle ? chunk : column * blocks + down;
        if (Block::kParts > 1 && whole_columns) {
            // The chunks of a part are adjacent on the path; those without tokens come last.
            constexpr int kPartChunks = Block::kChunks / Block::kParts;
            const int part_across = across / Block::kParts, used = part_across * blocks;
            const int spare = chunk - across * blocks, spares = max(kPartChunks - used, 1);
            const int part = idle ? spare >= spares : column >= part_across;
            place = part * kPartChunks +
                    (idle ? used + spare - part * spares : (column - part * part_across) * blocks + down);
        }
        order = reverse ? Block::kChunks - 1 - place : place;
        owns = active && !idle;
        slot_step = idle ? 0 : reverse ? -across : across;
        slot0 = idle ? Block::kTokens : down * kFwdTokens * across + column + (reverse ? (kFwdTokens - 1) * across : 0);
    }
    // Byte offset of this thread's channels in a tile at the chunk's first token on the path, and from one token to
    // the next.
    __device__ __forceinline__ int offset(const ScanShape& s) const {
        return ((active ? slot0 : Block::kTokens) * Block::dim(s) + (active ? c0 : 0)) * 2;
    }
    __device__ __forceinline__ int step(const ScanShape& s) const { return active ? slot_step * Block::dim(s) * 2 : 0; }
    // How many tokens of the chunk exist: the first ones of its column, which are the last ones of a reversed path.
    // The slots of the others hold zeros and belong to nobody else.
    template <class Scheduler>
    __device__ __forceinline__ int count(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                         const TileCursor& at) const {
        if (idle) return 0;
        if (!scheduler.columns) return kFwdTokens;
        const int run = scheduler.runs() ? down >> plan.run_shift : 0;
        const int row =
            (scheduler.runs() ? run_of(plan, at.first + run).row : 0) + (down - (run << plan.run_shift)) * kFwdTokens;
        return min(max(s.height - row, 0), kFwdTokens);
    }
    __device__ __forceinline__ bool is_real(int k, int count) const {
        return (reverse ? kFwdTokens - 1 - k : k) < count;
    }
};

// True where some chunk of the block has tokens that do not exist.
template <class Block, class Scheduler>
__device__ __forceinline__ bool is_ragged(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler) {
    return scheduler.columns &&
           (scheduler.runs() ? s.height % plan.run_rows != 0
                             : s.height % kFwdTokens != 0 || plan.columns * plan.blocks < Block::kChunks);
}

}  // namespace gm
