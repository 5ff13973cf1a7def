// SPDX-License-Identifier: Apache-2.0
// What a thread of the sm_90 forward (fwd.cu) computes of its chunk in each phase of a tile. ../README.md derives it.
#pragma once

#include "cuda/scan/sm90/channel_table.cuh"
#include "cuda/scan/sm90/phases/norm.cuh"
#include "cuda/scan/sm90/tile_pipeline.cuh"

namespace gm {

// Byte offsets in dynamic shared memory.
template <class BlockType>
struct ScanFwdLayout {
    using Block = BlockType;
    static constexpr bool kBackward = false;
    static constexpr int kInputs = 2, kBarriers = 2;
    int tile_bytes, features, feature_bytes, aggregates, table, norm, barriers, total;

    __host__ __device__ explicit ScanFwdLayout(const ScanShape& s) {
        tile_bytes = Block::tile_bytes(s);
        features = kSm90Stages * kInputs * tile_bytes;
        feature_bytes = (Block::kTokens + 1) * Block::width(s) * 4;
        aggregates = features + 2 * feature_bytes;
        table = aggregates + 2 * Block::kAggregates * 4;
        norm = table + table_rows<Block>(s) * Block::kWidth * 4;
        barriers = norm + (Block::kBare ? 0 : TokenNorm<__half, Block>::kBytes);
        total = barriers + kSm90Stages * kBarriers * 8;
        if (Block::kProducts) total += Block::kPlaces * static_cast<int>(sizeof(int2));
    }
    // Of the tokens, for features of matrix products.
    __host__ __device__ int places() const { return barriers + kSm90Stages * kBarriers * 8; }
};

template <class T, class Block>
struct ScanFwdThread {
    static constexpr int kTokens = kFwdTokens;
    using Values = float[kTokens][kVec];

    const ScanShape& s;
    const TileChunk<Block>& chunk;
    const ChannelRows<Block> rows;

    // Phase 1: the aggregate (P, h) of the chunk, and y from a state of 0. The steps come in `decayed_C`, which becomes
    // what a state that enters the chunk adds to y, per unit of it. `box` and `features` are those of the chunk's first
    // token, `step` and `feature_step` the distances to the next.
    __device__ __forceinline__ void start_states(const unsigned char* box, int step, const float* features,
                                                 int feature_step, Values& y, Values& decayed_C, float* aggregate_P,
                                                 float* aggregate_h) const {
        const Values& steps = decayed_C;
        const float4 A4 = rows[kA], skip4 = rows[kSkip];
        const float A[kVec] = {A4.x, A4.y, A4.z, A4.w}, skip[kVec] = {skip4.x, skip4.y, skip4.z, skip4.w};
        float P[kVec], h[kVec];
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const float2 bc = load_features<Block>(features + k * feature_step);
            float x[kVec];
            to_floats(*reinterpret_cast<const Vec4<T>*>(box + k * step), x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float a = Math<T>::decay(steps[k][j], A[j]), in = steps[k][j] * (bc.x * x[j]);
                h[j] = k == 0 ? in : fmaf(a, h[j], in);
                P[j] = k == 0 ? a : P[j] * a;
                y[k][j] = fmaf(bc.y, h[j], skip[j] * x[j]);
                decayed_C[k][j] = bc.y * P[j];
            }
        }
        const int at = Block::aggregate(chunk.order) + chunk.c0;
        *reinterpret_cast<float4*>(aggregate_P + at) = make_float4(P[0], P[1], P[2], P[3]);
        *reinterpret_cast<float4*>(aggregate_h + at) = make_float4(h[0], h[1], h[2], h[3]);
    }

    // Phase 3: y of the state that enters the chunk, less its mean over the channels.
    __device__ __forceinline__ void finish_outputs(const float (&entering)[kVec], const Values& decayed_C,
                                                   TokenNorm<T, Block>& norm, Values& y) const {
        float moment[kTokens];
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);
            moment[k] = (y[k][0] + y[k][1]) + (y[k][2] + y[k][3]);
        }
        float counted[kVec] = {1.f, 1.f, 1.f, 1.f};
        if (!Block::kWhole) {
            const float4 counted4 = rows[kCounted];
            counted[0] = counted4.x, counted[1] = counted4.y, counted[2] = counted4.z, counted[3] = counted4.w;
        }
        norm.centre(counted, y, moment);
    }

    // Phase 3 of a bare scan: y of the state that enters the chunk is the result, in the place at `box`.
    __device__ __forceinline__ void write_bare_result(const float (&entering)[kVec], const Values& decayed_C,
                                                      const Values& y, unsigned char* box, int step) const {
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            float out[kVec];
#pragma unroll
            for (int j = 0; j < kVec; ++j) out[j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);
            if (chunk.owns) store4<true>(reinterpret_cast<T*>(box + k * step), out, kVec);
        }
    }

    // Phase 3: the result, norm and gates of y, in the place of z, which is at `box`.
    __device__ __forceinline__ void write_result(const TokenNorm<T, Block>& norm, const float4& scale4,
                                                 const float4& shift4, const Values& y, unsigned char* box,
                                                 int step) const {
        const float scale[kVec] = {scale4.x, scale4.y, scale4.z, scale4.w};
        const float shift[kVec] = {shift4.x, shift4.y, shift4.z, shift4.w};
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const auto normed = norm.scale(k);
            float x[kVec], out[kVec];
            to_floats(*reinterpret_cast<const Vec4<T>*>(box + k * step), x);
#pragma unroll
            for (int j = 0; j < kVec; ++j)
                out[j] = fmaf(normed(y[k][j]), scale[j], shift[j]) * (x[j] * Math<T>::sigmoid(x[j]));
            if (chunk.owns) store4<true>(reinterpret_cast<T*>(box + k * step), out, kVec);
        }
    }
};

}  // namespace gm
