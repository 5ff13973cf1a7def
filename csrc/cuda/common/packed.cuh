// SPDX-License-Identifier: Apache-2.0
// Adjacent channels as they lie in memory: moved in one access, kept as 32-bit words (the compiler would keep each
// 16-bit element in a register of its own), and widened to float where they are used.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/common/math.cuh"
#include "cuda/common/ptx/memory.cuh"

namespace gm {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
    static constexpr int kWords = sizeof(T) * kCount / 4;
    uint32_t words[kWords];

    __device__ __forceinline__ void widen(float (&out)[kCount]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (std::is_same_v<T, float>) {
                out[i] = __uint_as_float(words[i]);
            } else if constexpr (std::is_same_v<T, __half>) {
                const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
                out[2 * i] = v.x;
                out[2 * i + 1] = v.y;
            } else {
                out[2 * i] = __uint_as_float(words[i] << 16);
                out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
            }
        }
    }
};

// The type of one access of 4, 8 or 16 bytes.
template <size_t kBytes>
using WordsOf = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;

// Zero where `in` is false; else `p` must be aligned to the whole.
template <int kCount, class T>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* p, bool in) {
    using Access = WordsOf<sizeof(T) * kCount>;
    Access words = {};
    if (in) words = *reinterpret_cast<const Access*>(p);
    Packed<T, kCount> out;
    memcpy(&out, &words, sizeof(out));
    return out;
}

template <int kCount, class T>
__device__ __forceinline__ Packed<T, kCount> pack(const float* x) {
    T elements[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) elements[j] = from_float<T>(x[j]);
    Packed<T, kCount> out;
    memcpy(&out, elements, sizeof(out));
    return out;
}

// To device memory.
template <int kCount, class T>
__device__ __forceinline__ void store_packed(T* p, const float* x, bool in) {
    const auto packed = pack<kCount, T>(x);
    if (!in) return;
    if constexpr (sizeof(packed) == 16) {
        store_words(p, packed.words);
    } else {
        WordsOf<sizeof(packed)> words;
        memcpy(&words, &packed, sizeof(words));
        *reinterpret_cast<decltype(words)*>(p) = words;
    }
}

}  // namespace gm
