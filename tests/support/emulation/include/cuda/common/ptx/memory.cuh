// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/memory.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

namespace gm {

template <class T>
void store_relaxed(T* to, T v) {
    __atomic_store_n(to, v, __ATOMIC_RELAXED);
}
template <class T>
T load_relaxed(const T* from) {
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}

inline void store_words(void* to, const uint32_t (&w)[4]) { std::memcpy(to, w, sizeof(w)); }

inline void touch(const void* p) { (void)*static_cast<const volatile unsigned char*>(p); }

inline int64_t multiply_wide(int a, int b) { return static_cast<int64_t>(a) * b; }

}  // namespace gm
