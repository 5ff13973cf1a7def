// SPDX-License-Identifier: Apache-2.0
// What the depthwise convolution's kernels share: a thread's channels, their loads and stores, weights in shared
// memory.
#pragma once

#include "cuda/conv_plan.h"
#include "cuda/packed.cuh"

namespace gm {

// A thread's kCount channels out of the lanes * kCount that its block holds from `block_first` on. Aligned images:
// adjacent ones, moved in one access. Otherwise `lanes` apart, so that neighbouring threads still access neighbouring
// elements.
template <bool kAligned, int kCount>
struct Channels {
    int local;  // first channel, counted from the block's
    int step;
    int valid;  // how many of them exist; all or none where aligned

    __device__ Channels(int lane, int lanes, int block_first, int dim)
        : local(kAligned ? lane * kCount : lane), step(kAligned ? 1 : lanes) {
        const int left = dim - block_first - local;
        valid = left <= 0 ? 0 : min((left + step - 1) / step, kCount);
    }
    __device__ __forceinline__ int at(int j) const { return local + j * step; }

    // `p` points at the first channel. Zero where `in` is false; where aligned, `in` must be false if none is valid.
    template <class T>
    __device__ __forceinline__ Packed<T, kCount> load(const T* p, bool in) const {
        if constexpr (kAligned) {
            return load_packed<kCount>(p, in);
        } else {
            T elements[kCount];
#pragma unroll
            for (int j = 0; j < kCount; ++j) elements[j] = in && j < valid ? p[j * step] : from_float<T>(0.f);
            Packed<T, kCount> out;
            memcpy(&out, elements, sizeof(out));
            return out;
        }
    }
    template <class T>
    __device__ __forceinline__ void store(T* p, const float* x, bool in) const {
        if constexpr (kAligned) {
            store_packed<kCount>(p, x, in);
        } else {
#pragma unroll
            for (int j = 0; j < kCount; ++j)
                if (in && j < valid) p[j * step] = from_float<T>(x[j]);
        }
    }
};

// Weights and bias of the block's channels as rows of kWidth floats, one a tap and the bias last, 0 where there is
// none.
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
    __device__ __forceinline__ void get(int row, const Channels<kAligned, kConvVec>& channels, float (&out)[kConvVec]) const {
#pragma unroll
        for (int j = 0; j < kConvVec; ++j) out[j] = rows[row][channels.at(j)];
    }
};

}  // namespace gm
