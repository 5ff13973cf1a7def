// SPDX-License-Identifier: Apache-2.0
// What host code asks about the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace gm {

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int& value) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : error;
}

inline cudaError_t multiprocessors_of_device(int& count) {
    return device_attribute(cudaDevAttrMultiProcessorCount, count);
}

// Compute capability, ten times the major and the minor number: 90 is sm_90. 0 where there is no device.
inline int capability_of_device() {
    int major = 0, minor = 0;
    const bool known = device_attribute(cudaDevAttrComputeCapabilityMajor, major) == cudaSuccess &&
                       device_attribute(cudaDevAttrComputeCapabilityMinor, minor) == cudaSuccess;
    return known ? 10 * major + minor : 0;
}

// Whether the build has code of `kernel` for `capability` or newer. Code for an older one, run here through PTX, has
// an empty body.
inline bool is_built_for(const void* kernel, int capability) {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= capability;
}

}  // namespace gm
