// SPDX-License-Identifier: Apache-2.0
// What the sm_90 scan kernels share beyond slabs and features: sums over lanes, the chunk scan, states passed from
// block to block, launching.
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

// Sums of eight values over the lanes of an octet: lane i gets that of v[i]. 7 shuffles in place of 24.
__device__ __forceinline__ float octet_sums(const float (&v)[8]) {
    const bool upper4 = threadIdx.x & 4, upper2 = threadIdx.x & 2, upper1 = threadIdx.x & 1;
    float w[4], x[2];
#pragma unroll
    for (int k = 0; k < 4; ++k)
        w[k] = (upper4 ? v[k + 4] : v[k]) + __shfl_xor_sync(kFullWarp, upper4 ? v[k] : v[k + 4], 4);
#pragma unroll
    for (int k = 0; k < 2; ++k)
        x[k] = (upper2 ? w[k + 2] : w[k]) + __shfl_xor_sync(kFullWarp, upper2 ? w[k] : w[k + 2], 2);
    return (upper1 ? x[1] : x[0]) + __shfl_xor_sync(kFullWarp, upper1 ? x[0] : x[1], 1);
}

// LayerNorm's sums over the lanes of a token. From 16 lanes on, lane i of an octet works out the token i of its chunk:
// octets take the mean and the squared deviations of their own 32 channels, which are then put together (Chan, Golub
// and LeVeque, 1983), through shared memory.
template <class T, class Block>
class TokenNorm {
    static constexpr bool kByOctets = Block::kLanes >= 16;
    static constexpr int kBlockOctets = Block::kThreads / 8, kOctets = Block::kOctets;
    static constexpr int kShares = Block::kThreads;  // pairs (or sums) that octets exchange
    const ScanShape& s;
    unsigned char* const shared;
    float inverse_dim;
    float inverse_std[kFwdTokens];  // with few lanes

    // Of this thread's octet and chunk.
    __device__ float2* results() const { return reinterpret_cast<float2*>(shared) + threadIdx.x / 8 * 8; }
    __device__ float2* shares() const {
        return reinterpret_cast<float2*>(shared) + kBlockOctets * 8 + threadIdx.x / Block::kLanes * 8 * kOctets;
    }
    __device__ float* sums(int turn) const {
        return reinterpret_cast<float*>(shared + kBytes) + (turn * kBlockOctets + threadIdx.x / 8) * 8;
    }
    __device__ float* sum_shares(int turn) const {
        return reinterpret_cast<float*>(shared + kBytes) + 2 * kBlockOctets * 8 + turn * kShares +
               threadIdx.x / Block::kLanes * 8 * kOctets;
    }

    __device__ static void sync() {
        if constexpr (Block::kInWarp)
            __syncwarp();
        else
            __syncthreads();
    }
    __device__ static int lane() { return threadIdx.x % 8; }
    __device__ static int octet() { return threadIdx.x % Block::kLanes / 8; }
    __device__ float counted_in(int octet) const {
        return Block::kWhole ? 32.f : static_cast<float>(min(max(s.norm_dim - 32 * octet, 0), 32));
    }

public:
    // Bytes of shared memory, a multiple of 16; kSumBytes more where `sum` is called.
    static constexpr int kBytes = kByOctets ? (kBlockOctets * 8 + kShares) * 8 : 0;
    static constexpr int kSumBytes = kByOctets ? 2 * (kBlockOctets * 8 + kShares) * 4 : 0;

    __device__ TokenNorm(const ScanShape& shape, unsigned char* shared_bytes)
        : s(shape), shared(shared_bytes), inverse_dim(Block::kWhole ? 1.f / Block::kWidth : 1.f / shape.norm_dim) {}
    // Centres y, whose sums over a thread's channels are `moment`, as scale(k) expects it.
    __device__ __forceinline__ void centre(const float (&counted)[kVec], float (&y)[kFwdTokens][kVec],
                                           float (&moment)[kFwdTokens]) {
        const auto subtract = [&](int k, float mean) {
            moment[k] = 0.f;
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                y[k][j] = fmaf(-counted[j], mean, y[k][j]);
                moment[k] = fmaf(y[k][j], y[k][j], moment[k]);
            }
        };
        if constexpr (!kByOctets) {
            token_sums<Block::kLanes>(moment);
#pragma unroll
            for (int k = 0; k < kFwdTokens; ++k)
                subtract(k, Block::kWhole ? moment[k] * inverse_dim : mean_of(moment[k], s.norm_dim, inverse_dim));
            token_sums<Block::kLanes>(moment);
#pragma unroll
            for (int k = 0; k < kFwdTokens; ++k)
                inverse_std[k] = Math<T>::rsqrt(fmaf(moment[k], inverse_dim, s.norm_eps));
        } else {
            const auto sums = [&] {
                return octet_sums({moment[0], moment[1], moment[2], moment[3], moment[4], moment[5], moment[6], 0.f});
            };
            const float count = counted_in(octet()), inverse_count = Block::kWhole ? 1.f / 32 : 1.f / fmaxf(count, 1.f);
            const float sum = sums(),
                        own_mean = Block::kWhole ? sum * inverse_count : mean_of(sum, count, inverse_count);
#pragma unroll
            for (int k = 0; k < kFwdTokens; ++k) subtract(k, __shfl_sync(kFullWarp, own_mean, k, 8));
            shares()[lane() * kOctets + octet()] = make_float2(own_mean, sums());
            sync();
            float means[kOctets], total = 0.f, squares = 0.f;
#pragma unroll
            for (int o = 0; o < kOctets; ++o) {
                const float2 share = shares()[lane() * kOctets + o];
                means[o] = share.x, squares += share.y;
                total = fmaf(counted_in(o), means[o], total);
            }
            const float mean = Block::kWhole ? total * inverse_dim : mean_of(total, s.norm_dim, inverse_dim);
#pragma unroll
            for (int o = 0; o < kOctets; ++o)
                squares = fmaf(counted_in(o) * (means[o] - mean), means[o] - mean, squares);
            const float scale = Math<T>::rsqrt(fmaf(squares, inverse_dim, s.norm_eps));
            results()[lane()] = make_float2(scale, (own_mean - mean) * scale);
            __syncwarp();
        }
    }
    struct Scale {
        float inverse_std, shift;
        __device__ __forceinline__ float operator()(float y) const {
            return kByOctets ? fmaf(y, inverse_std, shift) : y * inverse_std;
        }
    };
    __device__ __forceinline__ Scale scale(int k) const {
        if constexpr (!kByOctets) return {inverse_std[k], 0.f};
        const float2 result = results()[k];
        return {result.x, result.y};
    }
    // Sums of v over the lanes of a token, for every lane. `turn` is 0, then 1, in a slab.
    __device__ __forceinline__ void sum(float (&v)[8], int turn) const {
        if constexpr (!kByOctets) {
            token_sums<Block::kLanes>(v);
        } else {
            float* const from = sum_shares(turn) + lane() * kOctets;
            from[octet()] = octet_sums(v);
            sync();
            float own = from[0];
#pragma unroll
            for (int o = 1; o < kOctets; ++o) own += from[o];
            float* const to = sums(turn);
            to[lane()] = own;
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const float4 w = *reinterpret_cast<const float4*>(to + i);
                v[i] = w.x, v[i + 1] = w.y, v[i + 2] = w.z, v[i + 3] = w.w;
            }
        }
    }
};

// Words that one block writes and others wait for: each is one access, so that a word that is there is there as a
// whole, and needs neither flag nor fence. All ones, a NaN that no arithmetic makes, stand for those that are not.
constexpr uint32_t kAbsent = 0xffffffffu;

__device__ __forceinline__ uint32_t present(float v) {
    const uint32_t bits = __float_as_uint(v);
    return bits == kAbsent ? 0x7fffffffu : bits;
}
__device__ __forceinline__ void send_word(float* to, float v) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(present(v)) : "memory");
}
__device__ __forceinline__ uint32_t read_word(const float* from) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    return bits;
}
__device__ __forceinline__ void send_pair(float2* to, float x, float y) {
    const uint64_t bits = uint64_t{__float_as_uint(y)} << 32 | present(x);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}
__device__ __forceinline__ uint64_t read_pair(const float2* from) {
    uint64_t bits;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
    return bits;
}

// Sends on a slab's aggregate (P, h) of the thread's channel, as its last scan lane has it, and returns the state that
// enters the slab, which follows from those of the plane's slabs before. It is computed as a block alone would, slab by
// slab from 0, so that all bits of the results are the same whatever the number of blocks; only not all of the way by
// each: every kSegment-th slab sends on its entering state too, and others start from the last of these before them.
// Blocks take slabs in order and run all at once: what one waits for, another is about to send. Called, not inlined, so
// that it takes no registers of blocks that share nothing: 4% of the forward at 128 x 28, 5% at 352 x 14.
template <class Block>
__device__ __noinline__ float look_back(float* exchange, const ScanShape& s, const SlabPlan& plan, int plane, int step,
                                        float P, float h) {
    constexpr int kLanes = Block::kScanLanes, kHeld = kLanes == 2 ? 3 : 8;  // 4 of 2 would make the caller spill
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    float2* const pairs =
        reinterpret_cast<float2*>(exchange) + static_cast<int64_t>(plane) * plan.slabs * Block::kWidth + channel;
    const int segments = (plan.slabs - 1) / kSegment;
    float* const states = exchange + s.batch * s.groups * plan.slabs * (2 * Block::kWidth) +
                          static_cast<int64_t>(plane) * segments * Block::kWidth + channel;
    if (q == kLanes - 1) send_pair(pairs + static_cast<int64_t>(step) * Block::kWidth, P, h);
    if (step == 0) return 0.f;
    const int segment = (step - 1) / kSegment, count = step - segment * kSegment;
    const float2* const from = pairs + static_cast<int64_t>(segment) * kSegment * Block::kWidth;
    const float* const start = states + (segment - 1) * Block::kWidth;
    uint32_t first = segment > 0 ? read_word(start) : 0u;
    float state = 0.f;
#pragma unroll 1
    for (int base = 0; base < count; base += kHeld * kLanes) {
        uint64_t held[kHeld];
        // Places behind the last slab hold (1, -0), which leaves any state as it is.
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const int i = base + k * kLanes + q;
            held[k] = i < count ? read_pair(from + i * Block::kWidth) : 0x800000003f800000u;
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
                if (absent(k)) held[k] = read_pair(from + (base + k * kLanes + q) * Block::kWidth);
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
    if (q == 0 && step % kSegment == 0) send_word(states + segment * Block::kWidth, state);
    return state;
}

// Chunk aggregates (P, h) in shared memory, by order, to the states entering the chunks (in place of h). kScanLanes
// neighbouring threads serve a channel. `carry` is the state of the thread's channel before the first chunk and becomes
// the one after the last. arrive(P, h), with the aggregate of the slab in the last of the lanes, may set the carry
// first and says whether it did. enters(part, channel, state) sees the state entering each part of the slab.
template <class Block, class Arrive, class F>
__device__ __forceinline__ void scan_chunks(const float* P_in, float* h_in, float& carry, Arrive&& arrive, F&& enters) {
    constexpr int kLanes = Block::kScanLanes;
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    const int first = q * (4 * Block::kWidth + Block::kPad) + channel;  // aggregate(4 q), the others kWidth apart
    float P4[4], h4[4];
    const auto read = [&] {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            P4[i] = P_in[first + i * Block::kWidth];
            h4[i] = h_in[first + i * Block::kWidth];
        }
    };
    read();
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
    if (arrive(P, h)) read();  // a second time, so as not to hold them through the wait
    float state = q == 0 ? carry : fmaf(P_before, carry, h_before);
    if (q % (kLanes / Block::kParts) == 0) enters(q / (kLanes / Block::kParts), channel, state);
    carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), kLanes - 1, kLanes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        h_in[first + i * Block::kWidth] = state;
        state = fmaf(P4[i], state, h4[i]);
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
    error = prefer_shared(kernel, device);
    if (error == cudaSuccess) error = raise_shared_limit(kernel, shared);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared);
    if (error != cudaSuccess) return error;
    blocks = cooperative ? int64_t{resident} * multiprocessors : 0;
    known.push_back({kernel, device, shared, blocks});
    return cudaSuccess;
}

template <class Kernel, class Args>
cudaError_t share_sm90(Kernel kernel, int threads, int shared, Args& args) {
    int64_t at_once = 0;
    const cudaError_t error = blocks_at_once(reinterpret_cast<const void*>(kernel), threads, shared, at_once);
    if (error == cudaSuccess) share_planes(args.scan.shape, at_once, args.plan);
    return error;
}

// As many blocks as run at once, `resident` an SM, each with several planes of one group: it loads the next plane while
// it computes, and reads its parameters once (2% at 64 x 56 against a block a plane). Those that share planes wait for
// one another and must all run.
template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, int threads, int resident, int shared, cudaStream_t stream, const Args& args) {
    const ScanShape& shape = args.scan.shape;
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = prefer_shared(reinterpret_cast<const void*>(kernel), device);
    if (error == cudaSuccess && args.plan.members > 0) {
        const size_t bytes = exchange_floats(shape, args.plan) * sizeof(float);
        error = cudaMemsetAsync(args.exchange, kAbsent & 0xff, bytes, stream);
        if (error != cudaSuccess) return error;
        const int64_t blocks = int64_t{args.plan.members} * shape.groups;
        return launch_at_once(kernel, blocks, threads, shared, stream, args);
    }
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t at_once = std::max(resident * multiprocessors / shape.groups, 1) * int64_t{shape.groups};
    const int64_t blocks = std::min(shape.batch * shape.groups, at_once);
    return launch_kernel(kernel, blocks, threads, shared, stream, args);
}

// f(type tag, std::integral_constant<int, lanes>, std::bool_constant<whole>)
template <class F>
cudaError_t dispatch_sm90(DType dtype, const ScanShape& shape, F&& f) {
    const int used = sm90_lanes(shape);
    const bool whole = shape.dim == used * kVec && shape.norm_dim == shape.dim;
    const auto with_width = [&](auto tag, auto lanes) {
        return whole ? f(tag, lanes, std::true_type{}) : f(tag, lanes, std::false_type{});
    };
    const auto with_lanes = [&](auto tag) {
        switch (used) {
            case 4: return with_width(tag, std::integral_constant<int, 4>{});
            case 8: return with_width(tag, std::integral_constant<int, 8>{});
            case 16: return with_width(tag, std::integral_constant<int, 16>{});
            case kNarrowLanes: return f(tag, std::integral_constant<int, kNarrowLanes>{}, std::false_type{});
            default: return f(tag, std::integral_constant<int, 32>{}, std::false_type{});  // whole, a few would spill
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
