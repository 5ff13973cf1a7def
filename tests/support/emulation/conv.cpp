// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/depthwise_conv/ on the CPU, for emulated_conv.py: what the op entries of csrc/ops/ do,
// without torch.
#include "cuda/depthwise_conv/launch.h"

namespace gm {
namespace {

enum Kernel { kPortable, kSm90 };  // as in emulated_conv.py

struct ConvCase {  // as in emulated_conv.py
    int64_t batch, height, width, groups, dim;
    int dtype, activation;
    int images;  // that a block of the sm_90 kernels walks; 0 for as many as the plan says
};

ConvShape shape_of(const ConvCase& c) {
    ConvShape s{};
    s.batch = c.batch;
    s.height = static_cast<int>(c.height), s.width = static_cast<int>(c.width);
    s.groups = static_cast<int>(c.groups), s.dim = static_cast<int>(c.dim);
    s.activation = static_cast<Activation>(c.activation);
    return s;
}

bool allows_vectors(const ConvCase& c, const ImageArg* images, int count, int64_t vector) {
    const int64_t size = static_cast<DType>(c.dtype) == DType::kFloat ? 4 : 2;
    bool allowed = c.dim % vector == 0;
    for (const ImageArg* image = images; image < images + count; ++image) {
        allowed = allowed && reinterpret_cast<uintptr_t>(image->ptr) % (vector * size) == 0;
        for (const int64_t stride : {image->batch, image->token, image->group})
            allowed = allowed && stride % vector == 0;
    }
    return allowed;
}

ConvSm90Plan sm90_plan(const ConvCase& c, bool backward) {
    const ConvShape s = shape_of(c);
    ConvSm90Plan plan = conv_sm90_plan(s.batch, s.height, s.width, s.groups, s.dim, backward);
    if (c.images > 0) {
        plan.images = c.images, plan.segments = div_up(s.batch, c.images);
        plan.blocks = plan.segments * s.groups * plan.chunks * plan.column_blocks;
        plan.partial_rows = plan.segments * plan.tiles;
    }
    return plan;
}

ConvBwdPlan bwd_plan(const ConvCase& c) {
    const ConvShape s = shape_of(c);
    return conv_bwd_plan(s.batch, s.height, s.width, s.groups, s.dim);
}

}  // namespace
}  // namespace gm

// Runs of 8 channels that a block of the sm_90 kernels has, and its blocks.
extern "C" void emulated_conv_plan(const gm::ConvCase* c, bool backward, int64_t* octets, int64_t* blocks) {
    const gm::ConvSm90Plan plan = gm::sm90_plan(*c, backward);
    *octets = plan.octets, *blocks = plan.blocks;
}

extern "C" int64_t emulated_conv_partial_rows(int kernel, const gm::ConvCase* c) {
    return kernel == gm::kSm90 ? gm::sm90_plan(*c, true).partial_rows : gm::bwd_plan(*c).partial_rows;
}

// Null, or what went wrong. Images are x and y; parameters weight and bias; `mask` as in DropPathArg.
extern "C" const char* emulated_conv_fwd(int kernel, const gm::ConvCase* c, const gm::ImageArg* images,
                                         const gm::ParamArg* parameters, const float* mask) {
    gm::ConvFwdArgs args;
    args.shape = gm::shape_of(*c), args.shape.aligned = gm::allows_vectors(*c, images, 2, 4);
    args.x = images[0], args.y = images[1];
    args.weight = parameters[0], args.bias = parameters[1], args.drop_path.mask = mask;
    const auto dtype = static_cast<gm::DType>(c->dtype);
    if (kernel == gm::kSm90) {
        args.sm90 = gm::sm90_plan(*c, false);
        return emulation::problem_of(gm::launch_depthwise_conv_fwd_sm90(args, dtype, nullptr));
    }
    args.plan = gm::conv_fwd_plan(c->batch, args.shape.height, args.shape.width, args.shape.groups, args.shape.dim);
    return emulation::problem_of(gm::launch_depthwise_conv_fwd(args, dtype, nullptr));
}

// Images are x, dy, dx and y, the last of which may be absent. `partials` has emulated_conv_partial_rows rows of `sums`
// numbers a channel.
extern "C" const char* emulated_conv_bwd(int kernel, const gm::ConvCase* c, const gm::ImageArg* images,
                                         const gm::ParamArg* parameters, const float* mask, int sums, float* partials) {
    gm::ConvBwdArgs args;
    args.shape = gm::shape_of(*c), args.shape.aligned = gm::allows_vectors(*c, images, 4, 8);
    args.x = images[0], args.dy = images[1], args.dx = images[2], args.y = images[3];
    args.weight = parameters[0], args.bias = parameters[1], args.drop_path.mask = mask;
    args.sums = sums, args.partials = partials;
    const auto dtype = static_cast<gm::DType>(c->dtype);
    if (kernel == gm::kSm90) {
        args.sm90 = gm::sm90_plan(*c, true);
        return emulation::problem_of(gm::launch_depthwise_conv_bwd_sm90(args, dtype, nullptr));
    }
    args.plan = gm::bwd_plan(*c);
    return emulation::problem_of(gm::launch_depthwise_conv_bwd(args, dtype, nullptr));
}
