// SPDX-License-Identifier: Apache-2.0
// Which of the kernels that run on every GPU takes a scan: that for several states, or the portable one. What calls
// this has found that no sm_90 kernel does.
#pragma once

#include "cuda/scan/launch.h"
#include "cuda/scan/many_states/launch.h"
#include "cuda/scan/plan.h"
#include "host/explain.h"

namespace gm {

// Notes which kernel is taken and why; true, with its layout, for that for several states.
inline bool takes_many_states(const ScanShape& shape, bool backward, ManyStatesLayout& layout, const char* op,
                              const char* why_not_sm90) {
    const char* const pass = backward ? " backward" : " forward";
    const char* const why_not = plan_many_states(shape, backward, layout);
    if (why_not == nullptr)
        note(op, pass, ": the kernel for several states");
    else if (shape.states < kManyStates)
        note(op, pass, ": the portable kernel, not the sm_90 one: ", why_not_sm90);
    else
        note(op, pass, ": the portable kernel, not that for several states: ", why_not);
    return why_not == nullptr;
}

inline cudaError_t launch_scan_fwd(ScanFwdArgs& args, DType dtype, cudaStream_t stream, const char* op,
                                   const char* why_not_sm90) {
    ScanShape& shape = args.shape;
    if (ManyStatesLayout layout; takes_many_states(shape, false, layout, op, why_not_sm90)) {
        shape.threads = layout.threads;
        return launch_many_states_fwd(args, layout, dtype, stream);
    }
    shape.threads = scan_fwd_threads(shape.lanes, static_cast<int64_t>(shape.height) * shape.width);
    return launch_grouped_scan_fwd(args, dtype, stream);
}

// The kernel of a backward: `shape.threads` and the parts of its partial sums are set; ScanReduceArgs takes them too.
struct ScanBwdKernel {
    ManyStatesLayout layout;
    bool many_states;
    int parts, state_parts;

    ScanBwdKernel(ScanShape& shape, int element_size, const char* op, const char* why_not_sm90)
        : many_states(takes_many_states(shape, true, layout, op, why_not_sm90)) {
        const int64_t tokens = static_cast<int64_t>(shape.height) * shape.width;
        shape.threads =
            many_states ? layout.threads : scan_bwd_threads(shape.lanes, tokens, shape.states == 1, element_size);
        parts = many_states ? layout.parts : shape.threads / 32;
        state_parts = many_states ? 1 : parts;
    }
    cudaError_t launch(const ScanBwdArgs& args, DType dtype, cudaStream_t stream) const {
        return many_states ? launch_many_states_bwd(args, layout, dtype, stream)
                           : launch_grouped_scan_bwd(args, dtype, stream);
    }
};

}  // namespace gm
