// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/channel_affinity/args.h"

namespace gm {

cudaError_t launch_channel_affinity_fwd(const AffinityArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_channel_affinity_bwd(const AffinityArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
