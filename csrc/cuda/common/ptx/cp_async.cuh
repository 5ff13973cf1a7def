// SPDX-License-Identifier: Apache-2.0
// Copies from device to shared memory that bypass the registers (sm_80 and newer; on older GPUs ordinary copies).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gm {

// 16 bytes, both addresses aligned to 16; zeros where `in` is false.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool in) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(global), "r"(in ? 16 : 0)
        : "memory");
#else
    *static_cast<uint4*>(shared) = in ? *static_cast<const uint4*>(global) : uint4{};
#endif
}

// 4 bytes, both addresses aligned to 4.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
#else
    *static_cast<uint32_t*>(shared) = *static_cast<const uint32_t*>(global);
#endif
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void cp_async_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all of this thread's groups but the last kPending have arrived. A barrier makes them visible to other
// threads.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace gm
