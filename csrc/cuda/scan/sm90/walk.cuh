// SPDX-License-Identifier: Apache-2.0
// How a block of the sm_90 scan kernels walks the slabs of its planes, and a thread's chunk in a slab.
//
// A flip costs nothing: a reversed path takes slabs, chunks and tokens in reverse. A chunk is 7 tokens of one row-major
// stretch or of one column; along columns neighbouring chunks of threads take neighbouring columns, so that their rows
// of shared memory are adjacent (no bank conflicts), and `order` is a chunk's place on the path.
//
// Tokens beyond the plane's last row or column come as zeros and lie at the end (reversed: the start) of the path,
// where they touch nothing. Those beyond the end of a column lie inside it: their steps are set to 0.
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

// Constants of a block whose slab has kParts parts of kSlabThreads / scan_lanes chunks, kLanes threads to a token.
// kWhole: every lane has 4 channels, and LayerNorm counts them all. kRuns: along columns slabs are made of runs.
template <int kLanesOfToken, bool kWholeWidth, int kPartsOfSlab, bool kRunsOfColumns>
struct Sm90Block {
    static constexpr int kLanes = kLanesOfToken, kParts = kPartsOfSlab;
    static constexpr bool kWhole = kWholeWidth, kRuns = kRunsOfColumns;
    static constexpr int kWidth = kLanes * kVec;  // channels that the lanes could hold
    static constexpr int kChunks = kParts * kSlabThreads / (kLanes == kNarrowLanes ? 32 : kLanes);
    static constexpr int kThreads = kChunks * kLanes, kTokens = kChunks * kFwdTokens;
    // Eight neighbouring lanes, an octet, never lie in two warps; the lanes of a token may.
    static constexpr bool kInWarp = 32 % kLanes == 0;
    static constexpr int kOctets = kLanes / 8;  // of a token
    // The chunk scan: chunks of a lane (8 of 2 parts: token-major images at 56 x 56 take 6% less time, but blocks that
    // are not whole would spill), lanes of a channel, and floats behind a lane's chunks, which take the channels that a
    // warp reads to banks of their own; 4 at least, to keep 16 bytes aligned.
    static constexpr int kLaneChunks = kWhole ? 4 * kParts : 4;
    static constexpr int kScanLanes = kChunks / kLaneChunks;
    static constexpr int kPad = kScanLanes == 1 ? 0 : kScanLanes > 8 ? 4 : 32 / kScanLanes;
    static constexpr int kAggregates = kScanLanes * (kLaneChunks * kWidth + kPad);
    // Fetching step features: each thread has kFetchTokens tokens and every kSharers-th of their features.
    static constexpr int kFetchTokens = kTokens > kThreads ? 2 : 1;
    static constexpr int kSharers = kLanes > 8 ? kLanes / 8 / kParts : 1;
    static_assert(kParts == 1 || kLanes <= 8);
    static constexpr int kFeatures = kSm90Features<kLanes>;
    static constexpr int kFetch = (kFeatures + kSharers - 1) / kSharers;
    // The step features that narrow blocks reckon with, be they fewer: loops over them are unrolled.
    static constexpr int kConstantRank = kLanes == kNarrowLanes ? kFeatures - 2 : 0;

    __device__ static int aggregate(int chunk) { return chunk * kWidth + chunk / kLaneChunks * kPad; }
    __host__ __device__ static int dim(const ScanShape& s) { return kWhole ? kWidth : s.dim; }
    // Channels that exist, of which the parameters and what is saved know: fewer where they are padded to dim.
    __host__ __device__ static int real_dim(const ScanShape& s) { return kWhole ? kWidth : s.param_dim; }
    // Floats of a token's features in shared memory: B, C, dt_0, ...; a multiple of 4.
    __host__ __device__ static int width(const ScanShape& s) {
        return kFeatures <= 4 ? 4 : kConstantRank > 0 ? kFeatures : (s.rank + 5) / 4 * 4;
    }
    // Bytes of one tensor's slab, a multiple of 128. The slot after the last is zeros, for threads without tokens or
    // channels of their own: what they read, nobody writes.
    __host__ __device__ static int slab_bytes(const ScanShape& s) {
        return ((kTokens + 1) * dim(s) * 2 + 127) / 128 * 128;
    }
};

// A slab of a plane: its first column, along rows its first token's row-major number, and where slabs are made of runs
// the column-major number of its first run.
struct SlabCursor {
    int batch, step, first;
};

// A run of a column, by its column-major number.
struct SlabRun {
    int column, row;  // of its first token
};
__device__ __forceinline__ SlabRun run_of(const SlabPlan& plan, int number) {
    const int column = plan.divides_runs ? number / plan.of_runs : number / plan.runs;
    return {column, (number - column * plan.runs) * plan.run_rows};
}

// The slabs of a block, all of one group: of every batch_step-th plane, each along its path or, kFromEnd, against it,
// every ways-th.
template <class Block, bool kFromEnd>
struct SlabWalk {
    int way, group, first_batch, batch_step, steps;  // way: the block's number in its team
    bool reverse, columns, descending;
    int box_tokens, stride;

    SlabWalk() = default;
    __device__ SlabWalk(const ScanShape& s, const SlabPlan& plan) {
        const int team = static_cast<int>(blockIdx.x) / plan.of_ways;
        way = static_cast<int>(blockIdx.x) - team * plan.ways;
        first_batch = team / plan.of_groups;
        group = team - first_batch * s.groups;
        batch_step = static_cast<int>(gridDim.x) / plan.of_ways / plan.of_groups;
        const int direction = (s.directions[group >> 4] >> (2 * (group & 15))) & 3;
        reverse = direction & 1;
        columns = direction & 2;
        descending = reverse != kFromEnd;
        steps = columns ? plan.column_slabs : plan.row_slabs;
        stride = (descending ? -plan.ways : plan.ways) * unit(plan);
        box_tokens = columns && !runs() ? plan.columns * s.height : Block::kTokens;
    }
    __device__ __forceinline__ bool runs() const { return Block::kRuns && columns; }
    // Slabs of the block; there may be none.
    __device__ __forceinline__ int total(const ScanShape& s, const SlabPlan& plan) const {
        const uint32_t batch = static_cast<uint32_t>(s.batch), first = first_batch, every = batch_step;
        const int planes = static_cast<int>((batch - first + every - 1) / every);
        return (planes * steps - way + plan.ways - 1) / plan.ways;
    }
    // From one slab's `first` to the next one's.
    __device__ __forceinline__ int unit(const SlabPlan& plan) const {
        return runs() ? plan.runs_of_slab : columns ? plan.columns : Block::kTokens;
    }
    __device__ __forceinline__ void place(const SlabPlan& plan, SlabCursor& at) const {
        at.first = (descending ? steps - 1 - at.step : at.step) * unit(plan);
    }
    __device__ __forceinline__ SlabCursor first(const ScanShape& s, const SlabPlan& plan) const {
        SlabCursor at{first_batch, way, 0};
        if (at.step >= steps) next_plane(at);
        place(plan, at);
        return at;
    }
    __device__ __forceinline__ void next_plane(SlabCursor& at) const {
        while (at.step >= steps) at.step -= steps, at.batch += batch_step;
    }
    // True where the block enters a plane.
    __device__ __forceinline__ bool enters(const SlabPlan& plan, const SlabCursor& at) const {
        return at.step < plan.ways;
    }
    __device__ __forceinline__ void advance(const ScanShape& s, const SlabPlan& plan, SlabCursor& at) const {
        at.step += plan.ways;
        if (at.step >= steps) {
            next_plane(at);
            place(plan, at);
        } else {
            at.first += stride;
        }
    }
    // Number of a slab's part, the part-th along the path; the last slab's second may be beyond all that are saved.
    __device__ __forceinline__ int part(const SlabCursor& at, int part) const {
        const int place = Block::kParts == 1 ? 0 : reverse ? 1 - part : part;
        return (descending ? steps - 1 - at.step : at.step) * Block::kParts + place;
    }
    // Visits the boxes of a slab: visit(coordinates, byte offset in shared memory).
    template <class F>
    __device__ __forceinline__ void boxes(const ScanShape& s, const SlabPlan& plan, const SlabCursor& at,
                                          const SlabMapKind& kind, F&& visit) const {
        const bool fused = columns && kind.column_fuse;
        const int count = runs() ? plan.runs_of_slab : Block::kTokens > kBoxLimit && !columns ? kind.row_boxes : 1;
#pragma unroll 1
        for (int box = 0; box < count; ++box) {
            const int tokens = box * (runs() ? plan.run_rows : Block::kTokens / 2);
            SlabRun run{at.first, tokens};
            if (runs()) run = run_of(plan, at.first + box);
            visit(Coordinates{fused ? run.column * Block::dim(s) : 0,
                              fused     ? 0
                              : columns ? run.column
                                        : (at.first + tokens) >> kind.row_shift,
                              columns ? run.row : 0, group, at.batch},
                  tokens * Block::dim(s) * 2);
        }
    }
    __device__ __forceinline__ int box_bytes(const ScanShape& s) const { return box_tokens * Block::dim(s) * 2; }
};

// This thread's chunk: 7 tokens of one column or run of a slab (of its one stretch along rows), the down-th of them.
template <class Block>
struct SlabChunk {
    int c0, down, order;
    int slot0, slot_step;  // path token k is in slot slot0 + k * slot_step
    bool active, idle, owns, reverse;

    template <class Walk>
    __device__ SlabChunk(const ScanShape& s, const SlabPlan& plan, const Walk& walk) {
        const int chunk = threadIdx.x / Block::kLanes;
        c0 = threadIdx.x % Block::kLanes * kVec;
        active = Block::kWhole || c0 < s.dim;
        reverse = walk.reverse;
        const bool whole_columns = walk.columns && !walk.runs();
        const int across = whole_columns ? plan.columns : 1, blocks = whole_columns ? plan.blocks : Block::kChunks;
        idle = chunk >= across * blocks;  // columns need not fill the slab
        down = chunk / (whole_columns ? plan.of_columns : Divisor{});
        const int column = chunk - down * across;
        int place = idle ? chunk : column * blocks + down;
        if (Block::kParts > 1 && whole_columns) {
            // The chunks of a part are adjacent on the path, those without tokens behind them.
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
    // Byte offset of this thread's channels in a slab at path token 0, and from one path token to the next.
    __device__ __forceinline__ int offset(const ScanShape& s) const {
        return ((active ? slot0 : Block::kTokens) * Block::dim(s) + (active ? c0 : 0)) * 2;
    }
    __device__ __forceinline__ int step(const ScanShape& s) const { return active ? slot_step * Block::dim(s) * 2 : 0; }
    // How many of the chunk's tokens exist; they are the first of a column, so the last of a reversed path. The slots
    // of the others hold zeros, and are nobody else's.
    template <class Walk>
    __device__ __forceinline__ int count(const ScanShape& s, const SlabPlan& plan, const Walk& walk,
                                         const SlabCursor& at) const {
        if (idle) return 0;
        if (!walk.columns) return kFwdTokens;
        const int run = walk.runs() ? down >> plan.run_shift : 0;
        const int row =
            (walk.runs() ? run_of(plan, at.first + run).row : 0) + (down - (run << plan.run_shift)) * kFwdTokens;
        return min(max(s.height - row, 0), kFwdTokens);
    }
    __device__ __forceinline__ bool is_real(int k, int count) const {
        return (reverse ? kFwdTokens - 1 - k : k) < count;
    }
};

// True where some chunk of the block has tokens that do not exist.
template <class Block, class Walk>
__device__ __forceinline__ bool is_ragged(const ScanShape& s, const SlabPlan& plan, const Walk& walk) {
    return walk.columns && (walk.runs() ? s.height % plan.run_rows != 0
                                        : s.height % kFwdTokens != 0 || plan.columns * plan.blocks < Block::kChunks);
}

}  // namespace gm
