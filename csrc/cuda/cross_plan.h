// SPDX-License-Identifier: Apache-2.0
// Constants and block shapes of the cross scan's kernels: shared by the kernels, their launchers, the op entry (which
// allocates by them) and the introspection of `_C`.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/scan_plan.h"

namespace gm {

// A block has a slice of the channels of one group, 4 a lane. 8 lanes read 64 adjacent bytes of a 16-bit image, two
// sectors of memory, and share what they read of dt, B and C; wider slices would leave less room for tokens.
constexpr int kCrossLanes = 8;
constexpr int kCrossChannels = kCrossLanes * kVec;

// 4 tokens a thread keep the forward within 128 registers, for 512 threads on a multiprocessor, and the backward within
// 255, for 256, whatever the storage type and the number of states.
constexpr int kCrossTokens = 4;
constexpr int kCrossFwdThreads = 512;
constexpr int kCrossBwdThreads = 256;

// Path tokens between saved states: 28 chunks of 4 tokens, so that 224 threads hold a whole number of intervals
// whatever the lanes. groupmamba_ext.cross_scan.saved_chunk repeats it.
constexpr int kCrossChunk = 112;
constexpr int kCrossBwdSlabThreads = kCrossChunk / kCrossTokens * kCrossLanes;
static_assert(kCrossBwdSlabThreads <= kCrossBwdThreads && kCrossBwdSlabThreads % 32 == 0, "whole warps of a block");

// Shared memory beside the sums: what the warps exchange (8 KB at 16 warps) and the tables of parameters.
constexpr size_t kCrossFixedShared = 10 * 1024;

struct CrossPlan {
    int lanes;          // that share a token, a power of two up to kCrossLanes
    int slices;         // of a group's channels, 4 * lanes each: a block each
    int threads;        // of a block
    size_t sums_bytes;  // shared memory of a block for its sums over the directions; 0: they are in device memory
};

// `limit`: shared memory that a block can have. One direction needs no sums.
inline CrossPlan cross_plan(int64_t tokens, int dim, int rank, int scans, size_t limit, bool backward) {
    CrossPlan plan{};
    const size_t weights = sizeof(float) * kCrossChannels * (rank <= kMaxStagedRank ? rank : 0);
    const size_t room = limit > kCrossFixedShared + weights ? limit - kCrossFixedShared - weights : 0;
    const int widest = std::min(scan_lanes(dim), kCrossLanes);
    plan.lanes = widest;
    if (scans > 1) {
        // Narrower slices, down to 8 channels, read dt, B and C more often, but cost less than sums in device memory.
        for (int lanes = widest; lanes >= std::min(widest, 2); lanes /= 2) {
            const size_t bytes = static_cast<size_t>(tokens) * lanes * kVec * sizeof(float);
            if (bytes > room) continue;
            plan.lanes = lanes;
            plan.sums_bytes = bytes;
            break;
        }
    }
    plan.slices = (dim + plan.lanes * kVec - 1) / (plan.lanes * kVec);
    const int64_t chunks = (tokens + kCrossTokens - 1) / kCrossTokens;
    const auto whole_warps = [&](int64_t of_chunks) { return (of_chunks * plan.lanes + 31) / 32 * 32; };
    if (backward) {
        plan.threads =
            static_cast<int>(whole_warps(chunks) <= kCrossBwdThreads ? whole_warps(chunks) : kCrossBwdSlabThreads);
    } else {  // as many slabs as needed, of equal size
        const int64_t most = kCrossFwdThreads / plan.lanes, slabs = std::max<int64_t>((chunks + most - 1) / most, 1);
        plan.threads = static_cast<int>(whole_warps((chunks + slabs - 1) / slabs));
    }
    return plan;
}

}  // namespace gm
