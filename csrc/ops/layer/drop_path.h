// SPDX-License-Identifier: Apache-2.0
// Stochastic depth: some images of a batch leave out a branch of the residual stream.
#pragma once

#include "cuda/common/args.h"
#include "host/stream.h"
#include "host/tensor.h"

namespace gm {

// `kept`, (batch,) float32, 1 where the branch is kept and else 0; those kept count `scale` times. Without it, all
// count once.
KeptArg kept_arg(const OptTensor& kept, double scale, bool residual, int64_t batch, const Tensor& like);

// Zeros in the images (batch, ...), contiguous and of multiples of 16 bytes, that are not kept.
void clear_left_out(const Tensor& images, int64_t batch, const KeptArg& kept, const CudaContext& context);

}  // namespace gm
