// SPDX-License-Identifier: Apache-2.0
// depthwise_conv3x3 on CUDA: checks, device guard, allocation, launch. Schemas and layouts: csrc/schemas.cpp.
#include "cuda/depthwise_conv/launch.h"
#include "host/cuda_args.h"
#include "host/explain.h"
#include "host/stream.h"
#include "ops/entries_cuda.h"

namespace gm {
namespace {

const char* accesses(const ConvShape& s) {
    return s.aligned ? "vector accesses" : "element by element: channels or addresses are no multiples of a vector";
}

// True where the groups of a pixel are adjacent, so that the image is one group of G * D channels.
bool groups_adjacent(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == t.size(4); }

ConvShape conv_shape(const Tensor& x, bool merge, int64_t activation) {
    const int64_t channels = x.size(3) * x.size(4);
    GM_CHECK(x.size(1) * x.size(2) <= INT32_MAX, "H * W must be below 2^31, got ", x.size(1) * x.size(2));
    GM_CHECK(channels <= INT32_MAX, "G * D must be below 2^31, got ", channels);
    ConvShape shape{};
    shape.batch = x.size(0);
    shape.height = static_cast<int>(x.size(1));
    shape.width = static_cast<int>(x.size(2));
    shape.groups = merge ? 1 : static_cast<int>(x.size(3));
    shape.dim = static_cast<int>(merge ? channels : x.size(4));
    shape.activation = static_cast<Activation>(activation);
    return shape;
}

// Why tensor cores do not take the images, or are not the faster way; null where they do and are. `aligned`: all images
// allow accesses of 16 bytes. `has_kernel` asks the device, and so is called where the sizes would do.
const char* why_not_tensor_cores(const ConvShape& s, const ConvSm90Plan& plan, DType dtype, const ParamArg& weight,
                                 bool aligned, std::initializer_list<const ImageArg*> images, bool (*has_kernel)()) {
    if (const char* const why_not = why_not_conv_sm90(plan, dtype)) return why_not;
    // Rounded, those below 6e-5 would lose more than their last bits.
    if (dtype == DType::kHalf && weight.is_float)
        return "weights are float32, as padded ones are, beside images of float16";
    if (!has_kernel()) return "the GPU, or this build, is not of compute capability 9.0";
    const auto moves = [](int64_t size, int64_t stride) { return size == 1 || stride > 0; };
    for (const ImageArg* image : images)
        aligned = aligned && (image->ptr == nullptr || (moves(s.batch, image->batch) && moves(s.groups, image->group) &&
                                                        moves(int64_t{s.height} * s.width, image->token)));
    return aligned ? nullptr
                   : "TMA can't move an image: its address, strides or channels are no multiples of 16 bytes, or a "
                     "stride is 0";
}

// What the note of an op says after the name: which kernel, and why not tensor cores.
void note_kernel(const char* op, const ConvShape& s, const char* why_not) {
    note(op, why_not == nullptr ? "tensor cores" : accesses(s),
         why_not == nullptr ? "" : "; not tensor cores: ", why_not == nullptr ? "" : why_not);
}

void check_conv(const Tensor& x, const Tensor& weight, const OptTensor& bias, int64_t activation) {
    GM_CHECK(x.dim() == 5, "x must be (batch, H, W, G, D), got ", show(shape_of(x)));
    check_parameter(weight, "weight", {x.size(3), x.size(4), 3, 3}, x);
    check_parameter(bias, "bias", {x.size(3), x.size(4)}, x);
    GM_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
}

}  // namespace

void depthwise_conv3x3_fwd_into(const Tensor& y, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                                const CudaContext& context, const DropPathArg& drop_path) {
    check_conv(x, weight, bias, activation);
    check_image(y, "y", shape_of(x), x);
    const DType dtype = dtype_of(x);
    if (y.numel() == 0) return;

    x = canonical_image(x);
    ParamHolder param;
    ConvFwdArgs args;
    args.shape = conv_shape(x, groups_adjacent(x) && groups_adjacent(y), activation);
    ConvShape& s = args.shape;
    args.plan = conv_fwd_plan(s.batch, s.height, s.width, s.groups, s.dim);
    args.x = image_arg(x), args.y = image_arg(y);
    args.weight = param(weight), args.bias = param(bias), args.drop_path = drop_path;
    const int64_t size = static_cast<int64_t>(x.element_size());
    s.aligned = s.dim % kVec == 0 && allows_vectors(args.x, size) && allows_vectors(args.y, size);
    args.sm90 = conv_sm90_plan(s.batch, s.height, s.width, s.groups, s.dim, false);
    const bool vectors = s.dim % kConvBwdVector == 0 && allows_vectors(args.x, size, 16 / size) &&
                         allows_vectors(args.y, size, 16 / size);
    const char* const why_not = why_not_tensor_cores(s, args.sm90, dtype, args.weight, vectors, {&args.x, &args.y},
                                                     has_depthwise_conv_fwd_sm90);
    note_kernel("depthwise_conv3x3 forward: ", s, why_not);
    check_cuda(why_not == nullptr ? launch_depthwise_conv_fwd_sm90(args, dtype, context.stream())
                                  : launch_depthwise_conv_fwd(args, dtype, context.stream()),
               "depthwise_conv3x3 forward");
}

PartialRows conv3x3_bwd_into(const Tensor& dx, Tensor dy, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                             const CudaContext& context, const OptTensor& y, bool sum_dx,
                             const DropPathArg& drop_path) {
    check_conv(x, weight, bias, activation);
    check_image(dy, "dy", shape_of(x), x);
    GM_CHECK(!y || activation != 0, "y without an activation is x's convolution, which is not computed");
    const DType dtype = dtype_of(x);
    check_image(dx, "dx", shape_of(x), x);
    const int64_t channels = x.size(3) * x.size(4);
    ConvBwdArgs args;
    if (sum_dx) ++args.sums;
    if (dx.numel() == 0) return partial_rows(0, channels * args.sums, x);

    x = canonical_image(x), dy = canonical_image(dy);
    ParamHolder param;
    args.shape = conv_shape(
        x, groups_adjacent(x) && groups_adjacent(dy) && groups_adjacent(dx) && (!y || groups_adjacent(*y)), activation);
    ConvShape& s = args.shape;
    args.plan = conv_bwd_plan(s.batch, s.height, s.width, s.groups, s.dim);
    args.dy = image_arg(dy), args.x = image_arg(x), args.dx = image_arg(dx);
    if (y) {
        check_image(*y, "y", shape_of(x), x);
        args.y = image_arg(*y);
    }
    args.weight = param(weight), args.bias = param(bias), args.drop_path = drop_path;
    const int64_t size = static_cast<int64_t>(x.element_size());
    s.aligned = s.dim % kConvBwdVector == 0;
    for (const ImageArg* image : {&args.x, &args.dy, &args.dx, &args.y})
        s.aligned = s.aligned && allows_vectors(*image, size, 16 / size);
    args.sm90 = conv_sm90_plan(s.batch, s.height, s.width, s.groups, s.dim, true);
    const char* const why_not =
        why_not_tensor_cores(s, args.sm90, dtype, args.weight, s.aligned, {&args.x, &args.dy, &args.dx, &args.y},
                             has_depthwise_conv_bwd_sm90);
    const int64_t rows = why_not == nullptr ? args.sm90.partial_rows : args.plan.partial_rows;
    const PartialRows sums = partial_rows(rows, channels * args.sums, x);
    args.partials = static_cast<float*>(sums.values.data_ptr());
    note_kernel("depthwise_conv3x3 backward: ", s, why_not);
    check_cuda(why_not == nullptr ? launch_depthwise_conv_bwd_sm90(args, dtype, context.stream())
                                  : launch_depthwise_conv_bwd(args, dtype, context.stream()),
               "depthwise_conv3x3 backward");
    return sums;
}

namespace {

Tensor depthwise_conv3x3_fwd(Tensor x, Tensor weight, OptTensor bias, int64_t activation) {
    const CudaContext context(x);
    const Tensor y = empty_image_like(x);
    depthwise_conv3x3_fwd_into(y, x, weight, bias, activation, context);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv3x3_bwd(Tensor dy, Tensor x, Tensor weight, OptTensor bias,
                                                         int64_t activation) {
    const CudaContext context(x);
    const Tensor dx = empty_image_like(x);
    const PartialRows sums = conv3x3_bwd_into(dx, dy, x, weight, bias, activation, context);
    const Tensor dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(bias, x);
    reduce_rows(sums, 0, 1, {dweight, dbias}, dtype_of(x), context);
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("depthwise_conv3x3_fwd", TORCH_BOX(&gm::depthwise_conv3x3_fwd));
    m.impl("depthwise_conv3x3_bwd", TORCH_BOX(&gm::depthwise_conv3x3_bwd));
}
