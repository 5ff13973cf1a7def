// SPDX-License-Identifier: Apache-2.0
// What the depthwise convolution's kernels share: a thread's channels, their loads and stores, weights in shared memory.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/conv_plan.h"
#include "cuda/math.cuh"

namespace gm {

// Four channels as they came from memory: as whole words, since the compiler would keep 16-bit elements one a register.
template <class T>
struct Packed {
    uint32_t words[sizeof(T) * kConvVec / 4];
};

__device__ __forceinline__ void widen(const Packed<float>& in, float (&out)[kConvVec]) {
#pragma unroll
    for (int j = 0; j < kConvVec; ++j) out[j] = __uint_as_float(in.words[j]);
}
__device__ __forceinline__ void widen(const Packed<__nv_bfloat16>& in, float (&out)[kConvVec]) {
#pragma unroll
    for (int i = 0; i < kConvVec / 2; ++i) {
        out[2 * i] = __uint_as_float(in.words[i] << 16);
        out[2 * i + 1] = __uint_as_float(in.words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void widen(const Packed<__half>& in, float (&out)[kConvVec]) {
#pragma unroll
    for (int i = 0; i < kConvVec / 2; ++i) {
        const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&in.words[i]));
        out[2 * i] = v.x;
        out[2 * i + 1] = v.y;
    }
}

// A thread's channels out of the lanes * kConvVec that its block holds from `block_first` on. Aligned images: adjacent
// ones, moved in one access. Otherwise `lanes` apart, so that neighbouring threads still access neighbouring elements.
template <bool kAligned>
struct Channels {
    int local;  // first channel, counted from the block's
    int step;
    int valid;  // how many of the kConvVec exist; all or none where aligned

    __device__ Channels(int lane, int lanes, int block_first, int dim)
        : local(kAligned ? lane * kConvVec : lane), step(kAligned ? 1 : lanes) {
        const int left = dim - block_first - local;
        valid = left <= 0 ? 0 : min((left + step - 1) / step, kConvVec);
    }
    __device__ __forceinline__ int at(int j) const { return local + j * step; }

    // `p` points at the first channel. Zero where `in` is false.
    template <class T>
    __device__ __forceinline__ Packed<T> load(const T* p, bool in) const {
        Packed<T> out = {};
        if constexpr (kAligned) {
            using Words = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
            Words words = {};
            if (in && valid > 0) words = *reinterpret_cast<const Words*>(p);
            memcpy(&out, &words, sizeof(out));
        } else {
            T elements[kConvVec];
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) elements[j] = in && j < valid ? p[j * step] : from_float<T>(0.f);
            memcpy(&out, elements, sizeof(out));
        }
        return out;
    }
    template <class T>
    __device__ __forceinline__ void store(T* p, const float* x, bool in) const {
        if constexpr (kAligned) {
            Vec4<T> out;
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) out.v[j] = from_float<T>(x[j]);
            if (in && valid > 0) *reinterpret_cast<Vec4<T>*>(p) = out;
        } else {
#pragma unroll
            for (int j = 0; j < kConvVec; ++j)
                if (in && j < valid) p[j * step] = from_float<T>(x[j]);
        }
    }
};

// Weights and bias of the block's channels as rows of kWidth floats, one a tap and the bias last, 0 where there is none.
template <int kWidth>
struct alignas(16) ConvTable {
    float rows[kConvTaps + 1][kWidth];

    // Channels [first, first + count) of the (G, D) parameters. The caller's __syncthreads makes the table visible.
    template <class T>
    __device__ void fill(const ParamArg& weight, const ParamArg& bias, int64_t first, int count, int width) {
        for (int i = threadIdx.x; i < width * kConvTaps; i += blockDim.x) {
            const int c = i / kConvTaps, tap = i - c * kConvTaps;
            rows[tap][c] = c < count ? load_param<T>(weight, first * kConvTaps + i) : 0.f;
        }
        for (int c = threadIdx.x; c < width; c += blockDim.x)
            rows[kConvTaps][c] = c < count ? load_param_or<T>(bias, first + c, 0.f) : 0.f;
    }
    template <bool kAligned>
    __device__ __forceinline__ void get(int row, const Channels<kAligned>& channels, float (&out)[kConvVec]) const {
        if constexpr (kAligned) {
            const float4 v = *reinterpret_cast<const float4*>(&rows[row][channels.local]);
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) out[j] = rows[row][channels.at(j)];
        }
    }
};

}  // namespace gm
