// SPDX-License-Identifier: Apache-2.0
// Words that one block writes and others wait for: each is one access, so that a word that is there is there as a
// whole, and needs neither flag nor fence. All ones, a NaN that no arithmetic makes, stand for those that are not.
#pragma once

#include <cstdint>

namespace gm {

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

}  // namespace gm
