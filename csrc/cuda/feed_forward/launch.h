// SPDX-License-Identifier: Apache-2.0
// Whether the feed-forward kernels run here, and their launchers.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/feed_forward/args.h"

namespace gm {

// True where both the device and the build have the kernels.
bool has_feed_forward_sm90a();
cudaError_t launch_feed_forward_sm90a(const FeedForwardArgs& args, DType dtype, cudaStream_t stream);

cudaError_t launch_feed_forward_bwd_sm90a(const FeedForwardBwdArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
