// SPDX-License-Identifier: Apache-2.0
// The grouped scan's kernels: one (batch, group) at a time, sequential in the tokens of its path.
#pragma once

#include "cpu/capability.h"
#include "cpu/params.h"

// Scratch is `..._scratch` bytes, aligned to 64. The forward takes a slice of channels, all of them where there is a
// norm, starting at a multiple of kRowUnit.
#define GM_DECLARE_SCAN(capability)                                                                           \
    namespace gm::cpu::capability {                                                                           \
    int64_t grouped_scan_fwd_scratch(const ScanParams& params, int64_t channels);                             \
    void grouped_scan_fwd(const ScanParams& params, const ScanOutputs& out, int64_t batch, int64_t group,     \
                          int64_t first_channel, int64_t channels, void* scratch);                            \
    int64_t grouped_scan_bwd_scratch(const ScanParams& params);                                               \
    void grouped_scan_bwd(const ScanParams& params, const ScanGradients& grads, int64_t batch, int64_t group, \
                          void* scratch);                                                                     \
    }

GM_DECLARE_SCAN(baseline)
GM_DECLARE_SCAN(avx2)
GM_DECLARE_SCAN(avx512)
