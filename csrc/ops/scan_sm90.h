// SPDX-License-Identifier: Apache-2.0
// What the launches of the sm_90 scan kernels have in common.
#pragma once

#include "cuda/scan/sm90/launch.h"
#include "host/tensor.h"

namespace gm {

// The memory through which blocks of a sm_90 kernel that share planes pass states; held until the launch is queued.
template <class Args>
Tensor inter_block_scratch(Args& args, const Tensor& device_of) {
    const int64_t floats = inter_block_floats(args.scan.shape, args.plan);
    if (floats == 0) return {};
    Tensor scratch = empty({floats}, ScalarType::Float, device_of);
    args.inter_block_state = static_cast<float*>(scratch.data_ptr());
    return scratch;
}

}  // namespace gm
