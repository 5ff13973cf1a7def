// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/batch_norm/args.h"

namespace gm {

cudaError_t launch_batch_norm_relu_fwd(const BatchNormArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_batch_norm_relu_bwd(const BatchNormArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_batch_norm_fold(const FoldArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
