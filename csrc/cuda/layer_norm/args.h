// SPDX-License-Identifier: Apache-2.0
// Arguments of the LayerNorm kernels.
#pragma once

#include "cuda/common/args.h"
#include "cuda/layer_norm/plan.h"

namespace gm {

// layer_norm_pool and modulated_layer_norm; block shapes in plan.h. A token is `groups` runs of group_dim channels, in
// padded images followed by zeros up to group_width. Channel c of the parameters is channel c % group_dim of group c /
// group_dim. Slots count channels and padding.
struct NormShape {
    int64_t batch, tokens;
    int dim;                             // channels of a token: groups * group_dim
    int groups, group_dim, group_width;  // group_width: a multiple of kVec
    float eps;
    int slots() const { return groups * group_width; }
};

struct NormImage : ImageArg {
    bool aligned = false;  // allows aligned accesses to kVec channels, padding included
    int width = 0;         // stored channels of a group: group_dim, or more
    int tail = 0;          // elements after all groups of a token that a kernel which writes the image sets to 0
};

struct PoolFwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage x, xn, sum;   // sum: x + sum_bias, or absent
    DropPathArg drop_path;  // what sum_bias is multiplied by
    ParamArg weight, bias, sum_bias;
    ParamArg x_bias;  // (dim,): added to x first, or absent; not with sum, nor where plan.vecs > kRowVecs or 0
    float* partials = nullptr;  // (batch, plan.strips, dim): sums of xn, or null
    // Of a later scan, which this kernel marks "not ready" (scan/sm90/inter_block_state.cuh), or null.
    float* inter_block_state = nullptr;
    int64_t inter_block_floats = 0;
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
    DropPathArg drop_path;  // what dx_more is multiplied by in its sums
    // (batch, plan.strips, 2 * dim): dweight, dbias; with sum_dx_more or x_bias 3 * dim, the last for sums of dx_more
    // or of dx
    float* partials = nullptr;
};

struct ModulatedFwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage o, x, y;
    DropPathArg drop_path;               // y is 0 in the images whose branch is dropped
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
