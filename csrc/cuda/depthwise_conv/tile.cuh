// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels of the depthwise convolution: a thread's channels, their loads and stores, and the weights in
// shared memory.
#pragma once

#include "cuda/common/packed.cuh"
#include "cuda/depthwise_conv/plan.h"

namespace gm {

// A thread's channels among the lanes * kConvVec that its block holds from `block_first` on. In aligned images they
// are adjacent and moved in one access. Elsewhere they are `lanes` apart, so that neighbouring threads still access
// neighbouring elements.
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

    // `p` points at the first channel. Zero where `in` is false; where aligned, `in` must be false if none is valid.
    template <class T>
    __device__ __forceinline__ Packed<T, kConvVec> load(const T* p, bool in) const {
        if constexpr (kAligned) {
            return load_packed<kConvVec>(p, in);
        } else {
            T elements[kConvVec];
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) elements[j] = in && j < valid ? p[j * step] : from_float<T>(0.f);
            Packed<T, kConvVec> out;
            memcpy(&out, elements, sizeof(out));
            return out;
        }
    }
    template <class T>
    __device__ __forceinline__ void store(T* p, const float* x, bool in) const {
        if constexpr (kAligned) {
            store_packed<kConvVec>(p, x, in);
        } else {
#pragma unroll
            for (int j = 0; j < kConvVec; ++j)
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
    __device__ __forceinline__ void get(int row, const Channels<kAligned>& channels, float (&out)[kConvVec]) const {
#pragma unroll
        for (int j = 0; j < kConvVec; ++j) out[j] = rows[row][channels.at(j)];
    }
    // Read where it is used: once before a loop, it would take registers that the loop needs.
    template <bool kAligned>
    __device__ __forceinline__ void reread(int row, const Channels<kAligned>& channels, float (&out)[kConvVec]) const {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&rows[row][channels.at(0)]));
        if constexpr (kAligned) {
            static_assert(kConvVec == 2);
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(out[0]), "=f"(out[1]) : "r"(address));
        } else {
#pragma unroll
            for (int j = 0; j < kConvVec; ++j)
                asm volatile("ld.shared.f32 %0, [%1];" : "=f"(out[j]) : "r"(address + 4 * j * channels.step));
        }
    }
};

}  // namespace gm
