// SPDX-License-Identifier: Apache-2.0
// A tile of a path in shared memory, and the recurrence through it, for scans of several states.
//
// With N states a plane has N D recurrences, enough to occupy a block without cutting the path: a thread holds four
// or eight states of one channel and walks all tokens in order, so nothing is composed and a decay is computed once.
// Between the walks the block holds tokens as the portable kernels do (tile.cuh), `lanes` threads to a token and 4
// channels each, for what is per token: steps, norm, gates.
#pragma once

#include "cuda/common/ptx/memory.cuh"
#include "cuda/scan/many_states/plan.h"
#include "cuda/scan/tile.cuh"

namespace gm {

// What a thread holds while it walks: kStates states of a channel, from first_state on.
template <int kStates>
struct StateCoord {
    int lanes;  // threads of a channel
    int lane, channel, first_state;
    bool exists;  // the channel
    __device__ StateCoord(int lanes, int dim)
        : lanes(lanes),
          lane(threadIdx.x & (lanes - 1)),
          channel(threadIdx.x / lanes),
          first_state(kStates * lane),
          exists(channel < dim) {}
};

template <int kStates>
__device__ __forceinline__ void put_states(float* to, const float (&h)[kStates]) {
    if constexpr (kStates == 2) {
        *reinterpret_cast<float2*>(to) = make_float2(h[0], h[1]);
    } else {
#pragma unroll
        for (int i = 0; i < kStates; i += 4)
            *reinterpret_cast<float4*>(to + i) = make_float4(h[i], h[i + 1], h[i + 2], h[i + 3]);
    }
}
template <int kStates>
__device__ __forceinline__ void get_states(const float* from, float (&h)[kStates]) {
    if constexpr (kStates == 2) {
        const float2 v = *reinterpret_cast<const float2*>(from);
        h[0] = v.x, h[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kStates; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(from + i);
            h[i] = v.x, h[i + 1] = v.y, h[i + 2] = v.z, h[i + 3] = v.w;
        }
    }
}

struct StateTile {
    const ManyStatesLayout& at;
    float* shared;

    __device__ __forceinline__ float2& step(int t, int channel) const {
        return reinterpret_cast<float2*>(shared + at.steps)[t * at.width + channel];
    }
    __device__ __forceinline__ float& y(int t, int channel) const { return shared[at.y + t * at.width + channel]; }
    // Of the backward: the sum over the states of g B, and the gradient of the step.
    __device__ __forceinline__ float2 gradient(int t, int channel) const {
        return reinterpret_cast<const float2*>(shared + at.gradients)[t * at.width + channel];
    }
    // kStates values of a token's B or C, from `begin` on.
    template <int kStates>
    __device__ __forceinline__ void feature(int begin, int t, int first_state, float (&out)[kStates]) const {
        get_states(shared + begin + t * at.row + first_state, out);
    }
};

// Steps, u and y of channels that a token has room for and no thread fills are read, and are 0.
__device__ __forceinline__ void clear_tile(const StateTile& tile) {
    for (int i = threadIdx.x; i < tile.at.tile * tile.at.width; i += blockDim.x)
        tile.shared[tile.at.steps + 2 * i] = tile.shared[tile.at.steps + 2 * i + 1] = tile.shared[tile.at.y + i] = 0.f;
}

template <class T>
__device__ __forceinline__ Vec4<T> load_features(const T* p, int valid, bool vectors) {
    return vectors && valid >= kVec ? load4<true>(p, valid) : load4<false>(p, valid);
}

// B, in units of the step, and C of the tile's tokens; 0 behind the last state and the last of `count` tokens.
template <class T>
__device__ __forceinline__ void fill_features(const ScanShape& s, const StateTile& tile, const int* numbers,
                                              const Plane<const T>& B, const Plane<const T>& C, int count) {
    constexpr int kAtOnce = 4;  // whose loads are under way together
    const int quads = tile.at.row / kVec, shift = 31 - __clz(quads), end = tile.at.tile << shift;
    for (int first = threadIdx.x; first < end; first += kAtOnce * blockDim.x) {
        Vec4<T> b[kAtOnce], c[kAtOnce];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
            const int i = first + r * blockDim.x, t = i >> shift, n = (i & (quads - 1)) * kVec;
            const int valid = i < end && t < count ? s.states - n : 0, token = numbers[min(t, tile.at.tile - 1)];
            b[r] = load_features(B.at(token) + n, valid, tile.at.feature_vectors);
            c[r] = load_features(C.at(token) + n, valid, tile.at.feature_vectors);
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
            const int i = first + r * blockDim.x;
            if (i >= end) continue;
            float b4[kVec], c4[kVec];
            to_floats(b[r], b4), to_floats(c[r], c4);
            constexpr float kUnit = Math<T>::kStepUnit;
            reinterpret_cast<float4*>(tile.shared + tile.at.B)[i] =
                make_float4(kUnit * b4[0], kUnit * b4[1], kUnit * b4[2], kUnit * b4[3]);
            reinterpret_cast<float4*>(tile.shared + tile.at.C)[i] = make_float4(c4[0], c4[1], c4[2], c4[3]);
        }
    }
}

// Puts steps, u, B (in units of the step) and C of the tokens from `first` on into the tile, with a barrier before and
// one behind. Tokens past the end get a step of 0, which leaves the states as they are.
template <int kStaged, bool kAligned, class T>
__device__ __forceinline__ void fill_tile(const ScanShape& s, const ThreadCoord& coord, const StateTile& tile,
                                          const StepWeight<T>& weight, const float (&bias)[kVec],
                                          const Plane<const T>& u, const Plane<const T>& dt, const Plane<const T>& B,
                                          const Plane<const T>& C, int first) {
    const int c0 = coord.channel, valid = coord.valid, count = s.height * s.width - first;
    int* const numbers = reinterpret_cast<int*>(tile.shared + tile.at.tokens);
    for (int t = threadIdx.x; t < tile.at.tile; t += blockDim.x)
        numbers[t] = Path<1>(s, coord.direction, first + t).token[0];
    __syncthreads();
    for (int g = coord.chunk; g < tile.at.tile / kStaged; g += coord.num_chunks()) {
        const int t0 = g * kStaged;
        const Path<kStaged> path(s, coord.direction, first + t0);
        float step[kStaged][kVec];
        load_steps<kAligned>(s, dt, weight, bias, path, c0, valid, step);
#pragma unroll
        for (int k = 0; k < kStaged; ++k) {
            const Vec4<T> uv = load4<kAligned>(u.at(path.token[k]) + c0, valid);
            if (c0 < tile.at.width) {
                float4* to = reinterpret_cast<float4*>(&tile.step(t0 + k, c0));
                to[0] = make_float4(step[k][0], to_float(uv.v[0]), step[k][1], to_float(uv.v[1]));
                to[1] = make_float4(step[k][2], to_float(uv.v[2]), step[k][3], to_float(uv.v[3]));
            }
        }
    }
    fill_features<T>(s, tile, numbers, B, C, count);
    __syncthreads();
}

// Sums of values over the threads of a channel or over others. Each thread ends with some of the sums: `count` from
// value `first` on.
struct LaneSums {
    int first, count;
};
// Threads that differ in `bit` add up twice kHalf values: that without the bit the first half, the other one the
// second.
template <int kHalf, int kCount>
__device__ __forceinline__ void halve(float (&v)[kCount], LaneSums& kept, int lane, int bit) {
    const bool upper = lane & bit;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
        const float other = __shfl_xor_sync(kFullWarp, upper ? v[k] : v[k + kHalf], bit);
        v[k] = (upper ? v[k + kHalf] : v[k]) + other;
    }
    kept.count = kHalf;
    if (upper) kept.first += kHalf;
}
template <int kCount, int kStates>
__device__ __forceinline__ LaneSums state_sums(float (&v)[kCount], const StateCoord<kStates>& at) {
    static_assert(kCount == 4 || kCount == 8);
    LaneSums kept{0, kCount};
    halve<kCount / 2>(v, kept, at.lane, 1);
    if (at.lanes >= 4) halve<kCount / 4>(v, kept, at.lane, 2);
    if constexpr (kCount == 8) {
        if (at.lanes >= 8) halve<1>(v, kept, at.lane, 4);
    }
    for (int d = kCount; d < at.lanes; d <<= 1) v[0] += __shfl_xor_sync(kFullWarp, v[0], d);
    if (at.lane >= kCount) kept.count = 0;  // others have the same sum
    return kept;
}

// Walks the kTokens tokens from t0 on with states h, and leaves y = C . h, without the skip.
template <class T, int kTokens, int kStates>
__device__ __forceinline__ void walk(const StateTile& tile, const StateCoord<kStates>& at, int t0,
                                     const float (&A)[kStates], float (&h)[kStates]) {
    constexpr int kSums = kTokens > 4 ? 8 : 4;
    float y[kSums] = {};
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const float2 step_u = tile.step(t0 + k, at.channel);
        const float x = step_u.x * step_u.y;
        float b[kStates], c[kStates];
        tile.feature(tile.at.B, t0 + k, at.first_state, b);
#pragma unroll
        for (int i = 0; i < kStates; ++i) h[i] = fmaf(Math<T>::decay(step_u.x, A[i]), h[i], x * b[i]);
        tile.feature(tile.at.C, t0 + k, at.first_state, c);
#pragma unroll
        for (int i = 0; i < kStates; ++i) y[k] = fmaf(c[i], h[i], y[k]);
    }
    const LaneSums kept = state_sums(y, at);
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i)
        if (i < kept.count && kept.first + i < kTokens && at.exists) tile.y(t0 + kept.first + i, at.channel) = y[i];
}

// The parameters A of a thread; 0 for states and channels that do not exist.
template <class T, int kStates>
__device__ __forceinline__ void load_A(const ScanShape& s, const ParamArg& p, int group, const StateCoord<kStates>& at,
                                       float (&A)[kStates]) {
    const int64_t row = (static_cast<int64_t>(group) * s.param_dim + at.channel) * s.states + at.first_state;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
        A[i] = at.exists && at.first_state + i < s.states ? load_param<T>(p, row + i) : 0.f;
}

// Calls f(t0, whether they are there) for the kStaged tokens of the tile from t0 on that are the thread's, once or
// more. The threads of a warp call it together.
template <int kStaged, class F>
__device__ __forceinline__ void for_staged_tokens(const ThreadCoord& coord, const StateTile& tile, F&& f) {
    const int groups = tile.at.tile / kStaged, first_of_warp = coord.chunk - coord.chunk_in_warp;
    for (int g = 0; g + first_of_warp < groups; g += coord.num_chunks()) {
        const bool there = g + coord.chunk < groups;
        f((there ? g + coord.chunk : groups - 1) * kStaged, there);
    }
}

// Touches the tile's images and features that the block will load next, while it walks another tile.
template <int kStaged, class T, class... Images>
__device__ __forceinline__ void touch_tile(const ScanShape& s, const ThreadCoord& coord, const StateTile& tile,
                                           int first, const Plane<const T>& dt, const Plane<const T>& B,
                                           const Plane<const T>& C, const Images&... images) {
    if (first < 0 || first >= s.height * s.width) return;
    for_staged_tokens<kStaged>(coord, tile, [&](int t0, bool there) {
        const Path<kStaged> path(s, coord.direction, first + t0);
        if (!there || coord.valid == 0) return;
#pragma unroll
        for (int k = 0; k < kStaged; ++k) {
            (touch(images.at(path.token[k]) + coord.channel), ...);
            if (s.rank == 0) touch(dt.at(path.token[k]) + coord.channel);
            if (coord.channel > 0) continue;
            if (s.rank > 0) touch(dt.at(path.token[k]));
            touch(B.at(path.token[k])), touch(C.at(path.token[k]));
        }
    });
}

// Whether four successive states of a token can be loaded at once.
template <class T>
bool has_feature_vectors(const ImageArg& image) {
    return reinterpret_cast<uintptr_t>(image.ptr) % (kVec * sizeof(T)) == 0 && image.batch % kVec == 0 &&
           image.token % kVec == 0 && image.group % kVec == 0 && image.scan % kVec == 0;
}

// y of the tokens from t0 on, from c0 on; 0 where they are not `there` and for channels that a token has no room for.
// With kSkip, skip times u is added to it.
template <bool kSkip, int kStaged>
__device__ __forceinline__ void load_outputs(const StateTile& tile, int t0, bool there, int c0,
                                             const float (&skip)[kVec], float (&y)[kStaged][kVec]) {
#pragma unroll
    for (int k = 0; k < kStaged; ++k) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) y[k][j] = 0.f;
        if (!there || c0 >= tile.at.width) continue;
        const float4 v = *reinterpret_cast<const float4*>(&tile.y(t0 + k, c0));
        y[k][0] = v.x, y[k][1] = v.y, y[k][2] = v.z, y[k][3] = v.w;
        if (!kSkip) continue;
        const float4* const su = reinterpret_cast<const float4*>(&tile.step(t0 + k, c0));
        const float4 first = su[0], second = su[1];
        y[k][0] = fmaf(skip[0], first.y, v.x), y[k][1] = fmaf(skip[1], first.w, v.y);
        y[k][2] = fmaf(skip[2], second.y, v.z), y[k][3] = fmaf(skip[3], second.w, v.w);
    }
}

}  // namespace gm
