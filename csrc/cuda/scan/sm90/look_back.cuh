// SPDX-License-Identifier: Apache-2.0
// The state that enters a tile where several blocks share a plane, by decoupled look-back.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/scan/sm90/inter_block_state.cuh"
#include "cuda/scan/sm90/tile_scheduler.cuh"

namespace gm {

// Publishes the aggregate (P, h) of a tile for the thread's channel, which the last scan lane holds, and returns the
// state that enters the tile. It is computed from `state`, the one that leaves this block's previous tile (0 at the
// start of the path), and from the aggregates of the other blocks' tiles since then: one tile after another, as a
// single block would, so that the results have the same bits whatever the number of blocks. In teams of more than
// kSegment blocks every kSegment-th tile also publishes the state that enters it, and later tiles start from the last
// of these.
// Blocks take tiles in the order of the path and all run at once, so whatever a block waits for will be published.
// Called, not inlined: inlined, it takes registers from blocks that share nothing, 4% of the forward at 128 x 28 and
// 5% at 352 x 14.
template <class Block>
__device__ __attribute__((noinline)) float look_back(float* plane, int tiles, int blocks_per_plane, int step,
                                                     float state, float P, float h) {
    constexpr int kLanes = Block::kScanLanes, kHeld = kLanes == 2 ? 3 : 8;  // 4 for 2 lanes would make the caller spill
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    float2* const pairs = reinterpret_cast<float2*>(plane) + channel;
    if (q == kLanes - 1) publish_aggregate(pairs + step * Block::kWidth, P, h);
    if (step == 0) return 0.f;
    int from = max(step - blocks_per_plane + 1, 0);
    // The states that enter segments, but for the first segment's, which is 0.
    float* const states = plane + (2 * tiles - 1) * Block::kWidth + channel;
    const float* start = nullptr;
    uint32_t first = ready_bits(state);
    if (step - from > kSegment) {
        const int segment = (step - 1) / kSegment;
        from = segment * kSegment;
        start = states + segment * Block::kWidth;
        first = poll_state(start);
    }
    const int count = step - from;
    const float2* const sent = pairs + from * Block::kWidth;
#pragma unroll 1
    for (int base = 0; base < count; base += kHeld * kLanes) {
        uint64_t held[kHeld];
        // Places behind the last tile hold (1, -0), which leaves any state as it is.
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const int i = base + k * kLanes + q;
            held[k] = i < count ? poll_aggregate(sent + i * Block::kWidth) : 0x800000003f800000u;
        }
        const auto absent = [&](int k) { return static_cast<uint32_t>(held[k]) == kNotReady; };
        while (true) {
            bool wait = first == kNotReady;
#pragma unroll
            for (int k = 0; k < kHeld; ++k) wait |= absent(k);
            if (!wait) break;
            if (first == kNotReady) first = poll_state(start);
#pragma unroll
            for (int k = 0; k < kHeld; ++k)
                if (absent(k)) held[k] = poll_aggregate(sent + (base + k * kLanes + q) * Block::kWidth);
        }
        if (base == 0) state = __uint_as_float(first);
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            if (base + k * kLanes >= count) break;
            const float P_own = __uint_as_float(static_cast<uint32_t>(held[k])),
                        h_own = __uint_as_float(static_cast<uint32_t>(held[k] >> 32));
#pragma unroll
            for (int lane = 0; lane < kLanes; ++lane)
                state = kLanes == 1 ? fmaf(P_own, state, h_own)
                                    : fmaf(__shfl_sync(kFullWarp, P_own, lane, kLanes), state,
                                           __shfl_sync(kFullWarp, h_own, lane, kLanes));
        }
    }
    if (q == 0 && blocks_per_plane > kSegment && step % kSegment == 0)
        publish_state(states + step / kSegment * Block::kWidth, state);
    return state;
}

}  // namespace gm
