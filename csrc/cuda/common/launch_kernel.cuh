// SPDX-License-Identifier: Apache-2.0
// Ways to launch, and what a kernel does first.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/common/device.h"

namespace gm {

constexpr size_t kDefaultSharedLimit = 48 * 1024;

// The first statement of every kernel that launch_kernel launches. From 9.0 on such a kernel's blocks come while the
// last ones of the kernel before still run, which saves the time between two kernels, about a microsecond; here they
// let those of the next kernel come in the same way, and wait until all memory that earlier kernels write is written.
// A kernel with much to set up does so in between: what needs no device memory.
__device__ __forceinline__ void let_next_come() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void begin_kernel() {
    let_next_come();
    wait_for_earlier();
}

// What launching `kernel` on the current device needs to know.
struct KernelFacts {
    const void* kernel;
    int device;
    size_t static_shared;  // bytes
    size_t shared_limit;   // of dynamic shared memory that it may have
    bool begins_early;     // its code holds what begin_kernel does, and driver and device know that
};

// Asked of the driver once for each kernel and device, by each thread: it takes longer to answer than to launch.
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
    // An older build's code, run here through PTX, doesn't wait; older drivers don't capture such launches.
    const bool begins_early = major >= 9 && attributes.ptxVersion >= 90 && driver >= 12040;
    known.push_back(
        {kernel, device, attributes.sharedSizeBytes, kDefaultSharedLimit - attributes.sharedSizeBytes, begins_early});
    facts = &known.back();
    return cudaSuccess;
}

// Lets the kernel have `dynamic_shared` bytes, and all else that the device has: the limit is the process's, and a
// thread that set no more than it needs would lower what another one has set.
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

// `kernel` calls begin_kernel, or both of its parts, first.
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
    config.attrs = &early, config.numAttrs = facts->begins_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
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
