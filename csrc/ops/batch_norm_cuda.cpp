// SPDX-License-Identifier: Apache-2.0
// batch_norm_relu on CUDA: checks, device guard, allocation, launch. Schemas: csrc/schemas.cpp.
#include "cuda/launch.h"
#include "host/cuda_args.h"
#include "host/stream.h"

namespace gm {
namespace {

// Rows of channels that every thread may read in 16-byte pieces; a copy where `t` is not that.
Tensor dense_image(const Tensor& t) {
    if (t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) return t;
    Tensor copy = empty(shape_of(t), t.scalar_type(), t);
    torch::stable::copy_(copy, t);
    return copy;
}

BatchNormArgs batch_norm_args(const Tensor& x, const Tensor& weight, double eps, ParamHolder& param) {
    GM_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, H, W, C) with elements, got ", show(shape_of(x)));
    const int64_t channels = x.size(3);
    GM_CHECK(channels % kBatchNormUnit == 0 && channels <= kBatchNormUnit * kBatchNormThreads,
             "C must be a multiple of ", kBatchNormUnit, " up to ", kBatchNormUnit * kBatchNormThreads, ", got ",
             channels);
    check_parameter(weight, "weight", {channels}, x);
    BatchNormArgs args;
    args.channels = static_cast<int>(channels), args.rows = x.numel() / channels;
    GM_CHECK(args.rows > 1, "batch_norm_relu needs more than one pixel, got ", show(shape_of(x)));
    args.weight = param(weight);
    args.eps = static_cast<float>(eps);
    args.blocks = batch_norm_blocks(args.rows, args.channels);
    return args;
}

std::tuple<Tensor, Tensor> batch_norm_relu_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
    const CudaContext context(x);
    ParamHolder param;
    BatchNormArgs args = batch_norm_args(x, weight, eps, param);
    check_parameter(bias, "bias", {x.size(3)}, x);
    x = dense_image(x);
    const Tensor y = empty(shape_of(x), x.scalar_type(), x);
    const Tensor stats = empty({3, x.size(3)}, ScalarType::Float, x);
    const Tensor partials = empty({args.blocks, 2 * x.size(3)}, ScalarType::Float, x);
    args.bias = param(bias);
    args.x = x.data_ptr(), args.y = y.data_ptr();
    args.stats = static_cast<float*>(stats.data_ptr()), args.partials = static_cast<float*>(partials.data_ptr());
    check_cuda(launch_batch_norm_relu_fwd(args, dtype_of(x), context.stream()), "batch_norm_relu forward");
    return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats,
                                                       double eps) {
    const CudaContext context(x);
    ParamHolder param;
    BatchNormArgs args = batch_norm_args(x, weight, eps, param);
    check_parameter(bias, "bias", {x.size(3)}, x);
    check_image(dy, "dy", shape_of(x), x);
    check_shape(stats, "stats", {3, x.size(3)});
    GM_CHECK(is_float(stats) && stats.is_contiguous() && same_device(stats, x), "stats is not what the forward made");
    x = dense_image(x), dy = dense_image(dy);
    const Tensor dx = empty(shape_of(x), x.scalar_type(), x);
    const Tensor dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(bias, x);
    const Tensor sums = empty({args.blocks + 1, 2 * x.size(3)}, ScalarType::Float, x);
    args.bias = param(bias);
    args.x = x.data_ptr(), args.dy = dy.data_ptr(), args.dx = dx.data_ptr();
    args.stats = static_cast<float*>(stats.data_ptr());
    args.means = static_cast<float*>(sums.data_ptr()), args.partials = args.means + 2 * x.size(3);
    args.dweight = param_out(dweight, weight), args.dbias = param_out(dbias, bias);
    check_cuda(launch_batch_norm_relu_bwd(args, dtype_of(x), context.stream()), "batch_norm_relu backward");
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("batch_norm_relu_fwd", TORCH_BOX(&gm::batch_norm_relu_fwd));
    m.impl("batch_norm_relu_bwd", TORCH_BOX(&gm::batch_norm_relu_bwd));
}
