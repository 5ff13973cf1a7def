// SPDX-License-Identifier: Apache-2.0
// Which scans the sm_90 kernels take.
#include "cuda/scan/sm90/select.h"

#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"

namespace gm {

namespace {

const char* why_not_sm90(const ScanShape& s, DType dtype, int features) {
    if (dtype == DType::kFloat) return "images are float32, not float16 or bfloat16";
    if (s.states != 1) return "there is more than one state";
    if (s.rank == 0) return "dt_weight is absent, so the step is not of low rank";
    if (!s.softplus) return "softplus is off";
    if (s.lanes < 4) return "a group has 8 channels or fewer";
    if (s.rank + 2 > features) return "there are too many step features for the channels of a group";
    return nullptr;
}

const char* why_not_here() {
    if (capability_of_device() != 90) return "the GPU is not of compute capability 9.0";
    if (!has_tensor_maps()) return "the driver encodes no tensor maps";
    return grouped_scan_sm90_built() ? nullptr : "this build has no code for compute capability 9.0";
}

}  // namespace

const char* why_not_grouped_scan_sm90(const ScanShape& s, bool has_z, bool has_norm, DType dtype) {
    if (const char* const why_not = why_not_sm90(s, dtype, sm90_features(s.lanes))) return why_not;
    if (!has_z) return "z is absent";
    if (!has_norm) return "norm_weight is absent";
    if (s.param_dim != s.dim) return "the channels are a slice of wider groups";
    return why_not_here();
}

const char* why_not_cross_scan_sm90(const ScanShape& s, DType dtype) {
    const int features = s.lanes == 32 ? kProductFeatures : sm90_features(s.lanes);
    if (const char* const why_not = why_not_sm90(s, dtype, features)) return why_not;
    return why_not_here();
}

}  // namespace gm
