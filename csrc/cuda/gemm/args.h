// SPDX-License-Identifier: Apache-2.0
// Arguments of the matrix products of this project's own.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

// y = x weight^T for x (groups, tokens, in), weight (groups, out, in), y (groups, tokens, out); backward: dx, or with
// `add` what is there and dx, and sums of dweight over parts of the tokens. All contiguous and aligned to 16 bytes.
struct NarrowProductArgs {
    const void *x = nullptr, *weight = nullptr, *dy = nullptr;
    void *y = nullptr, *dx = nullptr;
    float* dweight = nullptr;  // (groups, parts, out, in)
    int64_t tokens = 0;
    int groups = 0, in = 0, out = 0;
    int parts = 0;  // blocks of a group; of the backward by plan_narrow_product_bwd
    int used = 0;   // columns of dy, of 4, that are no pads
    bool add = false;
};

// y = scale * x weight^T + bias, or with `add` that and what is there but no bias; shapes as above, bias (out), all in
// the images' dtype, contiguous and aligned to 16 bytes.
struct WideProductArgs {
    const void *x = nullptr, *weight = nullptr, *bias = nullptr;
    void* y = nullptr;
    int64_t tokens = 0;
    int groups = 0, in = 0, out = 0;
    int parts = 0;  // blocks of a group, by the launcher
    float scale = 1.f;
    bool add = false, transposed = false;  // weight (groups, in, out)
};

}  // namespace gm
