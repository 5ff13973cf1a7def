// SPDX-License-Identifier: Apache-2.0
// The depthwise convolution's kernels. Scratch is `..._scratch` bytes, aligned to 64.
#pragma once

#include "cpu/capability.h"
#include "cpu/params.h"

#define GM_DECLARE_CONV(capability)                                                                                    \
    namespace gm::cpu::capability {                                                                                    \
    int64_t depthwise_conv_fwd_scratch(const ConvParams& params);                                                      \
    /* Rows [first_row, end_row) of one image of one group. */                                                         \
    void depthwise_conv_fwd(const ConvParams& params, const Image& y, int64_t batch, int64_t group, int64_t first_row, \
                            int64_t end_row, void* scratch);                                                           \
    int64_t depthwise_conv_bwd_scratch(const ConvParams& params, const ConvGradients& grads);                          \
    void depthwise_conv_bwd(const ConvParams& params, const ConvGradients& grads, int64_t batch, int64_t group,        \
                            int64_t row_tile, int64_t channel_tile, void* scratch);                                    \
    }

GM_DECLARE_CONV(baseline)
GM_DECLARE_CONV(avx2)
GM_DECLARE_CONV(avx512)
