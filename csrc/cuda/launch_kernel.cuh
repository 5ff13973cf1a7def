// SPDX-License-Identifier: Apache-2.0
// Ways to launch: both raise the shared-memory limit where needed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace gm {

constexpr size_t kDefaultSharedLimit = 48 * 1024;

// Lets `kernel` have `dynamic_shared` bytes on the current device. Asked of the driver once for each kernel and device,
// by each thread: the driver takes longer to answer than to launch.
inline cudaError_t raise_shared_limit(const void* kernel, size_t dynamic_shared) {
    struct Raised {
        const void* kernel;
        int device;
        size_t limit;
    };
    thread_local std::vector<Raised> known;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    auto entry = std::find_if(known.begin(), known.end(),
                              [&](const Raised& r) { return r.kernel == kernel && r.device == device; });
    if (entry == known.end()) {
        cudaFuncAttributes attributes;
        error = cudaFuncGetAttributes(&attributes, kernel);
        if (error != cudaSuccess) return error;
        known.push_back({kernel, device, kDefaultSharedLimit - attributes.sharedSizeBytes});
        entry = known.end() - 1;
    }
    if (dynamic_shared <= entry->limit) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
    if (error == cudaSuccess) entry->limit = dynamic_shared;
    return error;
}

template <class... Args>
cudaError_t launch_kernel(void (*kernel)(Args...), int64_t blocks, int threads, size_t dynamic_shared,
                          cudaStream_t stream, const Args&... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (dynamic_shared > 0) {
        const cudaError_t error = raise_shared_limit(reinterpret_cast<const void*>(kernel), dynamic_shared);
        if (error != cudaSuccess) return error;
    }
    kernel<<<static_cast<unsigned>(blocks), threads, dynamic_shared, stream>>>(args...);
    return cudaGetLastError();
}

// For blocks that wait for one another: an error where the device can't run all of them at once.
template <class... Args>
cudaError_t launch_at_once(void (*kernel)(Args...), int64_t blocks, int threads, size_t dynamic_shared,
                           cudaStream_t stream, const Args&... args) {
    const cudaError_t error = raise_shared_limit(reinterpret_cast<const void*>(kernel), dynamic_shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = dynamic_shared, config.stream = stream;
    config.attrs = &cooperative, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace gm
