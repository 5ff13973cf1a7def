// SPDX-License-Identifier: Apache-2.0
// The kernels for several states: which scans they take, and their launchers.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scan/args.h"
#include "cuda/scan/many_states/plan.h"

namespace gm {

// How a block holds the scan on the current device. Returns null, or why the kernel does not take it.
const char* plan_many_states(const ScanShape& shape, bool backward, ManyStatesLayout& layout);

// `shape.threads` must be the layout's. Of ScanBwdArgs::partials, layout.parts parts, the first one holds dA.
cudaError_t launch_many_states_fwd(const ScanFwdArgs& args, const ManyStatesLayout& layout, DType dtype,
                                   cudaStream_t stream);
cudaError_t launch_many_states_bwd(const ScanBwdArgs& args, const ManyStatesLayout& layout, DType dtype,
                                   cudaStream_t stream);

}  // namespace gm
