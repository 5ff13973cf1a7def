// SPDX-License-Identifier: Apache-2.0
// Arguments of the matrix products that are kernels of this project and not of cuBLAS.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

// y = x weight^T for x (groups, tokens, in), weight (groups, out, in), y (groups, tokens, out). Backward: dx, or with
// `add` dx added to what is there, and sums of dweight over parts of the tokens. All contiguous and aligned to 16
// bytes.
struct SkinnyGemmArgs {
    const void *x = nullptr, *weight = nullptr, *dy = nullptr;
    void *y = nullptr, *dx = nullptr;
    float* dweight = nullptr;  // (groups, parts, out, in)
    int64_t tokens = 0;
    int groups = 0, in = 0, out = 0;
    int parts = 0;  // blocks of a group; set by the launcher, for the backward by plan_skinny_gemm_bwd
    int used = 0;   // of the 4 columns of dy, those that are no padding
    bool add = false;
};

// y = scale * x weight^T [+ bias] [+ added]; shapes as above, bias (out), added as y, which it may be, all in the dtype
// of the images, contiguous and aligned to 16 bytes.
struct TallGemmArgs {
    const void *x = nullptr, *weight = nullptr, *bias = nullptr, *added = nullptr;
    void* y = nullptr;
    int64_t tokens = 0;
    int groups = 0, in = 0, out = 0;
    int parts = 0;  // blocks of a group; set by the launcher
    float scale = 1.f;
    bool transposed = false;  // weight is (groups, in, out)
};

}  // namespace gm
