// SPDX-License-Identifier: Apache-2.0
// The scan over the chunks of a tile.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/scan/sm90/tile_scheduler.cuh"

namespace gm {

// Turns the aggregates (P, h) of the chunks, in shared memory in the order of the path, into the states that enter the
// chunks (which take the place of h). kScanLanes neighbouring threads serve a channel. `carry` is the state of the
// thread's channel before the first chunk and becomes the one after the last. arrive(P, h) gets the aggregate of the
// whole tile in the last of these threads; it may set the carry, and returns true if it did. enters(part, channel,
// state) gets the state that enters each part of the tile. kAgainst: P was written in the opposite order, that of a
// scan in the other direction.
template <class Block, bool kAgainst, class Arrive, class F>
__device__ __forceinline__ void scan_chunks(const float* P_in, float* h_in, float& carry, Arrive&& arrive, F&& enters) {
    constexpr int kLanes = Block::kScanLanes, kChunks = Block::kLaneChunks;
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    if (kLanes * Block::kWidth < Block::kThreads && channel >= Block::kWidth) return;
    const int first =
        q * (kChunks * Block::kWidth + Block::kPad) + channel;  // aggregate(kChunks q); the lane's other chunks follow
    const int step_P = kAgainst ? -Block::kWidth : Block::kWidth;
    const float* const first_P = P_in + (kAgainst ? Block::aggregate((kLanes - q) * kChunks - 1) + channel : first);
    float P_own[kChunks], h_own[kChunks];
    const auto read = [&] {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            P_own[i] = first_P[i * step_P];
            h_own[i] = h_in[first + i * Block::kWidth];
        }
    };
    read();
    float P = P_own[0], h = h_own[0];
#pragma unroll
    for (int i = 1; i < kChunks; ++i) h = fmaf(P_own[i], h, h_own[i]), P *= P_own[i];
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
        const float h_before = __shfl_up_sync(kFullWarp, h, d, kLanes),
                    P_before = __shfl_up_sync(kFullWarp, P, d, kLanes);
        if (q >= d) h = fmaf(P, h_before, h), P *= P_before;
    }
    const float P_before = __shfl_up_sync(kFullWarp, P, 1, kLanes), h_before = __shfl_up_sync(kFullWarp, h, 1, kLanes);
    if (arrive(P, h)) read();  // read once more: held through the wait, they would cost registers
    float state = q == 0 ? carry : fmaf(P_before, carry, h_before);
    if (q % (kLanes / Block::kParts) == 0) enters(q / (kLanes / Block::kParts), channel, state);
    carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), kLanes - 1, kLanes);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        h_in[first + i * Block::kWidth] = state;
        state = fmaf(P_own[i], state, h_own[i]);
    }
}

// The same as scan_chunks, bit for bit, for four chunks and by each thread for its own channels: no barrier need
// follow.
template <class Block>
__device__ __forceinline__ void gather_chunks(const float* P_in, const float* h_in, const TileChunk<Block>& chunk,
                                              float (&carry)[kVec], float (&entering)[kVec]) {
    static_assert(Block::kChunks == 4);
    float state[kVec], P_all[kVec], h_all[kVec];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = Block::aggregate(i) + chunk.c0;
        const float4 P4 = *reinterpret_cast<const float4*>(P_in + at), h4 = *reinterpret_cast<const float4*>(h_in + at);
        const float P[kVec] = {P4.x, P4.y, P4.z, P4.w}, h[kVec] = {h4.x, h4.y, h4.z, h4.w};
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            if (i == 0) {
                state[j] = entering[j] = carry[j], P_all[j] = P[j], h_all[j] = h[j];
            } else {
                if (i == chunk.order) entering[j] = state[j];
                h_all[j] = fmaf(P[j], h_all[j], h[j]), P_all[j] *= P[j];
            }
            state[j] = fmaf(P[j], state[j], h[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) carry[j] = fmaf(P_all[j], carry[j], h_all[j]);
}

}  // namespace gm
