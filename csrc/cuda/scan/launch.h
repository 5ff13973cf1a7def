// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scan/args.h"

namespace gm {

cudaError_t launch_grouped_scan_fwd(const ScanFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_grouped_scan_bwd(const ScanBwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_scan_reduce(const ScanReduceArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
