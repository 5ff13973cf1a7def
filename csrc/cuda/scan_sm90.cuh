// SPDX-License-Identifier: Apache-2.0
// What the sm_90 scan kernels share beyond slabs and features: sums over lanes, the chunk scan, launching.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/slab_features.cuh"

namespace gm {

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
// the one after the last. enters(part, channel, state) sees the state entering each part of the slab.
template <class Block, class F>
__device__ __forceinline__ void scan_chunks(const float* P_in, float* h_in, float& carry, F&& enters) {
    constexpr int kLanes = Block::kScanLanes;
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    const int first = q * (4 * Block::kWidth + Block::kPad) + channel;  // aggregate(4 q), the others kWidth apart
    float P4[4], h4[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        P4[i] = P_in[first + i * Block::kWidth];
        h4[i] = h_in[first + i * Block::kWidth];
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
    if (q % (kLanes / Block::kParts) == 0) enters(q / (kLanes / Block::kParts), channel, state);
    carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), kLanes - 1, kLanes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        h_in[first + i * Block::kWidth] = state;
        state = fmaf(P4[i], state, h4[i]);
    }
}

// Two blocks an SM need nearly all of its memory as shared memory. Asked of the driver once for each kernel and device.
inline cudaError_t prefer_shared(const void* kernel, int device) {
    thread_local std::vector<std::pair<const void*, int>> known;
    const std::pair<const void*, int> key{kernel, device};
    if (std::find(known.begin(), known.end(), key) != known.end()) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) known.push_back(key);
    return error;
}

// As many blocks as run at once, `resident` an SM, each with several planes of one group: it loads the next plane while
// it computes, and reads its parameters once (2% at 64 x 56 against a block a plane).
template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, const ScanShape& shape, int threads, int resident, int shared,
                        cudaStream_t stream, const Args& args) {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = prefer_shared(reinterpret_cast<const void*>(kernel), device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t at_once = std::max(resident * multiprocessors / shape.groups, 1) * int64_t{shape.groups};
    const int64_t blocks = std::min(shape.batch * shape.groups, at_once);
    return launch_kernel(kernel, blocks, threads, shared, stream, args);
}

// f(type tag, std::integral_constant<int, lanes>, std::bool_constant<whole>)
template <class F>
cudaError_t dispatch_sm90(DType dtype, const ScanShape& shape, F&& f) {
    const bool whole = shape.dim == shape.lanes * kVec && shape.norm_dim == shape.dim;
    const auto with_width = [&](auto tag, auto lanes) {
        return whole ? f(tag, lanes, std::true_type{}) : f(tag, lanes, std::false_type{});
    };
    const auto with_lanes = [&](auto tag) {
        switch (shape.lanes) {
            case 4: return with_width(tag, std::integral_constant<int, 4>{});
            case 8: return with_width(tag, std::integral_constant<int, 8>{});
            case 16: return with_width(tag, std::integral_constant<int, 16>{});
            default: return with_width(tag, std::integral_constant<int, 32>{});
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
