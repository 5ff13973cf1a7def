// SPDX-License-Identifier: Apache-2.0
// Which scans the sm_90 kernels take.
#include "cuda/scan/sm90/select.h"

#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"

namespace gm {

bool takes_grouped_scan_sm90(const ScanShape& s, bool has_z, bool has_norm, DType dtype) {
    const bool shape = dtype != DType::kFloat && s.states == 1 && s.rank > 0 && s.softplus && s.lanes >= 4 &&
                       s.rank + 2 <= sm90_features(s.lanes) && s.param_dim == s.dim && has_z && has_norm;
    if (!shape || !has_tensor_maps()) return false;
    return capability_of_device() == 90 && grouped_scan_sm90_built();
}

}  // namespace gm
