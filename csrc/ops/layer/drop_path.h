// SPDX-License-Identifier: Apache-2.0
// Drop path (stochastic depth): some images of a batch drop a branch of the residual stream.
#pragma once

#include "cuda/common/args.h"
#include "host/stream.h"
#include "host/tensor.h"

namespace gm {

// `mask`, (batch,) float32: 1 where the branch counts, 0 where it is dropped; those that count are multiplied by
// `scale`. Without it, all count once.
DropPathArg drop_path_arg(const OptTensor& mask, double scale, bool residual, int64_t batch, const Tensor& like);

// Zeros in the images (batch, ...), contiguous and a multiple of 16 bytes each, whose branch is dropped.
void clear_dropped(const Tensor& images, int64_t batch, const DropPathArg& drop_path, const CudaContext& context);

}  // namespace gm
