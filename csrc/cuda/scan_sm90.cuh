// SPDX-License-Identifier: Apache-2.0
// What the sm_90 scan kernels share beyond slabs, features and the norm: the chunk scan, states passed from block to
// block, launching.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/slab_features.cuh"
#include "cuda/slab_norm.cuh"
#include "cuda/words.cuh"

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

// Chunk aggregates (P, h) in shared memory, by order, to the states entering the chunks (in place of h). kScanLanes
// neighbouring threads serve a channel. `carry` is the state of the thread's channel before the first chunk and becomes
// the one after the last. arrive(P, h), with the aggregate of the slab in the last of the lanes, may set the carry
// first and says whether it did. enters(part, channel, state) sees the state entering each part of the slab.
// kAgainst: P lies in the opposite order, that of the walk the other way.
template <class Block, bool kAgainst, class Arrive, class F>
__device__ __forceinline__ void scan_chunks(const float* P_in, float* h_in, float& carry, Arrive&& arrive, F&& enters) {
    constexpr int kLanes = Block::kScanLanes, kChunks = Block::kLaneChunks;
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    if (kLanes * Block::kWidth < Block::kThreads && channel >= Block::kWidth) return;
    const int first = q * (kChunks * Block::kWidth + Block::kPad) + channel;  // aggregate(kChunks q), the others behind
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
    if (arrive(P, h)) read();  // a second time, so as not to hold them through the wait
    float state = q == 0 ? carry : fmaf(P_before, carry, h_before);
    if (q % (kLanes / Block::kParts) == 0) enters(q / (kLanes / Block::kParts), channel, state);
    carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), kLanes - 1, kLanes);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        h_in[first + i * Block::kWidth] = state;
        state = fmaf(P_own[i], state, h_own[i]);
    }
}

// What scan_chunks does, to the bit, for four chunks and by each thread for its own channels: no barrier need follow.
template <class Block>
__device__ __forceinline__ void gather_chunks(const float* P_in, const float* h_in, const SlabChunk<Block>& chunk,
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

// Blocks of a kernel that the current device runs at once.
inline cudaError_t blocks_at_once(const void* kernel, int threads, int shared, int64_t& blocks) {
    struct Known {
        const void* kernel;
        int device, shared;
        int64_t blocks;
    };
    thread_local std::vector<Known> known;
    int device = 0, multiprocessors = 0, resident = 0, cooperative = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    for (const Known& k : known)
        if (k.kernel == kernel && k.device == device && k.shared == shared) return blocks = k.blocks, cudaSuccess;
    error = raise_shared_limit(kernel, shared);
    if (error == cudaSuccess) error = multiprocessors_of_device(multiprocessors);
    if (error == cudaSuccess) error = device_attribute(cudaDevAttrCooperativeLaunch, cooperative);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared);
    if (error != cudaSuccess) return error;
    blocks = cooperative ? int64_t{resident} * multiprocessors : 0;
    known.push_back({kernel, device, shared, blocks});
    return cudaSuccess;
}

// Images that the current device's cache holds, of a pass that reads and writes `tensors` of them; 0 where their groups
// share no 64 bytes, of which the memory moves no fewer.
inline cudaError_t cached_images(const ImageArg& image, const ScanShape& shape, size_t tensors, double& images) {
    images = 0.;
    const bool interleaved = shape.groups > 1 && image.group < image.token;
    if (!interleaved || shape.dim > 16) return cudaSuccess;
    int bytes = 0;
    const cudaError_t error = device_attribute(cudaDevAttrL2CacheSize, bytes);
    const double of_image =
        2. * static_cast<double>(tensors) * static_cast<double>(image.token) * shape.height * shape.width;
    images = bytes / of_image;
    return error;
}

template <class Kernel, class Args>
cudaError_t share_sm90(Kernel kernel, int threads, int shared, size_t tensors, Args& args) {
    int64_t at_once = 0;
    double cached = 0.;
    cudaError_t error = blocks_at_once(reinterpret_cast<const void*>(kernel), threads, shared, at_once);
    if (error == cudaSuccess) error = cached_images(args.scan.u, args.scan.shape, tensors, cached);
    if (error == cudaSuccess) share_planes(args.scan.shape, at_once, cached, args.plan);
    return error;
}

// As many blocks as run at once, `resident` an SM, each with several planes of one group: it loads the next plane while
// it computes, and reads its parameters once (2% at 64 x 56 against a block a plane). Those that share planes wait for
// one another and must all run. How an SM's memory is cut into shared memory and cache is left to the driver: asked for
// the most shared memory, it leaves 28 KB of cache, too little for the features of two planes at 56 x 56, of which a
// slab of columns reads a few of each row: 7% of the forward there, 13% at 112 x 112.
template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, int threads, int resident, int shared, cudaStream_t stream, const Args& args) {
    const ScanShape& shape = args.scan.shape;
    if (args.plan.ways > 1) {
        if (!args.exchange_marked) {
            const size_t bytes = exchange_floats(shape, args.plan) * sizeof(float);
            const cudaError_t error = cudaMemsetAsync(args.exchange, kAbsent & 0xff, bytes, stream);
            if (error != cudaSuccess) return error;
        }
        const int64_t blocks = int64_t{args.plan.teams} * args.plan.ways * shape.groups;
        return launch_at_once(kernel, blocks, threads, shared, stream, args);
    }
    int multiprocessors = 0;
    const cudaError_t error = multiprocessors_of_device(multiprocessors);
    if (error != cudaSuccess) return error;
    const int64_t at_once = std::max(resident * multiprocessors / shape.groups, 1) * int64_t{shape.groups};
    const int64_t blocks = std::min(shape.batch * shape.groups, at_once);
    return launch_kernel(kernel, blocks, threads, shared, stream, args);
}

// f(type tag, std::integral_constant<int, lanes>, std::bool_constant<whole>, std::bool_constant<runs>). Slabs of runs
// are a kernel of their own: what their places cost, in instructions and registers, the others need not pay (5% of the
// backward).
template <class F>
cudaError_t dispatch_sm90(DType dtype, const ScanShape& shape, const SlabPlan& plan, F&& f) {
    const int used = sm90_lanes(shape);
    const bool runs = plan.columns == 0,
               whole = shape.dim == used * kVec && shape.norm_dim == shape.dim && shape.param_dim == shape.dim;
    const auto with_cut = [&](auto tag, auto lanes) {
        return runs ? f(tag, lanes, std::false_type{}, std::true_type{})
                    : f(tag, lanes, std::false_type{}, std::false_type{});
    };
    const auto with_width = [&](auto tag, auto lanes) {
        return whole && !runs ? f(tag, lanes, std::true_type{}, std::false_type{}) : with_cut(tag, lanes);
    };
    const auto with_lanes = [&](auto tag) {
        switch (used) {
            case 4: return with_width(tag, std::integral_constant<int, 4>{});
            case 8: return with_width(tag, std::integral_constant<int, 8>{});
            case 16: return with_width(tag, std::integral_constant<int, 16>{});
            case kNarrowLanes: return with_cut(tag, std::integral_constant<int, kNarrowLanes>{});
            default: return with_cut(tag, std::integral_constant<int, 32>{});  // whole, a few would spill
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
