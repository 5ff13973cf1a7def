// SPDX-License-Identifier: Apache-2.0
// Launchers: each queues its kernel, or those of one step after another, and returns what the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/images/args.h"

namespace gm {

cudaError_t launch_sum_images(const SumImagesArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_clear_images(const ClearImagesArgs& args, cudaStream_t stream);
cudaError_t launch_copy_rows(const CopyRowsArgs& args, DType dtype, cudaStream_t stream);
// From float, half or bfloat16 to half or bfloat16.
cudaError_t launch_pixel_blocks(const PixelBlocksArgs& args, DType in, DType out, cudaStream_t stream);

}  // namespace gm
