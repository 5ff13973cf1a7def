// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/gemm/args.h"

namespace gm {

// True where skinny_gemm_* takes rows of `in` and of `out` columns on the current device.
bool takes_skinny_gemm(DType dtype, int64_t in, int64_t out);
cudaError_t plan_skinny_gemm_bwd(DType dtype, SkinnyGemmArgs& args);
cudaError_t launch_skinny_gemm_fwd(const SkinnyGemmArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_skinny_gemm_bwd(const SkinnyGemmArgs& args, DType dtype, cudaStream_t stream);
// Why tall_gemm does not take them, or null where it does.
const char* why_not_tall_gemm(DType dtype, int64_t in, int64_t out);
// True where the current device and this build have the kernels of both.
bool has_warp_mma();
cudaError_t launch_tall_gemm(const TallGemmArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
