// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/dependent_launch.cuh: kernels run one after another.
#pragma once

namespace gm {

inline void pdl_launch_dependents() {}
inline void pdl_wait() {}

}  // namespace gm
