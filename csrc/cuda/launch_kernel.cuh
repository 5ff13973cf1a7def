// SPDX-License-Identifier: Apache-2.0
// One way to launch: raises the shared-memory limit where needed.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace gm {

constexpr size_t kDefaultSharedLimit = 48 * 1024;

template <class... Args>
cudaError_t launch_kernel(void (*kernel)(Args...), int64_t blocks, int threads, size_t dynamic_shared,
                          cudaStream_t stream, const Args&... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaFuncAttributes attributes;
    if (dynamic_shared > 0) {
        cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
        if (error != cudaSuccess) return error;
        if (attributes.sharedSizeBytes + dynamic_shared > kDefaultSharedLimit) {
            error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
            if (error != cudaSuccess) return error;
        }
    }
    kernel<<<static_cast<unsigned>(blocks), threads, dynamic_shared, stream>>>(args...);
    return cudaGetLastError();
}

}  // namespace gm
