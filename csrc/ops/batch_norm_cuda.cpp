// SPDX-License-Identifier: Apache-2.0
// batch_norm_relu and batch_norm_fold on CUDA: checks, device guard, allocation, launch. Schemas: csrc/schemas.cpp.
#include "cuda/batch_norm/launch.h"
#include "host/cuda_args.h"
#include "host/stream.h"

namespace gm {
namespace {

// Rows of channels that every thread may read 16 bytes at a time; a copy where `t` does not allow that.
Tensor dense_image(const Tensor& t) {
    if (t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) return t;
    return contiguous_copy(t);
}

BatchNormArgs batch_norm_args(const Tensor& x, const Tensor& weight, double eps, int64_t blocks, ParamHolder& param) {
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
    args.blocks = batch_norm_blocks(args.rows, args.channels, blocks);
    return args;
}

std::tuple<Tensor, Tensor> batch_norm_relu_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
    const CudaContext context(x);
    ParamHolder param;
    BatchNormArgs args = batch_norm_args(x, weight, eps, tuning::kBatchNormFwdSums, param);
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
    BatchNormArgs args = batch_norm_args(x, weight, eps, tuning::kBatchNormBwdBlocks, param);
    check_parameter(bias, "bias", {x.size(3)}, x);
    check_image(dy, "dy", shape_of(x), x);
    check_shape(stats, "stats", {3, x.size(3)});
    GM_CHECK(is_float(stats) && stats.is_contiguous() && same_device(stats, x),
             "stats must be contiguous, float32 and on the device of x");
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

std::tuple<Tensor, Tensor> batch_norm_fold(Tensor image, Tensor weight, Tensor norm_weight, Tensor norm_bias,
                                           Tensor mean, Tensor variance, double eps, bool blocks) {
    const CudaContext context(image);
    GM_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.numel() > 0,
             "weight must be (O, C, K, K) with elements, got ", show(shape_of(weight)));
    const int64_t out = weight.size(0), channels = weight.size(1), taps = weight.size(2);
    GM_CHECK(!blocks || taps % 4 == 3, "K must be 3, 7, 11, ... for blocks of pixels, got ", taps);
    GM_CHECK(weight.numel() <= INT32_MAX / 16, "weight has too many elements: ", weight.numel());
    check_parameter(weight, "weight", shape_of(weight), image);
    check_parameter(norm_weight, "norm_weight", {out}, image);
    check_parameter(norm_bias, "norm_bias", {out}, image);
    check_parameter(mean, "mean", {out}, image);
    check_parameter(variance, "variance", {out}, image);

    ParamHolder param;
    FoldArgs args;
    args.weight = {weight.data_ptr(), is_float(weight)};
    for (int64_t d = 0; d < 4; ++d) args.strides[d] = weight.stride(d);
    args.out = static_cast<int>(out), args.channels = static_cast<int>(channels);
    args.norm_weight = param(norm_weight), args.norm_bias = param(norm_bias);
    args.mean = param(mean), args.variance = param(variance);
    args.eps = static_cast<float>(eps), args.blocks = blocks;
    const int64_t folded_taps = blocks ? (taps + 1) / 2 : taps, width = blocks ? 4 * round_up(channels, 2) : channels;
    args.folded_taps = static_cast<int>(folded_taps), args.folded_channels = static_cast<int>(width);
    const int64_t row = folded_taps * width;
    const Tensor folded = empty_strided({out, width, folded_taps, folded_taps}, {folded_taps * row, 1, row, width},
                                        image.scalar_type(), image);
    const Tensor bias = empty({out}, image.scalar_type(), image);
    args.folded = folded.data_ptr(), args.bias = bias.data_ptr();
    check_cuda(launch_batch_norm_fold(args, dtype_of(image), context.stream()), "batch_norm_fold");
    return {folded, bias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("batch_norm_relu_fwd", TORCH_BOX(&gm::batch_norm_relu_fwd));
    m.impl("batch_norm_relu_bwd", TORCH_BOX(&gm::batch_norm_relu_bwd));
    m.impl("batch_norm_fold", TORCH_BOX(&gm::batch_norm_fold));
}
