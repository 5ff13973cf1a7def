// SPDX-License-Identifier: Apache-2.0
// The two ends of fwd_sm90a.cu: a block's tile and its layout in shared memory, what TMA loads, LayerNorm; and how the
// sums become whole pixels.
#pragma once

#include "cuda/common/packed.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/feed_forward/launch.h"

namespace gm::feed_forward {

constexpr int kThreads = 256, kWarps = kThreads / 32, kGroups = kThreads / 128;
constexpr int kWidth = kFeedForwardBlock;
constexpr int kOutColumns = kFeedForwardColumns, kInColumns = kOutColumns + 2;
constexpr int kRowBytes = kInColumns * kPanelRow;  // of a tile's row of pixels in a panel
static_assert(kInColumns == 16 && kWidth == 8 * kWarps, "a warp convolves 16 pixels of 8 channels");

template <int kBlocks>
struct Tile {
    static constexpr int kOutRows = feed_forward_rows(kBlocks), kInRows = kOutRows + 2;
    static constexpr bool kTall = kOutRows == 14;
    static constexpr int kChannels = kBlocks * kWidth;
    static constexpr int kTokens = kInRows * kInColumns;
    // fc1: each warpgroup has half of the tokens, in kFc1Units products of kFc1Tokens.
    static constexpr int kFc1Tokens = kTall ? 64 : 72, kFc1Units = kTokens / kGroups / kFc1Tokens;
    static constexpr int kOutTokens =
        kOutRows * kInColumns;  // after the convolution; the last two of a row do not count
    // fc2: each warpgroup has half of these, in kFc2Units products of 56 tokens or 64 channels.
    static constexpr int kFc2Tokens = 56, kFc2Units = kTall ? 2 : kBlocks;
    static_assert(kGroups * kFc1Units * kFc1Tokens == kTokens);
    static_assert(kGroups * (kTall ? 2 : 1) * kFc2Tokens == kOutTokens);

    // Shared memory. A table is of a block of hidden channels: taps in three rows of four, the convolution's biases in
    // float32, fc1's.
    static constexpr int kTaps = 12, kConvBias = kWidth * kTaps * 2, kFc1Bias = kConvBias + kWidth * 4;
    static constexpr int kTable = kFc1Bias + kWidth * 2;
    static constexpr int kX = 0, kActivated = kX + kBlocks * kTokens * kPanelRow;
    static constexpr int kFc1 = kActivated + kOutTokens * kPanelRow;
    static constexpr int kFc2 = kFc1 + kBlocks * kWidth * kPanelRow;
    static constexpr int kHidden = kFc2 + kBlocks * kWidth * kPanelRow;
    // The convolution reads two pixels behind the last, for columns that do not count.
    static constexpr int kTables = kHidden + (kTokens + 2) * kPanelRow;
    static constexpr int kBarrier = kTables + 2 * kTable, kBytes = kBarrier + 8;
    static constexpr int kSumRow = kChannels + 4;  // of the sums while they are written out, in floats
    static_assert(kOutTokens * kSumRow * 4 <= kBytes);
};

struct TilePlace {
    int64_t image;
    int row, column;  // of the result's first pixel
};

// Computed again wherever it is called: kept through the loop over hidden channels it would take registers.
template <int kBlocks>
__device__ __forceinline__ TilePlace tile_place(const FeedForwardPlan& plan) {
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const unsigned tiles = plan.tile_rows * plan.tile_columns, tile = block % tiles;
    return {block / tiles, static_cast<int>(tile / plan.tile_columns) * Tile<kBlocks>::kOutRows,
            static_cast<int>(tile % plan.tile_columns) * kOutColumns};
}

struct KernelArgs {
    CUtensorMap x, fc1, fc2;  // a tile of 64 channels with its ring; 64 rows of 64
    FeedForwardArgs args;
};

// What TMA loads, issued by one thread: x of the tile and its ring, 0 outside the image; weights and tables of a block
// of hidden channels.
template <class T, int kBlocks>
__device__ __forceinline__ void load_x(const KernelArgs& maps, const TilePlace& at, uint32_t shared, uint32_t barrier) {
    using Tile = Tile<kBlocks>;
    mbarrier_expect(barrier, kBlocks * Tile::kTokens * kPanelRow);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
        tma_load(shared + Tile::kX + b * Tile::kTokens * kPanelRow, &maps.x,
                 {b * kWidth, at.column - 1, at.row - 1, static_cast<int>(at.image), 0}, barrier);
}
template <class T, int kBlocks>
__device__ __forceinline__ void load_fc1(const KernelArgs& maps, int block, uint32_t shared, uint32_t barrier) {
    using Tile = Tile<kBlocks>;
    mbarrier_expect(barrier, kBlocks * kWidth * kPanelRow + Tile::kTable);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
        tma_load(shared + Tile::kFc1 + b * kWidth * kPanelRow, &maps.fc1, {b * kWidth, block * kWidth, 0, 0, 0},
                 barrier);
    const uint32_t table = shared + Tile::kTables + block % 2 * Tile::kTable;
    const int first = block * kWidth;
    bulk_load(table, static_cast<const T*>(maps.args.conv_weight) + first * Tile::kTaps, Tile::kConvBias, barrier);
    bulk_load(table + Tile::kConvBias, maps.args.conv_bias + first, kWidth * 4, barrier);
    bulk_load(table + Tile::kFc1Bias, static_cast<const T*>(maps.args.fc1_bias) + first, kWidth * 2, barrier);
}
template <class T, int kBlocks>
__device__ __forceinline__ void load_fc2(const KernelArgs& maps, int block, uint32_t shared, uint32_t barrier) {
    using Tile = Tile<kBlocks>;
    mbarrier_expect(barrier, kBlocks * kWidth * kPanelRow);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
        tma_load(shared + Tile::kFc2 + b * kWidth * kPanelRow, &maps.fc2, {block * kWidth, b * kWidth, 0, 0, 0},
                 barrier);
}

// LayerNorm in place. Eight lanes share a token; a thread has several tokens under way at once, since the sums over
// lanes take long.
template <class T, int kBlocks>
__device__ __forceinline__ void normalise(const FeedForwardArgs& args, unsigned char* shared) {
    using Tile = Tile<kBlocks>;
    constexpr int kTogether = kBlocks == 1 ? 4 : 2, kApart = kThreads / 8;
    static_assert(Tile::kTokens % 4 == 0, "whole warps");
    const int chunk = threadIdx.x % 8;
    const float count = static_cast<float>(args.channels), inverse = 1.f / count;
    float weight[kBlocks][8], bias[kBlocks][8];
    bool in[kBlocks];  // whether the thread's channels exist; x is 0 where they do not
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        const int first = b * kWidth + chunk * 8;
        in[b] = first < args.channels;
        load_params<T>(args.norm_weight, first, in[b], weight[b]);
        load_params<T>(args.norm_bias, first, in[b], bias[b]);
    }
    const auto over_tokens = [](float(&v)[kTogether]) {
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2)
#pragma unroll
            for (int i = 0; i < kTogether; ++i) v[i] += __shfl_xor_sync(kFullWarp, v[i], lanes);
    };
#pragma unroll 1
    for (int first = threadIdx.x / 8; first < Tile::kTokens; first += kTogether * kApart) {
        unsigned char* const row = shared + Tile::kX + panel_offset(first, chunk);
        const auto place = [&](int i, int b) { return row + i * kApart * kPanelRow + b * Tile::kTokens * kPanelRow; };
        const auto exists = [&](int i) {
            return Tile::kTokens % (kTogether * kApart) == 0 || first + i * kApart < Tile::kTokens;
        };
        float x[kTogether][kBlocks][8] = {}, sums[kTogether] = {}, squares[kTogether] = {};
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                if (exists(i)) reinterpret_cast<const Packed<T, 8>*>(place(i, b))->widen(x[i][b]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i] += x[i][b][j];
            }
        over_tokens(sums);
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                const float mean = in[b] ? mean_of(sums[i], count, inverse) : 0.f;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    x[i][b][j] -= mean;
                    squares[i] = fmaf(x[i][b][j], x[i][b][j], squares[i]);
                }
            }
        over_tokens(squares);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const float scale = rsqrtf(fmaf(squares[i], inverse, args.eps));
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                float y[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) y[j] = fmaf(x[i][b][j] * scale, weight[b][j], bias[b][j]);
                if (exists(i)) *reinterpret_cast<Packed<T, 8>*>(place(i, b)) = pack<8, T>(y);
            }
        }
    }
}

// The last step: the sums, through shared memory, become whole pixels that are added to x. A thread keeps to 8
// channels, and has its loads of x in flight before the sums are ready.
template <class T, int kBlocks>
class Finish {
    using Tile = feed_forward::Tile<kBlocks>;
    static constexpr int kChunks = kBlocks * 8, kTokensAtOnce = kThreads / kChunks;
    static constexpr int kTurns = (Tile::kOutTokens + kTokensAtOnce - 1) / kTokensAtOnce;

public:
    __device__ __forceinline__ explicit Finish(const FeedForwardArgs& args)
        : args_(args), at_(tile_place<kBlocks>(args.plan)) {
        const T* const x = static_cast<const T*>(args.x.ptr) + at_.image * args.x.batch + channel();
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int pixel = pixel_of(turn);
            old_[turn] = load_packed<8>(x + static_cast<int64_t>(pixel) * args.x.token, args.residual && pixel >= 0);
        }
    }
    __device__ __forceinline__ void operator()(const float (&sums)[Tile::kFc2Units][28], int group, int first_channel,
                                               unsigned char* shared) const {
        float* const rows = reinterpret_cast<float*>(shared);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int unit = 0; unit < Tile::kFc2Units; ++unit) {
            const int tokens = Tile::kTall ? (group * 2 + unit) * Tile::kFc2Tokens : group * Tile::kFc2Tokens;
            float* const to =
                rows + (tokens + lane % 4 * 2) * Tile::kSumRow + first_channel + (Tile::kTall ? 0 : unit * kWidth);
#pragma unroll
            for (int j = 0; j < 7; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) to[(8 * j + i % 2) * Tile::kSumRow + i / 2 * 8] = sums[unit][4 * j + i];
        }
        __syncthreads();
        const float factor = drop_path_factor(args_.drop_path, at_.image);
        float bias[8];
        load_params<T>(args_.fc2_bias, channel(), channel() < args_.channels, bias);
        T* const out = static_cast<T*>(args_.out.ptr) + at_.image * args_.out.batch + channel();
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int pixel = pixel_of(turn);
            if (pixel < 0) continue;
            const float* const from = rows + token_of(turn) * Tile::kSumRow + channel();
            const float4 low = reinterpret_cast<const float4*>(from)[0],
                         high = reinterpret_cast<const float4*>(from)[1];
            float result[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, old[8];
            old_[turn].widen(old);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                result[j] = fmaf(factor, result[j] + bias[j], old[j]);  // factor 1, old 0 if alone
            store_packed<8>(out + static_cast<int64_t>(pixel) * args_.out.token, result, true);
        }
    }

private:
    static __device__ __forceinline__ int channel() { return threadIdx.x % kChunks * 8; }
    static __device__ __forceinline__ int token_of(int turn) { return threadIdx.x / kChunks + turn * kTokensAtOnce; }
    // The number of the pixel in its image, or -1.
    __device__ __forceinline__ int pixel_of(int turn) const {
        const int token = token_of(turn), tile_column = token % kInColumns;
        const int row = at_.row + token / kInColumns, column = at_.column + tile_column;
        const bool idle = channel() >= args_.channels || threadIdx.x >= kTokensAtOnce * kChunks;
        const bool in =
            token < Tile::kOutTokens && tile_column < kOutColumns && column < args_.width && row < args_.height;
        return idle || !in ? -1 : row * args_.width + column;
    }

    const FeedForwardArgs& args_;
    const TilePlace at_;
    Packed<T, 8> old_[kTurns];
};

// For an image whose branch is dropped.
template <class T, int kBlocks>
__device__ void copy_x(const FeedForwardArgs& args, const TilePlace& at) {
    const int chunks = args.channels / 8;
    for (int i = threadIdx.x; i < Tile<kBlocks>::kOutRows * kOutColumns * chunks; i += kThreads) {
        const int pixel = i / chunks, y = at.row + pixel / kOutColumns, x = at.column + pixel % kOutColumns;
        if (y >= args.height || x >= args.width) continue;
        const int64_t place = static_cast<int64_t>(y) * args.width + x;
        const T* const from = static_cast<const T*>(args.x.ptr) + at.image * args.x.batch + place * args.x.token;
        T* const to = static_cast<T*>(args.out.ptr) + at.image * args.out.batch + place * args.out.token;
        reinterpret_cast<uint4*>(to)[i % chunks] = reinterpret_cast<const uint4*>(from)[i % chunks];
    }
}

}  // namespace gm::feed_forward
