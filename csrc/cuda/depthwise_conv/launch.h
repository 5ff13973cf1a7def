// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/depthwise_conv/args.h"

namespace gm {

cudaError_t launch_depthwise_conv_fwd(const ConvFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_depthwise_conv_bwd(const ConvBwdArgs& args, DType dtype, cudaStream_t stream);

// True where both the device and the build have the kernels by tensor cores.
bool has_depthwise_conv_fwd_sm90();
bool has_depthwise_conv_bwd_sm90();
cudaError_t launch_depthwise_conv_fwd_sm90(const ConvFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_depthwise_conv_bwd_sm90(const ConvBwdArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
