// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan for sm_90: fwd_kernel.cuh, with z, norm and gates.
#include "cuda/scan/sm90/fwd_kernel.cuh"

namespace gm {

bool grouped_scan_sm90_built() {
    using Block = Sm90Block<4, true, sm90_fwd_parts(4), false, false>;
    static const bool built =
        is_built_for(reinterpret_cast<const void*>(grouped_scan_fwd_sm90_kernel<__nv_bfloat16, Block>), 90);
    return built;
}

cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dispatch_fwd_sm90<false>(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return launch_fwd_sm90<typename decltype(tag)::type, typename decltype(block)::type>(args, stream);
    });
}

cudaError_t share_grouped_scan_fwd_sm90(ScanFwdSm90Args& args, DType dtype) {
    return dispatch_fwd_sm90<false>(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return share_fwd_sm90<typename decltype(tag)::type, typename decltype(block)::type>(args);
    });
}

}  // namespace gm
