// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/parameters/args.h"

namespace gm {

cudaError_t launch_reduce_columns(const ReduceArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_column_sums(const ColumnSumArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_pack_parameters(const PackArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_sum_parameters(const SumArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
