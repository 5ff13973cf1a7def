// SPDX-License-Identifier: Apache-2.0
// Values in device memory that one block publishes and others poll. A value is written and read in one access, so it
// is there either as a whole or not at all, and needs neither a flag nor a fence. A word of all ones, a NaN that no
// arithmetic makes, means that the value is not ready.
#pragma once

#include <cstdint>

namespace gm {

constexpr uint32_t kNotReady = 0xffffffffu;

__device__ __forceinline__ uint32_t ready_bits(float v) {
    const uint32_t bits = __float_as_uint(v);
    return bits == kNotReady ? 0x7fffffffu : bits;
}
__device__ __forceinline__ void publish_state(float* to, float v) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(ready_bits(v)) : "memory");
}
__device__ __forceinline__ uint32_t poll_state(const float* from) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    return bits;
}
__device__ __forceinline__ void publish_aggregate(float2* to, float x, float y) {
    const uint64_t bits = uint64_t{__float_as_uint(y)} << 32 | ready_bits(x);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}
__device__ __forceinline__ uint64_t poll_aggregate(const float2* from) {
    uint64_t bits;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
    return bits;
}

}  // namespace gm
