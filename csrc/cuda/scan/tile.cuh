// SPDX-License-Identifier: Apache-2.0
// How a block of the portable kernels holds a tile of a path, and the scan operator across its threads.
//
// A block serves one (batch, group). `lanes` neighbouring threads share a token, 4 channels each. A thread owns
// `kTokens` successive tokens of the path, a chunk, so a block holds threads / lanes chunks: its tile. The recurrence
// h_t = a_t h_{t-1} + b_t composes as pairs (P, h): first each thread over its chunk, then the chunks of a warp by
// shuffles, then the warps by one exchange through shared memory. README.md derives it.
#pragma once

#include <type_traits>

#include "cuda/common/math.cuh"
#include "cuda/scan/args.h"
#include "cuda/scan/plan.h"

namespace gm {

template <class T, bool kSingle>
constexpr int kBwdTokens = bwd_tokens(kSingle, sizeof(T));

struct ThreadCoord {
    int batch, group;  // of the block
    int image_group,
        scan;       // the group of the images that it scans, and the number of its scan among the scans of that group
    int direction;  // code of the group
    int chunk_in_warp, chunks_per_warp, chunk;
    int channel, valid;  // first channel of the thread, how many of its 4 exist
    int lanes;

    __device__ explicit ThreadCoord(const ScanShape& s)
        : batch(blockIdx.x / s.groups), group(blockIdx.x % s.groups), lanes(s.lanes) {
        chunks_per_warp = 32 / lanes;
        chunk = threadIdx.x / lanes;
        chunk_in_warp = chunk & (chunks_per_warp - 1);
        channel = lane() * kVec;
        valid = min(max(s.dim - channel, 0), kVec);
        direction = (s.directions[group >> 4] >> (2 * (group & 15))) & 3;
        image_group = group / s.scans, scan = group - image_group * s.scans;
    }
    // Computed where needed, to spare registers.
    __device__ __forceinline__ int lane() const { return threadIdx.x & (lanes - 1); }  // among the lanes of its token
    __device__ __forceinline__ int warp() const { return threadIdx.x >> 5; }
    __device__ __forceinline__ int num_warps() const { return blockDim.x >> 5; }
    __device__ __forceinline__ int num_chunks() const { return blockDim.x / lanes; }
};

// Row-major numbers of a thread's tokens for one tile. Tokens past the end repeat the last one (so that loads stay in
// bounds) and are not counted.
template <int kTokens>
struct Path {
    int token[kTokens];
    int count;

    __device__ Path(const ScanShape& s, int direction, int first) {
        const int tokens = s.height * s.width;
        count = min(max(tokens - first, 0), kTokens);
        const bool reverse = direction & 1, columns = direction & 2;
        int t = min(first, tokens - 1);
        if (reverse) t = tokens - 1 - t;
        int row = 0, column = 0;
        if (columns) {
            column = t / s.height;
            row = t - column * s.height;
            t = row * s.width + column;
        }
        if (!columns) {
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const int ahead = min(k, max(count - 1, 0));
                token[k] = reverse ? t - ahead : t + ahead;
            }
            return;
        }
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            token[k] = t;
            if (k + 1 < count) {
                row += reverse ? -1 : 1;
                t += reverse ? -s.width : s.width;
                if (row < 0 || row == s.height) {
                    row = reverse ? s.height - 1 : 0;
                    column += reverse ? -1 : 1;
                    t = row * s.width + column;
                }
            }
        }
    }
};

// Image of one (batch, group), from this thread's first channel on. The op entry checks that the token stride in bytes
// fits 32 bits, so that an address is one wide multiply-add.
template <class T>
struct Plane {
    T* base;
    uint32_t stride;  // bytes
    Plane() = default;
    __device__ Plane(const ImageArg& image, const ThreadCoord& coord, int64_t channel)
        : base(static_cast<T*>(image.ptr) + coord.batch * image.batch + coord.image_group * image.group +
               coord.scan * image.scan + channel),
          stride(static_cast<uint32_t>(image.token * sizeof(T))) {}
    __device__ __forceinline__ T* at(int token) const {
        using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
        return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) +
                                    static_cast<uint64_t>(static_cast<uint32_t>(token)) * stride);
    }
};

// kRows floats for each of the block's channels in shared memory, 0 for channels that do not exist.
template <int kRows>
struct alignas(16) ChannelTable {
    float rows[kRows][kMaxScanDim];

    // `value(channel, row values)`; the caller's __syncthreads makes the table visible.
    template <class F>
    __device__ void fill(int dim, F&& value) {
        for (int c = threadIdx.x; c < kMaxScanDim; c += blockDim.x) {
            float row[kRows] = {};
            if (c < dim) value(c, row);
#pragma unroll
            for (int i = 0; i < kRows; ++i) rows[i][c] = row[i];
        }
    }
    __device__ __forceinline__ void get(int row, int channel, float (&out)[kVec]) const {
        const float4 v = *reinterpret_cast<const float4*>(&rows[row][channel]);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    }
};

// Sums over the lanes that share a token; every lane gets them. Several values at once hide the latency of the
// shuffles.
template <int kCount>
__device__ __forceinline__ void lane_sums(float (&x)[kCount], int lanes) {
    for (int d = lanes >> 1; d > 0; d >>= 1) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) x[k] += __shfl_xor_sync(kFullWarp, x[k], d);
    }
}

// Sum over the chunks of the warp for each lane position; every chunk gets it.
__device__ __forceinline__ float chunk_sum(float x, int lanes) {
    for (int d = lanes; d < 32; d <<= 1) x += __shfl_xor_sync(kFullWarp, x, d);
    return x;
}

// Totals (P, h) of each warp for every channel, double-buffered so that one barrier for each exchange is enough: a
// warp that runs ahead writes the other buffer, and cannot pass the next barrier before all have read this one.
struct ScanExchange {
    float P[2][kMaxScanWarps][kMaxScanDim];
    float h[2][kMaxScanWarps][kMaxScanDim];
};

// Turns each thread's aggregate (P, h) of its chunk into the state that enters the chunk. `carry` is the state that
// enters the tile and becomes the one that leaves it. `kReverse` goes from the last chunk to the first. One
// __syncthreads.
template <bool kReverse>
__device__ __forceinline__ void block_scan(const ThreadCoord& coord, ScanExchange& shared, int& buffer,
                                           float (&P)[kVec], float (&h)[kVec], float (&carry)[kVec],
                                           float (&entering)[kVec]) {
    const int lanes = coord.lanes;
    const int rank = kReverse ? coord.chunks_per_warp - 1 - coord.chunk_in_warp : coord.chunk_in_warp;
    for (int d = 1; d < coord.chunks_per_warp; d <<= 1) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float p =
                kReverse ? __shfl_down_sync(kFullWarp, P[j], d * lanes) : __shfl_up_sync(kFullWarp, P[j], d * lanes);
            const float q =
                kReverse ? __shfl_down_sync(kFullWarp, h[j], d * lanes) : __shfl_up_sync(kFullWarp, h[j], d * lanes);
            if (rank >= d) {
                h[j] = fmaf(P[j], q, h[j]);
                P[j] *= p;
            }
        }
    }
    const auto sP = shared.P[buffer], sh = shared.h[buffer];
    buffer ^= 1;
    if (rank == coord.chunks_per_warp - 1) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            sP[coord.warp()][coord.channel + j] = P[j];
            sh[coord.warp()][coord.channel + j] = h[j];
        }
    }
    float before_P[kVec], before_h[kVec];  // aggregate of the warp's earlier chunks
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        before_P[j] = kReverse ? __shfl_down_sync(kFullWarp, P[j], lanes) : __shfl_up_sync(kFullWarp, P[j], lanes);
        before_h[j] = kReverse ? __shfl_down_sync(kFullWarp, h[j], lanes) : __shfl_up_sync(kFullWarp, h[j], lanes);
        if (rank == 0) before_P[j] = 1.f, before_h[j] = 0.f;
    }
    __syncthreads();
    for (int i = 0; i < coord.num_warps(); ++i) {
        const int w = kReverse ? coord.num_warps() - 1 - i : i;
        if (w == coord.warp()) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) entering[j] = fmaf(before_P[j], carry[j], before_h[j]);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) carry[j] = fmaf(sP[w][coord.channel + j], carry[j], sh[w][coord.channel + j]);
    }
}

// dt_weight / kStepUnit of the block's channels, as [rank][kMaxScanDim] floats in shared memory; above kMaxStagedRank
// it is read from device memory. Channels that do not exist take the weights of the last one, so that their steps are
// finite where its steps are: a weight of 0 would make NaN of a feature of -inf, which masks a token, and that NaN
// would reach the token's sums.
template <class T>
struct StepWeight {
    const float* staged;
    const ScanShape& s;
    ParamArg weight;
    int64_t row;  // of the thread's first channel
    int channel;

    __device__ StepWeight(const ScanShape& shape, const ParamArg& w, const ThreadCoord& coord, float* shared)
        : staged(shared),
          s(shape),
          weight(w),
          row((static_cast<int64_t>(coord.group) * s.param_dim + coord.channel) * s.rank),
          channel(coord.channel) {
        if (s.rank == 0 || s.rank > kMaxStagedRank) return;
        for (int i = threadIdx.x; i < s.rank * kMaxScanDim; i += blockDim.x) {
            const int r = i / kMaxScanDim, c = min(i % kMaxScanDim, s.norm_dim - 1);
            const int64_t at = (static_cast<int64_t>(coord.group) * s.param_dim + c) * s.rank + r;
            shared[i] = load_param<T>(w, at) / Math<T>::kStepUnit;
        }
        // the caller's __syncthreads makes it visible
    }
    __device__ __forceinline__ void get(int r, float (&w)[kVec]) const {
        if (s.rank <= kMaxStagedRank) {
            const float4 v = *reinterpret_cast<const float4*>(staged + r * kMaxScanDim + channel);
            w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
        } else {
            const int more = s.norm_dim - 1 - channel;  // below 0 where the thread has no channel
            int64_t at = row + static_cast<int64_t>(min(0, more)) * s.rank + r;
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                w[j] = load_param<T>(weight, at) / Math<T>::kStepUnit;
                if (j < more) at += s.rank;
            }
        }
    }
};

// step[k][j] of a thread's tokens in units of Math<T>::kStepUnit, as `bias` is. Tokens past the end have a step of 0,
// which leaves the state as it is (a = 1, b = 0). c0, valid: the thread's first channel and how many it has.
template <bool kAligned, class T, int kTokens, class Weight>
__device__ __forceinline__ void load_steps(const ScanShape& s, const Plane<const T>& dt, const Weight& weight,
                                           const float (&bias)[kVec], const Path<kTokens>& path, int c0, int valid,
                                           float (&step)[kTokens][kVec]) {
    if (s.rank == 0) {
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const Vec4<T> v = load4<kAligned>(dt.at(path.token[k]) + c0, valid);
#pragma unroll
            for (int j = 0; j < kVec; ++j) step[k][j] = fmaf(to_float(v.v[j]), 1.f / Math<T>::kStepUnit, bias[j]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < kTokens; ++k)
#pragma unroll
            for (int j = 0; j < kVec; ++j) step[k][j] = bias[j];
        for (int r = 0; r < s.rank; ++r) {
            float w[kVec];
            weight.get(r, w);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float d = to_float(dt.at(path.token[k])[r]);
#pragma unroll
                for (int j = 0; j < kVec; ++j) step[k][j] = fmaf(w[j], d, step[k][j]);
            }
        }
    }
    if (s.softplus) {
#pragma unroll
        for (int k = 0; k < kTokens; ++k)
#pragma unroll
            for (int j = 0; j < kVec; ++j) step[k][j] = Math<T>::softplus(step[k][j]);
    }
    if (path.count < kTokens) {
#pragma unroll
        for (int k = 0; k < kTokens; ++k)
#pragma unroll
            for (int j = 0; j < kVec; ++j)
                if (k >= path.count) step[k][j] = 0.f;
    }
}

// States of one tile: h[k] after the thread's token k, `entering` before its first. `carry` is the state that enters
// the tile and becomes the one that leaves it. b(k) is B in units of the step, u(k) the four channels of the input.
template <class T, int kTokens, class Exchange, class LoadB, class LoadU>
__device__ __forceinline__ void tile_states(const ThreadCoord& coord, Exchange& exchange, int& buffer,
                                            const float (&A)[kVec], const float (&step)[kTokens][kVec], LoadB&& b,
                                            LoadU&& u, float (&carry)[kVec], float (&h)[kTokens][kVec],
                                            float (&entering)[kVec]) {
    float a[kTokens][kVec], P[kVec], local[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) P[j] = 1.f, local[j] = 0.f;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const float bk = b(k);
        const Vec4<T> uv = u(k);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            a[k][j] = Math<T>::decay(step[k][j], A[j]);
            h[k][j] = step[k][j] * (bk * to_float(uv.v[j]));
            local[j] = fmaf(a[k][j], local[j], h[k][j]);
            P[j] *= a[k][j];
        }
    }
    block_scan<false>(coord, exchange, buffer, P, local, carry, entering);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        float state = entering[j];
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            state = fmaf(a[k][j], state, h[k][j]);
            h[k][j] = state;
        }
    }
}

}  // namespace gm
