// SPDX-License-Identifier: Apache-2.0
// Forward of a cross scan for sm_90: fwd_kernel.cuh for bare scans, which share an image.
#include "cuda/scan/sm90/fwd_kernel.cuh"

namespace gm {

cudaError_t launch_cross_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dispatch_fwd_sm90<true>(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return launch_fwd_sm90<typename decltype(tag)::type, typename decltype(block)::type>(args, stream);
    });
}

cudaError_t share_cross_scan_fwd_sm90(ScanFwdSm90Args& args, DType dtype) {
    return dispatch_fwd_sm90<true>(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return share_fwd_sm90<typename decltype(tag)::type, typename decltype(block)::type>(args);
    });
}

}  // namespace gm
