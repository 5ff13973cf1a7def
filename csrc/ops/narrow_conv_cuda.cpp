// SPDX-License-Identifier: Apache-2.0
// narrow_conv on CUDA: checks, device guard, allocation, launch. Schemas and layouts: csrc/schemas.cpp.
#include "cuda/narrow_conv/launch.h"
#include "cuda/narrow_conv/plan.h"
#include "host/cuda_args.h"
#include "host/stream.h"
#include "ops/entries_cuda.h"

namespace gm {
namespace {

constexpr const char* kOp = "narrow_conv";

// Behind the checks of arguments, which are the same for every GPU.
void check_kernels() {
#if GM_WITH_SM90A
    GM_CHECK(has_narrow_conv(), kOp, " runs on GPUs of compute capability 9.0 alone, by a driver that has tensor maps");
#else
    GM_CHECK(false, kOp, " has kernels for GPUs of compute capability 9.0, and this build has no code for them");
#endif
}

// TMA loads rows of it; a copy where it can't.
Tensor dense_image(const Tensor& t) {
    if (t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) return t;
    return contiguous_copy(t);
}

NarrowConvShape conv_shape(const Tensor& x, const Tensor& weight, int64_t padding) {
    GM_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, H, W, C) with elements, got ", show(shape_of(x)));
    GM_CHECK(!is_float(x), kOp, " takes images of float16 and bfloat16, got float32");
    GM_CHECK(weight.dim() == 4, "weight must be (O, C, K, K), got ", show(shape_of(weight)));
    const int64_t out = weight.size(0), taps = weight.size(2);
    check_parameter(weight, "weight", {out, x.size(3), taps, taps}, x);
    GM_CHECK(takes_narrow_conv(x.size(3), out, taps), kOp, " takes C, O and K of 32, 32, 3 or 16, 32, 4, got ",
             x.size(3), ", ", out, ", ", taps);
    GM_CHECK(padding >= 0 && padding < taps, "padding must be at least 0 and below K, got ", padding);
    const int64_t height = x.size(1) + 2 * padding - taps + 1, width = x.size(2) + 2 * padding - taps + 1;
    GM_CHECK(height > 0 && width > 0, "x is smaller than the kernel: ", show(shape_of(x)));
    GM_CHECK(x.size(0) <= INT32_MAX / 2 && x.size(1) <= INT32_MAX / 2 && x.size(2) <= INT32_MAX / 2,
             "x has a size beyond 2^30: ", show(shape_of(x)));
    NarrowConvShape s;
    s.batch = x.size(0);
    s.height = static_cast<int>(x.size(1)), s.width = static_cast<int>(x.size(2));
    s.out_height = static_cast<int>(height), s.out_width = static_cast<int>(width);
    s.in_channels = static_cast<int>(x.size(3)), s.out_channels = static_cast<int>(out);
    s.taps = static_cast<int>(taps), s.pad = static_cast<int>(padding);
    return s;
}

// y = conv(x); `transposed`: the way back, the shape's channels exchanged and its image the result's.
void convolve(const Tensor& y, const Tensor& x, const NarrowConvShape& s, const Tensor& weight, bool transposed,
              const OptTensor& bias, bool relu, const CudaContext& context) {
    const DType dtype = dtype_of(x);
    NarrowConvPackArgs pack;
    pack.weight = {weight.data_ptr(), is_float(weight)};
    for (int64_t d = 0; d < 4; ++d) pack.strides[d] = weight.stride(d);
    pack.transposed = transposed;
    pack.in_channels = s.in_channels, pack.out_channels = s.out_channels, pack.taps = s.taps;
    const Tensor packed = empty({narrow_conv_packed(s.in_channels, s.out_channels, s.taps)}, x.scalar_type(), x);
    pack.packed = packed.data_ptr();
    check_cuda(launch_narrow_conv_pack(pack, dtype, context.stream()), "narrow_conv: packing the weight");
    ParamHolder param;
    NarrowConvArgs args;
    args.shape = s;
    args.x = x.data_ptr(), args.weight = packed.data_ptr(), args.y = y.data_ptr();
    args.bias = param(bias), args.relu = relu;
    args.plan = narrow_conv_plan(s.batch, s.out_height, s.out_width, s.taps);
#if GM_WITH_SM90A
    check_cuda(launch_narrow_conv(args, dtype, context.stream()), "narrow_conv");
#endif
}

Tensor empty_result(const Tensor& x, const NarrowConvShape& s) {
    return empty({s.batch, s.out_height, s.out_width, s.out_channels}, x.scalar_type(), x);
}

Tensor narrow_conv_fwd(Tensor x, Tensor weight, int64_t padding) {
    const CudaContext context(x);
    const NarrowConvShape s = conv_shape(x, weight, padding);
    check_kernels();
    const Tensor y = empty_result(x, s);
    convolve(y, dense_image(x), s, weight, false, {}, false, context);
    return y;
}

Tensor narrow_conv_relu(Tensor x, Tensor weight, Tensor bias, int64_t padding) {
    const CudaContext context(x);
    const NarrowConvShape s = conv_shape(x, weight, padding);
    check_parameter(bias, "bias", {s.out_channels}, x);
    check_kernels();
    const Tensor y = empty_result(x, s);
    convolve(y, dense_image(x), s, weight, false, bias, true, context);
    return y;
}

std::tuple<Tensor, Tensor> narrow_conv_bwd(Tensor dy, Tensor x, Tensor weight, int64_t padding, bool needs_dx,
                                           bool needs_dweight) {
    const CudaContext context(x);
    const NarrowConvShape s = conv_shape(x, weight, padding);
    check_image(dy, "dy", {s.batch, s.out_height, s.out_width, s.out_channels}, x);
    GM_CHECK(!needs_dx || takes_narrow_conv(s.out_channels, s.in_channels, s.taps), "dx takes C, O and K of 32, 32, 3");
    check_kernels();
    dy = dense_image(dy);
    Tensor dx = empty_absent(x.scalar_type(), x), dweight = empty_absent(weight.scalar_type(), x);
    if (needs_dx) {
        NarrowConvShape back = s;
        std::swap(back.height, back.out_height), std::swap(back.width, back.out_width);
        std::swap(back.in_channels, back.out_channels);
        back.pad = s.taps - 1 - s.pad;
        dx = empty(shape_of(x), x.scalar_type(), x);
        convolve(dx, dy, back, weight, true, {}, false, context);
    }
    if (needs_dweight) {
        x = dense_image(x);
        dweight = empty(shape_of(weight), weight.scalar_type(), x);
        NarrowConvWeightArgs args;
        args.shape = s;
        args.x = x.data_ptr(), args.dy = dy.data_ptr();
        args.plan = narrow_conv_weight_plan(s.batch, s.out_height, s.out_width);
        const PartialRows sums = partial_rows(args.plan.blocks, weight.numel(), x);
        args.partials = static_cast<float*>(sums.values.data_ptr());
        const DType dtype = dtype_of(x);
#if GM_WITH_SM90A
        check_cuda(launch_narrow_conv_weight(args, dtype, context.stream()), "narrow_conv: gradient of the weight");
#endif
        reduce_rows(sums, 0, 1, {dweight}, dtype, context);
    }
    return {dx, dweight};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("narrow_conv_fwd", TORCH_BOX(&gm::narrow_conv_fwd));
    m.impl("narrow_conv_bwd", TORCH_BOX(&gm::narrow_conv_bwd));
    m.impl("narrow_conv_relu", TORCH_BOX(&gm::narrow_conv_relu));
}
