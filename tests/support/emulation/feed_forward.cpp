// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/feed_forward/ on the CPU, for emulated_feed_forward.py: what the op entry of csrc/ops/layer/
// does, without torch.
#include "cuda/feed_forward/launch.h"

namespace gm {
namespace {

struct FeedForwardCase {  // as in emulated_feed_forward.py
    int64_t batch;
    int height, width, channels, hidden, dtype;
    int images;  // that a block walks; 0 for as many as the plan says
    float scale;
};

// The op entry takes the kernel where blocks of 64 channels fill best; here they are of all sizes.
ConvSm90Plan plan_of(const FeedForwardCase& c) {
    ConvSm90Plan plan = conv_sm90_plan(c.batch, c.height, c.width, 1, c.hidden, true);
    plan.octets = kConvSm90Warps;
    plan.chunks = static_cast<int>(div_up(c.hidden, plan.octets * 8));
    plan.column_blocks = plan.tiles;
    if (c.images > 0) plan.images = c.images;
    plan.segments = div_up(c.batch, plan.images);
    plan.blocks = plan.segments * plan.chunks * plan.column_blocks;
    plan.partial_rows = plan.segments * plan.tiles;
    return plan;
}

}  // namespace
}  // namespace gm

// Rows of partial sums.
extern "C" int64_t emulated_feed_forward_rows(const gm::FeedForwardCase* c) { return gm::plan_of(*c).partial_rows; }

// Null, or what went wrong. Tensors: xn, dout, fc1's weight and bias, fc2's weight, dhidden, activated. Parameters: the
// convolution's.
extern "C" const char* emulated_feed_forward_bwd(const gm::FeedForwardCase* c, void* const* tensors,
                                                 const gm::ParamArg* parameters, const float* mask, float* partials) {
    gm::FeedForwardBwdArgs args;
    gm::ConvBwdArgs& conv = args.conv;
    conv.shape.batch = c->batch, conv.shape.height = c->height, conv.shape.width = c->width;
    conv.shape.groups = 1, conv.shape.dim = c->hidden, conv.shape.activation = gm::Activation::kGelu;
    conv.sm90 = gm::plan_of(*c);
    args.channels = c->channels, args.scale = c->scale;
    args.xn = tensors[0], args.dout = tensors[1];
    args.fc1_weight = tensors[2], args.fc1_bias = tensors[3], args.fc2_weight = tensors[4];
    const auto image = [&](void* p) {
        return gm::ImageArg{p, int64_t{c->height} * c->width * c->hidden, c->hidden, c->hidden};
    };
    conv.dx = image(tensors[5]), conv.y = image(tensors[6]);
    conv.weight = parameters[0], conv.bias = parameters[1];
    conv.drop_path.mask = mask, conv.drop_path.scale = c->scale;
    conv.sums = gm::kConvTaps + 2, conv.partials = partials;
    return emulation::problem_of(gm::launch_feed_forward_bwd_sm90a(args, static_cast<gm::DType>(c->dtype), nullptr));
}

// Null, or what went wrong. Tensors, of the images' dtype but for the sixth: x, norm's weight and bias, fc1's weight
// and bias, the convolution's taps and biases (float32) as the kernel reads them, fc2's weight and bias, out.
extern "C" const char* emulated_feed_forward_fwd(const gm::FeedForwardCase* c, void* const* tensors, const float* mask,
                                                 bool residual, float eps) {
    gm::FeedForwardArgs args;
    args.batch = c->batch, args.height = c->height, args.width = c->width;
    args.channels = c->channels, args.hidden_pad = c->hidden;
    args.plan = gm::feed_forward_plan(c->batch, c->height, c->width, c->channels, c->hidden);
    const auto image = [&](void* p) {
        return gm::ImageArg{p, int64_t{c->height} * c->width * c->channels, c->channels, c->channels};
    };
    args.x = image(tensors[0]), args.out = image(tensors[9]);
    args.norm_weight = {tensors[1], false}, args.norm_bias = {tensors[2], false}, args.fc2_bias = {tensors[8], false};
    args.fc1_weight = tensors[3], args.fc1_bias = tensors[4], args.conv_weight = tensors[5];
    args.conv_bias = static_cast<const float*>(tensors[6]), args.fc2_weight = tensors[7];
    args.residual = residual, args.eps = eps;
    args.drop_path.mask = mask, args.drop_path.scale = c->scale;
    return emulation::problem_of(gm::launch_feed_forward_sm90a(args, static_cast<gm::DType>(c->dtype), nullptr));
}
