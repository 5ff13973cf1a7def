// SPDX-License-Identifier: Apache-2.0
// Backward of a cross scan for sm_90: bwd_kernel.cuh for bare scans, which share two images.
#include "cuda/scan/sm90/bwd_kernel.cuh"

namespace gm {

cudaError_t launch_cross_scan_bwd_sm90(const ScanBwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dispatch_bwd_sm90<true>(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return launch_bwd_sm90<typename decltype(tag)::type, typename decltype(block)::type>(args, stream);
    });
}

cudaError_t share_cross_scan_bwd_sm90(ScanBwdSm90Args& args, DType dtype) {
    return dispatch_bwd_sm90<true>(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return share_bwd_sm90<typename decltype(tag)::type, typename decltype(block)::type>(args);
    });
}

}  // namespace gm
