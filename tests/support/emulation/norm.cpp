// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/layer_norm/ on the CPU, for emulated_norm.py: what the op entries of csrc/ops/ do, without
// torch.
#include "cuda/layer_norm/launch.h"

namespace gm {
namespace {

struct NormCase {  // as in emulated_norm.py
    int64_t batch, tokens;
    int groups, group_dim, group_width, dtype;
    float eps;
};

NormShape shape_of(const NormCase& c) {
    return {c.batch, c.tokens, c.groups * c.group_dim, c.groups, c.group_dim, c.group_width, c.eps};
}

NormPlan plan_of(const NormCase& c, bool backward, int most_vecs = kMaxRowVecs) {
    const NormShape s = shape_of(c);
    return norm_plan(s.batch, s.tokens, s.slots(), backward ? NormPass::kBackward : NormPass::kForward, most_vecs);
}

}  // namespace
}  // namespace gm

extern "C" int64_t emulated_norm_strips(const gm::NormCase* c, bool backward, bool modulated) {
    return gm::plan_of(*c, backward, backward && modulated ? gm::kRowVecs : gm::kMaxRowVecs).strips;
}

// Null, or what went wrong. Images are x, xn and sum; parameters weight, bias, sum_bias and x_bias.
extern "C" const char* emulated_pool_fwd(const gm::NormCase* c, const gm::NormImage* images,
                                         const gm::ParamArg* parameters, const float* mask, float* partials) {
    gm::PoolFwdArgs args;
    args.shape = gm::shape_of(*c), args.plan = gm::plan_of(*c, false);
    args.x = images[0], args.xn = images[1], args.sum = images[2];
    args.weight = parameters[0], args.bias = parameters[1], args.sum_bias = parameters[2], args.x_bias = parameters[3];
    args.drop_path.mask = mask, args.partials = partials;
    return emulation::problem_of(gm::launch_layer_norm_pool_fwd(args, static_cast<gm::DType>(c->dtype), nullptr));
}

// Images are dxn, dxn_more, x, dx and dx_more; parameters weight, bias and x_bias.
extern "C" const char* emulated_pool_bwd(const gm::NormCase* c, const gm::NormImage* images,
                                         const gm::ParamArg* parameters, const float* dpooled, const float* mask,
                                         void* xn, bool sum_dx_more, float* partials) {
    gm::PoolBwdArgs args;
    args.shape = gm::shape_of(*c), args.plan = gm::plan_of(*c, true);
    args.dxn = images[0], args.dxn_more = images[1], args.x = images[2], args.dx = images[3], args.dx_more = images[4];
    args.weight = parameters[0], args.bias = parameters[1], args.x_bias = parameters[2];
    args.dpooled = dpooled, args.drop_path.mask = mask, args.xn = xn, args.sum_dx_more = sum_dx_more;
    args.partials = partials;
    return emulation::problem_of(gm::launch_layer_norm_pool_bwd(args, static_cast<gm::DType>(c->dtype), nullptr));
}

// Images are o, x and y; parameters scale, gate, weight and bias.
extern "C" const char* emulated_modulated_fwd(const gm::NormCase* c, const gm::NormImage* images,
                                              const gm::ParamArg* parameters, const float* mask) {
    gm::ModulatedFwdArgs args;
    args.shape = gm::shape_of(*c), args.plan = gm::plan_of(*c, false);
    args.o = images[0], args.x = images[1], args.y = images[2];
    args.scale = parameters[0], args.gate = parameters[1], args.weight = parameters[2], args.bias = parameters[3];
    args.drop_path.mask = mask;
    return emulation::problem_of(gm::launch_modulated_layer_norm_fwd(args, static_cast<gm::DType>(c->dtype), nullptr));
}

// Images are dy, o, x, d_o and dx; parameters scale, gate, weight and bias.
extern "C" const char* emulated_modulated_bwd(const gm::NormCase* c, const gm::NormImage* images,
                                              const gm::ParamArg* parameters, void* y, float* partials) {
    gm::ModulatedBwdArgs args;
    args.shape = gm::shape_of(*c), args.plan = gm::plan_of(*c, true, gm::kRowVecs);
    args.dy = images[0], args.o = images[1], args.x = images[2], args.d_o = images[3], args.dx = images[4];
    args.scale = parameters[0], args.gate = parameters[1], args.weight = parameters[2], args.bias = parameters[3];
    args.y = y, args.partials = partials;
    return emulation::problem_of(gm::launch_modulated_layer_norm_bwd(args, static_cast<gm::DType>(c->dtype), nullptr));
}
