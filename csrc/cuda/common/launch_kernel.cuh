// SPDX-License-Identifier: Apache-2.0
// Launching kernels, and how a kernel begins.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/common/device.h"
#include "cuda/common/ptx/dependent_launch.cuh"

namespace gm {

constexpr size_t kDefaultSharedLimit = 48 * 1024;

// The first statement of every kernel that launch_kernel launches. A kernel with much to set up calls the two functions
// itself, and in between does what needs no device memory.
__device__ __forceinline__ void begin_kernel() {
    pdl_launch_dependents();
    pdl_wait();
}

// What has to be known to launch `kernel` on the current device.
struct KernelFacts {
    const void* kernel;
    int device;
    size_t static_shared;  // bytes
    size_t shared_limit;   // of dynamic shared memory that it may have
    bool uses_pdl;         // its code calls begin_kernel, and driver and device support PDL
};

// The driver is asked once for each kernel, device and host thread: answering takes longer than launching.
inline cudaError_t kernel_facts(const void* kernel, KernelFacts*& facts) {
    thread_local std::vector<KernelFacts> known;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    for (KernelFacts& entry : known)
        if (entry.kernel == kernel && entry.device == device) {
            facts = &entry;
            return cudaSuccess;
        }
    cudaFuncAttributes attributes;
    int major = 0, driver = 0;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess) return error;
    // Code for an older architecture, run here through PTX, does not wait; older drivers can't capture such launches.
    const bool uses_pdl = major >= 9 && attributes.ptxVersion >= 90 && driver >= 12040;
    known.push_back(
        {kernel, device, attributes.sharedSizeBytes, kDefaultSharedLimit - attributes.sharedSizeBytes, uses_pdl});
    facts = &known.back();
    return cudaSuccess;
}

// Raises the limit to all that the device has, not just to `dynamic_shared` bytes: the limit belongs to the process,
// and a thread that set it to what it needs itself would lower what another thread has set.
inline cudaError_t raise_shared_limit(KernelFacts& facts, size_t dynamic_shared) {
    if (dynamic_shared <= facts.shared_limit) return cudaSuccess;
    int room = 0;
    cudaError_t error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, facts.device);
    if (error != cudaSuccess) return error;
    const int all = room - static_cast<int>(facts.static_shared);
    error = cudaFuncSetAttribute(facts.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, all);
    if (error == cudaSuccess) facts.shared_limit = static_cast<size_t>(all);
    return dynamic_shared <= facts.shared_limit ? error : cudaErrorInvalidValue;
}
inline cudaError_t raise_shared_limit(const void* kernel, size_t dynamic_shared) {
    KernelFacts* facts = nullptr;
    const cudaError_t error = kernel_facts(kernel, facts);
    return error == cudaSuccess ? raise_shared_limit(*facts, dynamic_shared) : error;
}

// `kernel` must begin with begin_kernel, or call both of its parts.
template <class... Args>
cudaError_t launch_kernel(void (*kernel)(Args...), int64_t blocks, dim3 threads, size_t dynamic_shared,
                          cudaStream_t stream, const Args&... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    KernelFacts* facts = nullptr;
    cudaError_t error = kernel_facts(reinterpret_cast<const void*>(kernel), facts);
    if (error == cudaSuccess) error = raise_shared_limit(*facts, dynamic_shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = threads;
    config.dynamicSmemBytes = dynamic_shared, config.stream = stream;
    config.attrs = &early, config.numAttrs = facts->uses_pdl ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// For blocks that wait for one another (a cooperative launch): an error where the device can't run all of them at
// once.
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
