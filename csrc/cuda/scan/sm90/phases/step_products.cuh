// SPDX-License-Identifier: Apache-2.0
// Steps of a high rank, and the gradients of their features and weights, as matrix products by tensor cores. A warp is
// a chunk: 7 tokens of 128 channels. Its three products have the weights W (128, R), features F (7, R) and gradients of
// the steps G (7, 128) as factors:
//
//   steps^T (channels, tokens) = W F^T        dF^T (features, tokens) = W^T G^T       dW (channels, features) += G^T F
//
// They are products of TF32: features have 16 bits and are exact, weights and gradients of steps are rounded to 11.
// Fragments have other elements than the scan's threads, which hold 4 channels of all 7 tokens each. Between the two
// lies a stage in shared memory, rows of 128 channels, one a token. Units of 4 channels change places within a row, by
// its token, so that no access meets a bank twice.
//
// Of a fragment, `row` = lane / 4 and `column` = lane % 4 are what warp_mma_tf32 counts by. The channels of a product's
// 16 rows, and the order in which channels are summed up, are chosen for the accesses: see product_weight.
#pragma once

#include <type_traits>

#include "cuda/common/ptx/mma.cuh"
#include "cuda/scan/sm90/channel_table.cuh"

namespace gm {

constexpr int kStageUnits = 32;  // of a row of the stage, 4 channels each; a warp's lanes

struct FragmentLane {
    int lane, row, column;
    __device__ FragmentLane() : lane(threadIdx.x % 32), row(lane / 4), column(lane % 4) {}
};

// Writes and reads the steps of a chunk. `stage(i)` is the i-th of kRows rows; the tokens go through it kRows at a
// time, which is even. `products` are those of 8 tiles of channels: of tile m channels 16 row + 2 m and + 1, tokens 2
// column and + 1.
template <int kRows, class Stage>
__device__ __forceinline__ void stage_steps(const FragmentLane& at, Stage&& stage, const float (&products)[8][4],
                                            float (&steps)[kFwdTokens][kVec]) {
#pragma unroll
    for (int first = 0; first < kFwdTokens; first += kRows) {
        if (first > 0) __syncwarp();
        const int own = 2 * at.column - first;
        if (own >= 0 && own < kRows) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int unit = (4 * at.row + j) ^ at.column;
                stage(own)[unit] =
                    make_float4(products[2 * j][0], products[2 * j][2], products[2 * j + 1][0], products[2 * j + 1][2]);
                stage(own + 1)[unit] =
                    make_float4(products[2 * j][1], products[2 * j][3], products[2 * j + 1][1], products[2 * j + 1][3]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kRows && first + i < kFwdTokens; ++i) {
            const float4 v = stage(i)[at.lane ^ ((first + i) / 2)];
            steps[first + i][0] = v.x, steps[first + i][1] = v.y, steps[first + i][2] = v.z, steps[first + i][3] = v.w;
        }
    }
}

// steps[k][j] = softplus(bias + dt_weight dt) of a thread's tokens, in units of ln 2, as load_steps_sm90 has them.
// `weights` are the table's. The warp's own reads of the stage, earlier ones, are done.
template <class T, class Block, int kRows, class Stage>
__device__ __forceinline__ void multiply_steps(const float* features, int feature_step, const ScanShape& s,
                                               const float* weights, const float4& bias, Stage&& stage,
                                               float (&steps)[kFwdTokens][kVec]) {
    static_assert(Block::kProducts && Block::kLanes == 32);
    const FragmentLane at;
    float products[8][4];
    // The eighth token is the seventh once more; nobody reads its steps.
    const float* const own = features + min(at.row, kFwdTokens - 1) * feature_step + 2 + at.column;
    const auto* const fragments = reinterpret_cast<const float4*>(weights);
    const auto multiply = [&](int tile, auto first) {
        const float d0 = own[tile * 8], d1 = own[tile * 8 + 4];
#pragma unroll
        for (int m = 0; m < 8; ++m) {
            const float4 w = fragments[(tile * 8 + m) * 32 + (at.lane ^ (m & 6))];
            if constexpr (decltype(first)::value)
                warp_mma_tf32(products[m], {w.x, w.y, w.z, w.w}, d0, d1, {});
            else
                warp_mma_tf32(products[m], {w.x, w.y, w.z, w.w}, d0, d1, products[m]);
        }
    };
    multiply(0, std::true_type{});
#pragma unroll 1
    for (int tile = 1; tile < Block::rank_tiles(s); ++tile) multiply(tile, std::false_type{});
    stage_steps<kRows>(at, stage, products, steps);
    const float add[kVec] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j) steps[k][j] = Math<T>::softplus(steps[k][j] + add[j]);
}

// What the backward does with the gradients of the steps. The stage has 8 rows for each warp; all of them together are
// what the products for the weights read.
template <class Block>
struct StepGradientProducts {
    static constexpr int kStageRows = kFwdTokens + 1, kWarps = Block::kThreads / 32;
    static constexpr int kStageBytes = kWarps * kStageRows * kStageUnits * 16;

    float4* const stage;
    const FragmentLane at;

    __device__ float4* row(int warp, int token) const { return stage + (warp * kStageRows + token) * kStageUnits; }
    __device__ static int moved(int unit, int token) { return unit ^ ((token & 1) * 4 + (token & 2)); }

    // Puts the gradients of the warp's steps into the stage, and writes those of its features: write(token, feature,
    // value).
    template <class F>
    __device__ __forceinline__ void of_features(const ScanShape& s, const float (&dsteps)[kFwdTokens][kVec],
                                                const float* weights, F&& write) const {
        const int warp = threadIdx.x / 32;
        __syncwarp();  // the steps have been read
#pragma unroll
        for (int k = 0; k < kFwdTokens; ++k)
            row(warp, k)[moved(at.lane, k)] =
                make_float4(to_tf32(dsteps[k][0]), to_tf32(dsteps[k][1]), to_tf32(dsteps[k][2]), to_tf32(dsteps[k][3]));
        __syncwarp();
        // Sums over the channels of units 4 (i ^ column / 2) + column, two at a time, so that the place of the i-th
        // weights, (4 (i ^ column / 2) + row % 4) ^ 2 column of product_weight, goes up with i. Rows of a product are
        // features of two tiles of them: row and + 8 are feature row % 4 and + 4 of tile 2 pair + row / 4.
        const int tiles = Block::rank_tiles(s), token = min(at.row, kFwdTokens - 1);
        const auto* const fragments =
            reinterpret_cast<const float4*>(weights) + 2 * at.column * 32 + ((at.row % 4) ^ (2 * (at.column & 1)));
        float4 g[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) g[i] = row(warp, token)[moved(4 * (i ^ (at.column / 2)) + at.column, token)];
#pragma unroll 1
        for (int pair = 0; 2 * pair < tiles; ++pair) {
            const auto* const of_tile = fragments + min(2 * pair + at.row / 4, tiles - 1) * 8 * 32;
            float sums[4] = {};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 low = of_tile[4 * i], high = of_tile[32 + 4 * i];
                warp_mma_tf32(sums, {low.x, low.z, low.y, low.w}, g[i].x, g[i].y, sums);
                warp_mma_tf32(sums, {high.x, high.z, high.y, high.w}, g[i].z, g[i].w, sums);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int feature = (2 * pair + at.row / 4) * 8 + at.row % 4 + i / 2 * 4, k = 2 * at.column + i % 2;
                if (feature < s.rank && k < kFwdTokens) write(k, feature, sums[i]);
            }
        }
    }

    // Adds what the tile gives the weights: of channels 32 warp + 4 row + (0 .. 3). `sums` are this thread's, kThreads
    // apart, four for each pair of channels and tile of features; `features` those of the tile, and chunks[c] says
    // where chunk c has them: the first token's slot and the distance to the next.
    __device__ __forceinline__ void of_weights(const ScanShape& s, const float* features, const int2* chunks,
                                               float4* sums) const {
        const int warp = threadIdx.x / 32, tiles = Block::rank_tiles(s);
        const bool second = at.column + 4 < kFwdTokens;  // the eighth token does not exist
        float4 g0[kWarps], g1[kWarps];
        const float* from[kWarps];
        int further[kWarps];
#pragma unroll
        for (int c = 0; c < kWarps; ++c) {
            const int unit = moved(8 * warp + at.row, at.column);  // of token column + 4 as well
            g0[c] = row(c, at.column)[unit];
            g1[c] = second ? row(c, at.column + 4)[unit] : float4{};
            const int2 chunk = chunks[c];
            from[c] = features + (chunk.x + at.column * chunk.y) * Block::width(s) + 2 + at.row;
            further[c] = 4 * chunk.y * Block::width(s);
        }
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            float4* const own = sums + 2 * tile * Block::kThreads;
            const float4 x = own[0], y = own[Block::kThreads];
            float low[4] = {x.x, x.y, x.z, x.w}, high[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int c = 0; c < kWarps; ++c) {
                const float d0 = from[c][tile * 8], d1 = second ? from[c][tile * 8 + further[c]] : 0.f;
                warp_mma_tf32(low, {g0[c].x, g0[c].y, g1[c].x, g1[c].y}, d0, d1, low);
                warp_mma_tf32(high, {g0[c].z, g0[c].w, g1[c].z, g1[c].w}, d0, d1, high);
            }
            own[0] = make_float4(low[0], low[1], low[2], low[3]);
            own[Block::kThreads] = make_float4(high[0], high[1], high[2], high[3]);
        }
    }

    // At the end of a plane: write(channel, feature, sum) of each, and 0 in their places.
    template <class F>
    __device__ __forceinline__ void write_weights(const ScanShape& s, float4* sums, F&& write) const {
        const int warp = threadIdx.x / 32;
#pragma unroll 1
        for (int i = 0; i < 2 * Block::rank_tiles(s); ++i) {
            const float4 v = sums[i * Block::kThreads];
            const int channel = 32 * warp + 4 * at.row + i % 2 * 2, feature = i / 2 * 8 + 2 * at.column;
            write(channel, feature, v.x), write(channel, feature + 1, v.y);
            write(channel + 1, feature, v.z), write(channel + 1, feature + 1, v.w);
            sums[i * Block::kThreads] = float4{};
        }
    }
};

}  // namespace gm
