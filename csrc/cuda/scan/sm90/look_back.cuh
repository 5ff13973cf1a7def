// SPDX-License-Identifier: Apache-2.0
// The state that enters a slab, where several blocks share a plane: decoupled look-back.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/scan/sm90/inter_block_state.cuh"
#include "cuda/scan/sm90/walk.cuh"

namespace gm {

// Sends on a slab's aggregate (P, h) of the thread's channel, as its last scan lane has it, and returns the state that
// enters the slab. It follows from `state`, which leaves the block's own slab before that, or 0 at the start of the
// path, and the aggregates of the other blocks' slabs since. It is computed as a block alone would, slab by slab, so
// that all bits of the results are the same whatever the number of blocks. In teams of more than kSegment blocks every
// kSegment-th slab sends on its entering state too, and others start from the last of these before them.
// Blocks take slabs in order and run all at once: what one waits for, another is about to send. Called, not inlined, so
// that it takes no registers of blocks that share nothing: 4% of the forward at 128 x 28, 5% at 352 x 14.
template <class Block>
__device__ __noinline__ float look_back(float* plane, int slabs, int ways, int step, float state, float P, float h) {
    constexpr int kLanes = Block::kScanLanes, kHeld = kLanes == 2 ? 3 : 8;  // 4 of 2 would make the caller spill
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    float2* const pairs = reinterpret_cast<float2*>(plane) + channel;
    if (q == kLanes - 1) send_pair(pairs + step * Block::kWidth, P, h);
    if (step == 0) return 0.f;
    int from = max(step - ways + 1, 0);
    // Where states that enter segments lie, but for the first segment's, which is 0.
    float* const states = plane + (2 * slabs - 1) * Block::kWidth + channel;
    const float* start = nullptr;
    uint32_t first = present(state);
    if (step - from > kSegment) {
        const int segment = (step - 1) / kSegment;
        from = segment * kSegment;
        start = states + segment * Block::kWidth;
        first = read_word(start);
    }
    const int count = step - from;
    const float2* const sent = pairs + from * Block::kWidth;
#pragma unroll 1
    for (int base = 0; base < count; base += kHeld * kLanes) {
        uint64_t held[kHeld];
        // Places behind the last slab hold (1, -0), which leaves any state as it is.
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const int i = base + k * kLanes + q;
            held[k] = i < count ? read_pair(sent + i * Block::kWidth) : 0x800000003f800000u;
        }
        const auto absent = [&](int k) { return static_cast<uint32_t>(held[k]) == kAbsent; };
        while (true) {
            bool wait = first == kAbsent;
#pragma unroll
            for (int k = 0; k < kHeld; ++k) wait |= absent(k);
            if (!wait) break;
            if (first == kAbsent) first = read_word(start);
#pragma unroll
            for (int k = 0; k < kHeld; ++k)
                if (absent(k)) held[k] = read_pair(sent + (base + k * kLanes + q) * Block::kWidth);
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
    if (q == 0 && ways > kSegment && step % kSegment == 0) send_word(states + step / kSegment * Block::kWidth, state);
    return state;
}

}  // namespace gm
