// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/narrow_conv/ on the CPU, for emulated_narrow_conv.py: what the op entry of csrc/ops/ does,
// without torch.
#include "cuda/narrow_conv/launch.h"

#include <vector>

namespace gm {
namespace {

struct NarrowCase {  // as in emulated_narrow_conv.py
    int64_t batch;
    int height, width, in_channels, taps, pad, dtype;
    int strips, blocks;  // of an image's rows, of the weight's gradient; 0 for as many as the plan says
};

NarrowConvShape shape_of(const NarrowCase& c) {
    NarrowConvShape s;
    s.batch = c.batch, s.height = c.height, s.width = c.width;
    s.out_height = c.height + 2 * c.pad - c.taps + 1, s.out_width = c.width + 2 * c.pad - c.taps + 1;
    s.in_channels = c.in_channels, s.out_channels = 32, s.taps = c.taps, s.pad = c.pad;
    return s;
}

}  // namespace
}  // namespace gm

// Null, or what went wrong. With `back` x is dy and y dx.
extern "C" const char* emulated_narrow_conv(const gm::NarrowCase* c, const void* x, const gm::ParamArg* weight,
                                            const gm::ParamArg* bias, bool relu, bool back, void* y) {
    gm::NarrowConvShape s = gm::shape_of(*c);
    gm::NarrowConvPackArgs pack;
    pack.weight = *weight, pack.transposed = back;
    const int64_t taps = s.taps;
    pack.strides[0] = s.in_channels * taps * taps, pack.strides[1] = taps * taps, pack.strides[2] = taps;
    pack.strides[3] = 1;
    if (back) {
        std::swap(s.height, s.out_height), std::swap(s.width, s.out_width), std::swap(s.in_channels, s.out_channels);
        s.pad = s.taps - 1 - s.pad;
    }
    pack.in_channels = s.in_channels, pack.out_channels = s.out_channels, pack.taps = s.taps;
    std::vector<uint64_t> packed(gm::narrow_conv_packed(s.in_channels, s.out_channels, s.taps) / 4 + 2);
    auto address = (reinterpret_cast<uintptr_t>(packed.data()) + 15) / 16 * 16;
    pack.packed = reinterpret_cast<void*>(address);
    const auto dtype = static_cast<gm::DType>(c->dtype);
    if (const char* problem = emulation::problem_of(gm::launch_narrow_conv_pack(pack, dtype, nullptr))) return problem;
    gm::NarrowConvArgs args;
    args.shape = s, args.x = x, args.weight = pack.packed, args.y = y, args.relu = relu;
    if (bias != nullptr) args.bias = *bias;
    args.plan = gm::narrow_conv_plan(s.batch, s.out_height, s.out_width, s.taps);
    if (c->strips > 0) {
        args.plan.strips = c->strips;
        args.plan.blocks = s.batch * args.plan.columns * c->strips;
    }
    return emulation::problem_of(gm::launch_narrow_conv(args, dtype, nullptr));
}

extern "C" int emulated_narrow_conv_rows(const gm::NarrowCase* c) {
    const gm::NarrowConvShape s = gm::shape_of(*c);
    return c->blocks > 0 ? c->blocks : gm::narrow_conv_weight_plan(s.batch, s.out_height, s.out_width).blocks;
}

// `partials`: emulated_narrow_conv_rows rows of the weight's size.
extern "C" const char* emulated_narrow_conv_weight(const gm::NarrowCase* c, const void* x, const void* dy,
                                                   float* partials) {
    gm::NarrowConvWeightArgs args;
    args.shape = gm::shape_of(*c), args.x = x, args.dy = dy, args.partials = partials;
    args.plan = gm::narrow_conv_weight_plan(args.shape.batch, args.shape.out_height, args.shape.out_width);
    args.plan.blocks = emulated_narrow_conv_rows(c);
    return emulation::problem_of(gm::launch_narrow_conv_weight(args, static_cast<gm::DType>(c->dtype), nullptr));
}
