// SPDX-License-Identifier: Apache-2.0
// The current CUDA stream and device through the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "host/tensor.h"

// CPU builds of torch do not export this symbol. It is weak, so that one libgroupmamba loads under both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace gm {

// Makes the tensor's device current for its lifetime and holds torch's current stream on it.
class CudaContext {
public:
    explicit CudaContext(const Tensor& t) : guard_(device_of(t)) {
        GM_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is a CPU build and has no CUDA streams");
        // A thread that has not used the driver yet, such as autograd's at its first backward, has no context, which
        // tensor maps and cuBLAS need: setting the device creates it.
        thread_local int32_t met = -1;
        if (met != t.get_device_index()) {
            const cudaError_t error = cudaSetDevice(t.get_device_index());
            GM_CHECK(error == cudaSuccess, "setting the device: ", cudaGetErrorString(error));
            met = t.get_device_index();
        }
        void* stream = nullptr;
        GM_TORCH_CALL(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }

private:
    // Any one tensor on CUDA brings a call to these entries.
    static int32_t device_of(const Tensor& t) {
        int32_t type = 0;
        GM_TORCH_CALL(aoti_torch_get_device_type(t.get(), &type));
        GM_CHECK(type == aoti_torch_device_type_cuda(), "all tensors must be on one CUDA device");
        return t.get_device_index();
    }

    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
};

inline void check_cuda(cudaError_t error, const char* what) {
    GM_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace gm
