// SPDX-License-Identifier: Apache-2.0
// Planning and launching of the sm_90 scan kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scan/sm90/args.h"

namespace gm {

// Fills the rest of `args` from `args.scan`, for images that allows_tma takes. False where the driver refuses a tensor
// map.
bool prepare_grouped_scan_fwd_sm90(DType dtype, ScanFwdSm90Args& args);
bool prepare_grouped_scan_bwd_sm90(DType dtype, ScanBwdSm90Args& args);

// Decides how many blocks share a plane on the current device (share_planes). To be called once `args` are prepared
// and before memory is allocated by the plan.
cudaError_t share_grouped_scan_fwd_sm90(ScanFwdSm90Args& args, DType dtype);
cudaError_t share_grouped_scan_bwd_sm90(ScanBwdSm90Args& args, DType dtype);

cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream);
cudaError_t launch_grouped_scan_bwd_sm90(const ScanBwdSm90Args& args, DType dtype, cudaStream_t stream);

// The same for the scans of one group of a cross scan, without z, norm and gates. `args.scan.shape` has `scans` of them
// for each slice of `dim` channels, of `param_dim` in all, as its groups: the scans of the first slice, then those of
// the next. All read u and dy; each scan has its own y, du and features, and each slice its own gradients of features,
// which are ImageArg::scan elements apart.
bool prepare_cross_scan_fwd_sm90(DType dtype, ScanFwdSm90Args& args);
bool prepare_cross_scan_bwd_sm90(DType dtype, ScanBwdSm90Args& args);
cudaError_t share_cross_scan_fwd_sm90(ScanFwdSm90Args& args, DType dtype);
cudaError_t share_cross_scan_bwd_sm90(ScanBwdSm90Args& args, DType dtype);
cudaError_t launch_cross_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream);
cudaError_t launch_cross_scan_bwd_sm90(const ScanBwdSm90Args& args, DType dtype, cudaStream_t stream);

}  // namespace gm
