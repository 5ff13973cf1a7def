// SPDX-License-Identifier: Apache-2.0
// Shared by the second stages of parameter sums: blocks of kReduceColumns adjacent columns by blockDim.y rows; sums
// are added in the order of the rows.
#pragma once

#include "cuda/common/math.cuh"

namespace gm {

constexpr int kReduceColumns = 32;  // one 128-byte line of partial sums

template <class T>
__device__ __forceinline__ void store_param(const ParamOut& out, int64_t i, float v) {
    if (out.ptr == nullptr) return;
    if (out.is_float) {
        static_cast<float*>(out.ptr)[i] = v;
    } else {
        static_cast<T*>(out.ptr)[i] = from_float<T>(v);
    }
}

// Calls take(load(i)) for i = first, first + step, ... below `end`, with eight loads in flight. An unrolled loop would
// wait for each of the last loads separately.
template <class Load, class Take>
__device__ __forceinline__ void load_ahead(int first, int end, int step, const Load& load, const Take& take) {
    constexpr int kAhead = 8;
    for (int i = first; i < end; i += kAhead * step) {
        decltype(load(i)) v[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
            if (i + k * step < end) v[k] = load(i + k * step);
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
            if (i + k * step < end) take(v[k], i + k * step);
    }
}

// Sum over the row threads of the block; each of them gets it.
__device__ __forceinline__ float row_sum(float v, float (*shared)[kReduceColumns]) {
    __syncthreads();
    shared[threadIdx.y][threadIdx.x] = v;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < blockDim.y; ++i) sum += shared[i][threadIdx.x];
    return sum;
}

}  // namespace gm
