// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/layer_norm/args.h"

namespace gm {

cudaError_t launch_layer_norm_pool_fwd(const PoolFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_layer_norm_pool_bwd(const PoolBwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_modulated_layer_norm_fwd(const ModulatedFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_modulated_layer_norm_bwd(const ModulatedBwdArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
