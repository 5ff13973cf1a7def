// SPDX-License-Identifier: Apache-2.0
// Launchers of the convolutions between few channels, by tensor cores of sm_90a.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/narrow_conv/args.h"

namespace gm {

// True where both the device and the driver run them.
bool has_narrow_conv();
cudaError_t launch_narrow_conv_pack(const NarrowConvPackArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_narrow_conv(const NarrowConvArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_narrow_conv_weight(const NarrowConvWeightArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
