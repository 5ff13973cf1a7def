// SPDX-License-Identifier: Apache-2.0
// The norms' kernels, each on one block of tokens of one image. Scratch is norm_scratch bytes, aligned to 64.
#pragma once

#include "cpu/capability.h"
#include "cpu/params.h"

#define GM_DECLARE_NORM(capability)                                                                                  \
    namespace gm::cpu::capability {                                                                                  \
    int64_t norm_scratch(DType dtype, int64_t padded);                                                               \
    void layer_norm_pool_fwd(const NormPoolParams& params, const NormPoolOutputs& out, int64_t batch, int64_t block, \
                             void* scratch);                                                                         \
    void layer_norm_pool_bwd(const NormPoolParams& params, const NormPoolGradients& grads, int64_t batch,            \
                             int64_t block, void* scratch);                                                          \
    void modulated_layer_norm_fwd(const ModulatedNormParams& params, const Image& y, int64_t batch, int64_t block,   \
                                  void* scratch);                                                                    \
    void modulated_layer_norm_bwd(const ModulatedNormParams& params, const ModulatedNormGradients& grads,            \
                                  int64_t batch, int64_t block, void* scratch);                                      \
    }

GM_DECLARE_NORM(baseline)
GM_DECLARE_NORM(avx2)
GM_DECLARE_NORM(avx512)
