// SPDX-License-Identifier: Apache-2.0
// Sums over the lanes that share a token in the sm_90 scan kernels, and the LayerNorm made of them.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/scan/sm90/tile_scheduler.cuh"

namespace gm {

// Sums over the lanes of a token, several values at once; every lane gets all of the sums.
template <int kLanes, int kCount>
__device__ __forceinline__ void token_sums(float (&v)[kCount]) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2)
#pragma unroll
        for (int k = 0; k < kCount; ++k) v[k] += __shfl_xor_sync(kFullWarp, v[k], d);
}

// The same sums, each on some lanes only: in every step a lane gives away half of its values and keeps the other half,
// 9 shuffles instead of 35 for 32 lanes. Calls write(k, sum) on one lane a token.
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
    constexpr int kSharing = kLanes > 8 ? kLanes / 8 : 1;  // lanes that end up with the same sum
    const bool writes = lane % kSharing == 0;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const int k = kept * kLeft + i;
        if (writes && k < kFwdTokens) write(k, w[i]);
    }
}

// Sums of eight values over the lanes of an octet: lane i gets the sum of v[i]. 7 shuffles instead of 24.
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

// LayerNorm's sums over the lanes of a token. From 16 lanes on, lane i of an octet computes token i of its chunk: each
// octet takes the mean and the squared deviations of its own 32 channels, and these are combined through shared memory
// (Chan, Golub and LeVeque, 1983).
template <class T, class Block>
class TokenNorm {
    static constexpr bool kByOctets = Block::kLanes >= 16;
    static constexpr int kBlockOctets = Block::kThreads / 8, kOctets = Block::kOctets;
    static constexpr int kShares = Block::kThreads;  // pairs, or sums, that octets exchange
    const ScanShape& s;
    unsigned char* const shared;
    float inverse_dim;
    float inverse_std[kFwdTokens];  // used where the lanes are few

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
    // Subtracts the mean from y. `moment` comes in as the sum of y over the thread's channels.
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
    // Sums of v over the lanes of a token, for every lane. `turn` is 0 in the first call in a tile, 1 in the second.
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

}  // namespace gm
