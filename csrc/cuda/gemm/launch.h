// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/gemm/args.h"

namespace gm {

// True where narrow_product_* takes rows of `in` and of `out` columns on the current device.
bool takes_narrow_product(DType dtype, int64_t in, int64_t out);
cudaError_t plan_narrow_product_bwd(DType dtype, NarrowProductArgs& args);
cudaError_t launch_narrow_product_fwd(const NarrowProductArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_narrow_product_bwd(const NarrowProductArgs& args, DType dtype, cudaStream_t stream);
bool takes_wide_product(DType dtype, int64_t in, int64_t out);
bool has_warp_products();  // the current device and this build, for both
// the current device and this build, for both
cudaError_t launch_wide_product(const WideProductArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
