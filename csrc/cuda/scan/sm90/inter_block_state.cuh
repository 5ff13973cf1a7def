// SPDX-License-Identifier: Apache-2.0
// Values in device memory that one block publishes and others poll. A value is written and read in one access, so it
// is there either as a whole or not at all, and needs neither a flag nor a fence. A word of all ones, a NaN that no
// arithmetic makes, means that the value is not ready.
#pragma once

#include <cstdint>

#include "cuda/common/ptx/memory.cuh"

namespace gm {

constexpr uint32_t kNotReady = 0xffffffffu;

__device__ __forceinline__ uint32_t ready_bits(float v) {
    const uint32_t bits = __float_as_uint(v);
    return bits == kNotReady ? 0x7fffffffu : bits;
}
__device__ __forceinline__ void publish_state(float* to, float v) {
    store_relaxed(reinterpret_cast<uint32_t*>(to), ready_bits(v));
}
__device__ __forceinline__ uint32_t poll_state(const float* from) {
    return load_relaxed(reinterpret_cast<const uint32_t*>(from));
}
__device__ __forceinline__ void publish_aggregate(float2* to, float x, float y) {
    const uint64_t bits = uint64_t{__float_as_uint(y)} << 32 | ready_bits(x);
    store_relaxed(reinterpret_cast<uint64_t*>(to), bits);
}
__device__ __forceinline__ uint64_t poll_aggregate(const float2* from) {
    return load_relaxed(reinterpret_cast<const uint64_t*>(from));
}

}  // namespace gm
