// SPDX-License-Identifier: Apache-2.0
// Arguments of the LayerNorm kernels.
#pragma once

#include "cuda/common/args.h"
#include "cuda/layer_norm/plan.h"

namespace gm {

// layer_norm_pool and modulated_layer_norm; plan in plan.h. A token is `groups` runs of group_dim channels, in
// storage followed by zeros up to group_width where the image is padded; channel c of the parameters is c % group_dim
// of group c / group_dim. Slots count channels and pads.
struct NormShape {
    int64_t batch, tokens;
    int dim;                             // channels of a token: groups * group_dim
    int groups, group_dim, group_width;  // group_width: a multiple of kVec
    float eps;
    int slots() const { return groups * group_width; }
};

struct NormImage : ImageArg {
    bool aligned = false;  // allows aligned accesses to kVec channels, pads included
    int width = 0;         // stored channels of a group: group_dim, or more
    int tail = 0;          // elements behind all groups of a token that a kernel which writes the image sets to 0
};

struct PoolFwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage x, xn, sum;  // sum: x + sum_bias, or absent
    KeptArg kept;          // factors of sum_bias
    ParamArg weight, bias, sum_bias;
    ParamArg x_bias;  // (dim,): added to x first, or absent; not with sum, nor where plan.vecs > kRowVecs or 0
    float* partials = nullptr;  // (batch, plan.strips, dim): sums of xn, or null
    float* words = nullptr;     // those of a later kernel, here marked absent (inter_block_state.cuh), or null
    int64_t word_count = 0;
};

struct PoolBwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage dxn, dxn_more, x, dx, dx_more;  // dxn_more, dx_more: added to dxn, to dx, or absent
    void* xn = nullptr;                       // the forward's result once more, laid out as dxn, or null
    const float* dpooled = nullptr;           // (batch, dim), or null
    ParamArg weight, bias;                    // bias: for xn
    ParamArg x_bias;                          // the forward's, or absent; not with dx_more or xn
    bool sum_dx_more = false;
    KeptArg kept;  // factors of dx_more in its sums
    // (batch, plan.strips, 2 * dim): dweight, dbias; with sum_dx_more or x_bias 3 * dim, the last for sums of dx_more
    // or of dx
    float* partials = nullptr;
};

struct ModulatedFwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage o, x, y;
    KeptArg kept;                        // y is 0 in the images that are not
    ParamArg scale, gate, weight, bias;  // gate (batch, dim)
};

struct ModulatedBwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage dy, o, x, d_o, dx;
    void* y = nullptr;  // the forward's result once more, laid out as dy, or null
    ParamArg scale, gate, weight;
    ParamArg bias;              // for y
    float* partials = nullptr;  // (batch, plan.strips, 3 * dim + 1): dweight, dbias, dscale, dgate
};

}  // namespace gm
