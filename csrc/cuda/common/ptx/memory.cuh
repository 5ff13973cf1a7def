// SPDX-License-Identifier: Apache-2.0
// Accesses to device memory.
#pragma once

#include <cstdint>

namespace gm {

// Those that other blocks see, each in one piece and in no order with others.
__device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint64_t* to, uint64_t v) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* from) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* from) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}

// Four words in one access, which the compiler makes four of now and then.
__device__ __forceinline__ void store_words(void* to, const uint32_t (&w)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
}

// Brings what is at p into the L1 cache.
__device__ __forceinline__ void touch(const void* p) {
    asm volatile("{ .reg .u16 value; ld.global.ca.u8 value, [%0]; }" ::"l"(p));
}

// a * b in 64 bits, by one instruction, with which an addition to an address becomes one. The compiler may extend a
// factor where it first knows it, and then takes five.
__device__ __forceinline__ int64_t multiply_wide(int a, int b) {
    int64_t product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
}

}  // namespace gm
