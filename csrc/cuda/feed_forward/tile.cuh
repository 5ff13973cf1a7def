// SPDX-License-Identifier: Apache-2.0
// The two ends of fwd_sm90a.cu: a block's tile and its layout in shared memory, what TMA loads, LayerNorm; and how the
// sums become whole pixels.
#pragma once

#include "cuda/common/packed.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/depthwise_conv/planes.cuh"
#include "cuda/feed_forward/launch.h"

namespace gm::feed_forward {

constexpr int kThreads = 256, kWarps = kThreads / 32, kGroups = kThreads / 128;
constexpr int kWidth = kFeedForwardBlock;
constexpr int kInColumns = kConvInColumns, kOutColumns = kConvOutColumns;
static_assert(kOutColumns == kFeedForwardColumns && kWidth == kPlanesOfBlock && kWidth == 8 * kWarps,
              "a warp convolves 8 channels");

template <int kBlocks>
struct Tile {
    static constexpr int kOutRows = feed_forward_rows(kBlocks), kInRows = kOutRows + 2;
    static constexpr bool kTall = kOutRows == 14;
    using Planes = ConvPlanes<kTall>;
    static constexpr int kChannels = kBlocks * kWidth;
    static constexpr int kTokens = kInRows * kInColumns;
    // fc1: each warpgroup has half of the tokens, in kFc1Units products of kFc1Tokens.
    static constexpr int kFc1Tokens = kTall ? 64 : 72, kFc1Units = kTokens / kGroups / kFc1Tokens;
    static constexpr int kOutTokens = Planes::kOutPixels;  // after the convolution
    // fc2: each warpgroup has half of these, in kFc2Units products of 56 tokens or 64 channels.
    static constexpr int kFc2Tokens = 56, kFc2Units = kTall ? 2 : kBlocks;
    static_assert(kGroups * kFc1Units * kFc1Tokens == kTokens);
    static_assert(kGroups * (kTall ? 2 : 1) * kFc2Tokens == kOutTokens);

    // Shared memory.
    static constexpr int kFc1Bias = Planes::kTable, kTable = kFc1Bias + kWidth * 2;  // of a block of hidden channels
    static constexpr int kX = 0, kActivated = kX + kBlocks * kTokens * kPanelRow;
    static constexpr int kFc1 = kActivated + kOutTokens * kPanelRow;
    static constexpr int kFc2 = kFc1 + kBlocks * kWidth * kPanelRow;
    static constexpr int kPlanes = kFc2 + kBlocks * kWidth * kPanelRow;
    static constexpr int kTables = kPlanes + Planes::kBytes;
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
    bulk_load(table, static_cast<const T*>(maps.args.conv_weight) + first * Tile::Planes::kTaps, Tile::Planes::kBias,
              barrier);
    bulk_load(table + Tile::Planes::kBias, maps.args.conv_bias + first, kWidth * 4, barrier);
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

// LayerNorm in place. Eight lanes share a token.
template <class T, int kBlocks>
__device__ __forceinline__ void normalise(const FeedForwardArgs& args, unsigned char* shared) {
    using Tile = Tile<kBlocks>;
    const int chunk = threadIdx.x % 8, channels = args.channels;
    const float count = static_cast<float>(channels), inverse = 1.f / count;
    float weight[kBlocks][8], bias[kBlocks][8];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int c = b * kWidth + chunk * 8 + j;
            weight[b][j] = c < channels ? load_param<T>(args.norm_weight, c) : 0.f;
            bias[b][j] = c < channels ? load_param<T>(args.norm_bias, c) : 0.f;
        }
    const auto over_token = [](float v) {
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) v += __shfl_xor_sync(kFullWarp, v, lanes);
        return v;
    };
    static_assert(Tile::kTokens % 4 == 0, "whole warps");
#pragma unroll 4
    for (int token = threadIdx.x / 8; token < Tile::kTokens; token += kThreads / 8) {
        unsigned char* const row = shared + Tile::kX + panel_offset(token, chunk);
        float x[kBlocks][8], sum = 0.f, squares = 0.f;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            reinterpret_cast<const Packed<T, 8>*>(row + b * Tile::kTokens * kPanelRow)->widen(x[b]);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += x[b][j];
        }
        const float mean = mean_of(over_token(sum), count, inverse);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            if (b * kWidth + chunk * 8 < channels) {
#pragma unroll
                for (int j = 0; j < 8; ++j) x[b][j] -= mean, squares = fmaf(x[b][j], x[b][j], squares);
            }
        const float scale = rsqrtf(fmaf(over_token(squares), inverse, args.eps));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            float y[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) y[j] = fmaf(x[b][j] * scale, weight[b][j], bias[b][j]);
            store_packed<8>(reinterpret_cast<T*>(row + b * Tile::kTokens * kPanelRow), y, true);
        }
    }
}

// The last step: the sums, through shared memory, become whole pixels that are added to x. A thread keeps to 8
// channels, and has its loads of x in flight before the sums are ready.
template <class T, int kBlocks>
class Finish {
    using Tile = Tile<kBlocks>;
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
#pragma unroll
        for (int j = 0; j < 8; ++j)
            bias[j] = channel() < args_.channels ? load_param<T>(args_.fc2_bias, channel() + j) : 0.f;
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
        const int token = token_of(turn), tile_row = Tile::Planes::row_of(token), row = at_.row + tile_row;
        const int column = at_.column + Tile::Planes::column_of(token);
        const bool idle = channel() >= args_.channels || threadIdx.x >= kTokensAtOnce * kChunks;
        const bool in =
            token < Tile::kOutTokens && tile_row < Tile::kOutRows && column < args_.width && row < args_.height;
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
