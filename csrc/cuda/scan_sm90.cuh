// SPDX-License-Identifier: Apache-2.0
// What the sm_90 scan kernels share: how a block walks the slabs of a plane, a thread's chunk in a slab, the step
// features in shared memory, sums over lanes, and the chunk scan.
//
// A flip costs nothing: a reversed path takes slabs, chunks and tokens in reverse. A chunk is 7 tokens of one row-major
// run or of one column; along columns neighbouring chunks of threads take neighbouring columns, so that their rows of
// shared memory are adjacent (no bank conflicts), and `order` is a chunk's place on the path.
//
// Tokens beyond the plane's last row or column come as zeros and lie at the end (reversed: the start) of the path,
// where they touch nothing. Those beyond the end of a column lie inside it: their steps are set to 0.
#pragma once

#include <type_traits>

#include "cuda/dispatch.h"
#include "cuda/grouped_scan_sm90.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/math.cuh"
#include "cuda/tma.cuh"

namespace gm {

constexpr int kSm90Stages = 2;

// Constants of a block of kThreads threads, kLanes of them to a token; it holds kSlabs slabs at a time.
template <int kLanesOfToken, int kThreadsOfBlock>
struct Sm90Block {
    static constexpr int kLanes = kLanesOfToken, kThreads = kThreadsOfBlock;
    static constexpr int kWidth = kLanes * kVec;  // channels that the lanes could hold
    static constexpr int kSlabs = kThreads / kSlabThreads;
    static constexpr int kSlabChunks = kSlabThreads / kLanes, kChunks = kSlabs * kSlabChunks;
    static constexpr int kSlabTokens = kSlabChunks * kFwdTokens;
    static constexpr int kScanLanes = kChunks / 4;       // lanes of a channel in the chunk scan, 4 chunks each
    static constexpr int kPad = kScanLanes > 1 ? 4 : 0;  // floats after every 4 chunks: their readers hit other banks
    static constexpr int kAggregates = kChunks * kWidth + kChunks / 4 * kPad;
    // Fetching step features: each thread has kFetchTokens tokens and every kParts-th of their features.
    static constexpr int kFetchTokens = kSlabs * kSlabTokens > kThreads ? 2 : 1;
    static constexpr int kParts = kLanes > 8 ? kLanes / 8 : 1;
    static constexpr int kFeatures = kSm90Features<kLanes>;
    static constexpr int kFetch = (kFeatures + kParts - 1) / kParts;

    __device__ static int aggregate(int chunk) { return chunk * kWidth + chunk / 4 * kPad; }
};

// The slabs of one (batch, group) in the order of its path.
struct SlabWalk {
    int group, batch, count;
    bool reverse, columns;
    int box_tokens;

    SlabWalk() = default;
    __device__ SlabWalk(const ScanShape& s, const SlabPlan& plan) {
        group = blockIdx.x % s.groups;
        batch = blockIdx.x / s.groups;
        const int direction = (s.directions[group >> 4] >> (2 * (group & 15))) & 3;
        reverse = direction & 1;
        columns = direction & 2;
        count = columns ? plan.column_slabs : plan.row_slabs;
        box_tokens = columns && plan.columns > 0 ? plan.columns * s.height : plan.tokens;
    }
    // Number, in row-major or column-major order, of the i-th slab of the path; -1 beyond the last.
    __device__ __forceinline__ int slab(int i) const { return i >= count ? -1 : reverse ? count - 1 - i : i; }
    // First column and row of a slab; along rows, its first token as a column.
    __device__ __forceinline__ void corner(const SlabPlan& plan, int slab, int& column, int& row) const {
        row = 0;
        if (!columns) {
            column = slab * plan.tokens;
        } else if (plan.columns > 0) {
            column = slab * plan.columns;
        } else {
            column = slab / plan.pieces;
            row = (slab - column * plan.pieces) * plan.tokens;
        }
    }
    __device__ __forceinline__ Coordinates box(const ScanShape& s, const SlabPlan& plan, int slab,
                                               const SlabMapKind& kind) const {
        if (!columns) return {0, slab * (plan.tokens / kind.row_fuse), 0, group, batch};
        int column, row;
        corner(plan, slab, column, row);
        if (kind.column_fuse) return {column * s.dim, 0, row, group, batch};
        return {0, column, row, group, batch};
    }
    // Slots that no load fills but steps of 0 read: they must be cleared once.
    __device__ bool leaves_slots(const SlabPlan& plan) const { return box_tokens < plan.tokens; }
};

// This thread's chunk: tokens first..first + 6 of one column of a slab's box (of its one run along rows).
template <class Block>
struct SlabChunk {
    int c0, half, first, order;
    int slot0, slot_step;  // path token k is in slot slot0 + k * slot_step of the box
    bool active, idle, reverse, uneven;

    __device__ SlabChunk(const ScanShape& s, const SlabPlan& plan, const SlabWalk& walk) {
        const int chunk = threadIdx.x / Block::kLanes, in_slab = chunk % Block::kSlabChunks;
        c0 = threadIdx.x % Block::kLanes * kVec;
        half = chunk / Block::kSlabChunks;
        active = c0 < s.dim;
        reverse = walk.reverse;
        const int across = walk.columns && plan.columns > 0 ? plan.columns : 1;
        const int blocks = walk.columns ? plan.blocks : Block::kSlabChunks;
        idle = in_slab >= across * blocks;  // columns need not fill the slab
        const int column = idle ? 0 : in_slab % across, block = idle ? 0 : in_slab / across;
        const int place = idle ? in_slab : column * blocks + block;
        first = block * kFwdTokens;
        order = half * Block::kSlabChunks + (reverse ? Block::kSlabChunks - 1 - place : place);
        slot_step = reverse ? -across : across;
        slot0 = first * across + column + (reverse ? (kFwdTokens - 1) * across : 0);
        uneven = across * blocks < Block::kSlabChunks;
    }
    // End of the chunk's column in a slab.
    __device__ __forceinline__ int end(const ScanShape& s, const SlabPlan& plan, const SlabWalk& walk, int slab) const {
        if (!walk.columns) return Block::kSlabTokens;
        if (plan.columns > 0) return s.height;
        int column, row;
        walk.corner(plan, max(slab, 0), column, row);
        return min(s.height - row, plan.tokens);
    }
    // True where some chunk of the block has tokens beyond its column.
    __device__ __forceinline__ bool ragged(const SlabPlan& plan, const SlabWalk& walk, int end) const {
        return uneven || (walk.columns && plan.blocks * kFwdTokens > end);
    }
    __device__ __forceinline__ bool is_real(int k, int end) const {
        return !idle && first + (reverse ? kFwdTokens - 1 - k : k) < end;
    }
};

// Step features, B (times ln 2) and C of the slabs in shared memory, [slab of the block][token][width] floats, fetched
// from device memory one step of the walk ahead.
template <class T, class Block>
struct StepFeatures {
    static constexpr int kTokens = Block::kSlabs * Block::kSlabTokens;
    T fetched[Block::kFetchTokens][Block::kFetch];
    int in_box[Block::kFetchTokens];  // the token's row << 16 | column in its box, -1 where the box has none

    __device__ StepFeatures(const SlabPlan& plan, const SlabWalk& walk) {
        const int columns = walk.columns && plan.columns > 0 ? plan.columns : 1;
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            const int slot = token(i) % Block::kSlabTokens;
            const bool inside = slot < walk.box_tokens && token(i) < kTokens;
            in_box[i] = !inside ? -1 : walk.columns ? slot / columns << 16 | slot % columns : slot;
        }
    }
    __device__ static int token(int i) { return threadIdx.x % (Block::kThreads / Block::kParts) + i * Block::kThreads; }
    __device__ static int part() { return threadIdx.x / (Block::kThreads / Block::kParts); }

    // Row-major number of this thread's i-th token at a step of the walk, -1 where there is none.
    __device__ __forceinline__ int place(const ScanShape& s, const SlabPlan& plan, const SlabWalk& walk, int step,
                                         int i) const {
        const int slab = walk.slab(step * Block::kSlabs + token(i) / Block::kSlabTokens);
        int column, row;
        walk.corner(plan, slab, column, row);
        column += in_box[i] & 0xffff, row += in_box[i] >> 16;
        const int at = walk.columns ? row * s.width + column : column;
        const bool inside = walk.columns ? column < s.width && row < s.height : at < s.height * s.width;
        return in_box[i] >= 0 && slab >= 0 && inside ? at : -1;
    }
    template <class F>
    __device__ __forceinline__ void each(int features, F&& visit) const {
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i)
#pragma unroll
            for (int j = 0; j < Block::kFetch; ++j)
                if (part() + j * Block::kParts < features) visit(i, j, part() + j * Block::kParts);
    }
    __device__ __forceinline__ void fetch(const ScanShape& s, const SlabPlan& plan, const SlabWalk& walk,
                                          const ImageArg& dt, const ImageArg& B, const ImageArg& C, int step) {
        int at[Block::kFetchTokens];
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) at[i] = place(s, plan, walk, step, i);
        each(s.rank + 2, [&](int i, int j, int f) {
            const ImageArg& image = f < s.rank ? dt : f == s.rank ? B : C;
            const int64_t plane = walk.batch * image.batch + walk.group * image.group + (f < s.rank ? f : 0);
            fetched[i][j] = at[i] < 0
                                ? from_float<T>(0.f)
                                : static_cast<const T*>(image.ptr)[plane + static_cast<int64_t>(at[i]) * image.token];
        });
    }
    __device__ __forceinline__ void keep(const ScanShape& s, float* to, int width) const {
        each(s.rank + 2, [&](int i, int j, int f) {
            if (token(i) < kTokens) to[token(i) * width + f] = to_float(fetched[i][j]) * (f == s.rank ? kLn2 : 1.f);
        });
    }
};

// steps[k][j] = softplus(bias + dt_weight dt) of a thread's tokens, in units of ln 2. `weight(r)` gives 4 channels.
template <class T, class Block, class F>
__device__ __forceinline__ void load_steps_sm90(const float* features, int feature_step, const ScanShape& s,
                                                const float4& bias, F&& weight, float (&steps)[kFwdTokens][kVec]) {
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
        steps[k][0] = bias.x, steps[k][1] = bias.y, steps[k][2] = bias.z, steps[k][3] = bias.w;
    const auto add = [&](int k, const float4& w, float d) {
        steps[k][0] = fmaf(w.x, d, steps[k][0]), steps[k][1] = fmaf(w.y, d, steps[k][1]);
        steps[k][2] = fmaf(w.z, d, steps[k][2]), steps[k][3] = fmaf(w.w, d, steps[k][3]);
    };
    if constexpr (Block::kFeatures > 4) {
        for (int r = 0; r < s.rank; ++r) {
            const float4 w = weight(r);
#pragma unroll
            for (int k = 0; k < kFwdTokens; ++k) add(k, w, features[k * feature_step + r]);
        }
    } else {  // rank 1, or up to 2
        const float4 w0 = weight(0);
        float4 w1 = {};
        if (Block::kFeatures == 4 && s.rank > 1) w1 = weight(1);
#pragma unroll
        for (int k = 0; k < kFwdTokens; ++k) {
            const float2 d = *reinterpret_cast<const float2*>(features + k * feature_step);
            add(k, w0, d.x);
            if (Block::kFeatures == 4) add(k, w1, d.y);
        }
    }
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j) steps[k][j] = Math<T>::softplus(steps[k][j]);
}

template <class Block>
__device__ __forceinline__ void mask_steps(const SlabChunk<Block>& chunk, int end, float (&steps)[kFwdTokens][kVec]) {
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (!chunk.is_real(k, end)) steps[k][j] = 0.f;
}

// Sums over the lanes of a token, several at once; every lane gets all of them.
template <int kLanes, int kCount>
__device__ __forceinline__ void token_sums(float (&v)[kCount]) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2)
#pragma unroll
        for (int k = 0; k < kCount; ++k) v[k] += __shfl_xor_sync(kFullWarp, v[k], d);
}

// The same sums, each left with some lanes only: at every step a lane passes on half of its values and keeps the
// others, 9 shuffles in place of 35 for 32 lanes. Calls write(k, sum) on one lane a token.
template <int kLanes, class F>
__device__ __forceinline__ void scatter_token_sums(const float (&v)[kFwdTokens], F&& write) {
    const int lane = threadIdx.x % kLanes;
    float w[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) w[k] = k < kFwdTokens ? v[k] : 0.f;
    int d = kLanes / 2, kept = 0;
#pragma unroll
    for (int held = 8; held > 1 && d > 0; held /= 2, d /= 2) {
        const bool upper = lane & d;
#pragma unroll
        for (int k = 0; k < held / 2; ++k) {
            const float give = upper ? w[k] : w[k + held / 2];
            w[k] = (upper ? w[k + held / 2] : w[k]) + __shfl_xor_sync(kFullWarp, give, d);
        }
        kept = kept * 2 + upper;
    }
    constexpr int kLeft = kLanes >= 8 ? 1 : 8 / kLanes;  // sums that a lane ends up with
#pragma unroll
    for (; d > 0; d /= 2) w[0] += __shfl_xor_sync(kFullWarp, w[0], d);
    constexpr int kSharing = kLanes > 8 ? kLanes / 8 : 1;  // lanes with the same sum
    const bool writes = lane % kSharing == 0;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const int k = kept * kLeft + i;
        if (writes && k < kFwdTokens) write(k, w[i]);
    }
}

// Chunk aggregates (P, h) in shared memory, by order, to the states entering the chunks (in place of h). kScanLanes
// neighbouring threads serve a channel. `carry` is the state of the thread's channel before the first chunk and becomes
// the one after the last; `at_slab(i, channel, state)` sees the state entering the i-th slab of the block.
template <class Block, class F>
__device__ __forceinline__ void scan_chunks(const float* P_in, float* h_in, float& carry, F&& at_slab) {
    constexpr int kLanes = Block::kScanLanes;
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    float P4[4], h4[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        P4[i] = P_in[Block::aggregate(q * 4 + i) + channel];
        h4[i] = h_in[Block::aggregate(q * 4 + i) + channel];
    }
    float P = P4[0], h = h4[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) h = fmaf(P4[i], h, h4[i]), P *= P4[i];
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
        const float h_before = __shfl_up_sync(kFullWarp, h, d, kLanes),
                    P_before = __shfl_up_sync(kFullWarp, P, d, kLanes);
        if (q >= d) h = fmaf(P, h_before, h), P *= P_before;
    }
    const float P_before = __shfl_up_sync(kFullWarp, P, 1, kLanes), h_before = __shfl_up_sync(kFullWarp, h, 1, kLanes);
    float state = q == 0 ? carry : fmaf(P_before, carry, h_before);
    if (q % (kLanes / Block::kSlabs) == 0) at_slab(q / (kLanes / Block::kSlabs), channel, state);
    carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), kLanes - 1, kLanes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        h_in[Block::aggregate(q * 4 + i) + channel] = state;
        state = fmaf(P4[i], state, h4[i]);
    }
}

template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, const ScanShape& shape, int threads, int shared, cudaStream_t stream,
                        const Args& args) {
    // Two blocks an SM need nearly all of its memory as shared memory.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
    return error != cudaSuccess ? error
                                : launch_kernel(kernel, shape.batch * shape.groups, threads, shared, stream, args);
}

// f(type tag, std::integral_constant<int, lanes>)
template <class F>
cudaError_t dispatch_sm90(DType dtype, int lanes, F&& f) {
    const auto with_lanes = [&](auto tag) {
        switch (lanes) {
            case 4: return f(tag, std::integral_constant<int, 4>{});
            case 8: return f(tag, std::integral_constant<int, 8>{});
            case 16: return f(tag, std::integral_constant<int, 16>{});
            default: return f(tag, std::integral_constant<int, 32>{});
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
