// SPDX-License-Identifier: Apache-2.0
// Arguments of the scan kernels for sm_90 and newer.
#pragma once

#include "cuda/slab.h"

namespace gm {

struct SlabMapKind {  // see SlabMaps
    int row_fuse, column_fuse;
};

struct ScanFwdSm90Args {
    CUtensorMap u[2], z[2], y[2];  // along rows, along columns
    ScanFwdArgs scan;
    SlabPlan plan;
    SlabMapKind kind[3];  // of u, z, y
};

struct ScanBwdSm90Args {
    CUtensorMap u[2], z[2], dy[2], du[2], dz[2];
    ScanBwdArgs scan;
    SlabPlan plan;
    SlabMapKind kind[5];  // of u, z, dy, du, dz
};

// Step features, B and C that a block of the forward fetches ahead: its registers set the limit of the rank, which is
// ceil(channels / 16) in the field.
template <int kLanes>
constexpr int kSm90Features = kLanes == 4    ? 3
                              : kLanes == 8  ? 4
                              : kLanes == 16 ? 8
                                             : 16;

inline int sm90_features(int lanes) {
    return lanes == 4    ? kSm90Features<4>
           : lanes == 8  ? kSm90Features<8>
           : lanes == 16 ? kSm90Features<16>
                         : kSm90Features<32>;
}

// Fills `args` for a scan that these kernels take: 16-bit storage, one state, low-rank softplus step, norm and z given,
// sm_90 or newer in the machine and in the build, tensors that the copy engine can move. False for any other, which the
// portable kernel takes.
bool prepare_grouped_scan_fwd_sm90(const ScanFwdArgs& scan, DType dtype, ScanFwdSm90Args& args);

bool prepare_grouped_scan_bwd_sm90(const ScanBwdArgs& scan, DType dtype, ScanBwdSm90Args& args);

bool grouped_scan_sm90_built();
cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream);
cudaError_t launch_grouped_scan_bwd_sm90(const ScanBwdSm90Args& args, DType dtype, cudaStream_t stream);

}  // namespace gm
