// SPDX-License-Identifier: Apache-2.0
// layer_norm_pool and modulated_layer_norm on CUDA: checks, device guard, allocation, launch. Schemas and layouts:
// csrc/schemas.cpp.
#include "cuda/launch.h"
#include "host/cuda_args.h"
#include "host/stream.h"

namespace gm {
namespace {

void check_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
    GM_CHECK(x.dim() == 4, "x must be (batch, H, W, C), got ", show(shape_of(x)));
    GM_CHECK(x.size(1) * x.size(2) <= INT32_MAX, "H * W must be below 2^31, got ", x.size(1) * x.size(2));
    GM_CHECK(x.size(3) <= INT32_MAX / 8, "C must be below 2^28, got ", x.size(3));
    check_parameter(weight, "weight", {x.size(3)}, x);
    check_parameter(bias, "bias", {x.size(3)}, x);
}

NormShape norm_shape(const Tensor& x, double eps) {
    NormShape shape{};
    shape.batch = x.size(0), shape.tokens = x.size(1) * x.size(2);
    shape.dim = shape.group_dim = static_cast<int>(x.size(3));
    shape.eps = static_cast<float>(eps);
    return shape;
}

template <class... Images>
bool vectors_allowed(int channels, int64_t element_size, const Images&... images) {
    return channels % kVec == 0 && (allows_vectors(images, element_size) && ...);
}

std::tuple<Tensor, Tensor> layer_norm_pool_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
    check_norm(x, weight, bias);
    const DType dtype = dtype_of(x);
    const CudaContext context(x);
    Tensor xn = empty_image_like(x), pooled = empty({x.size(0), x.size(3)}, ScalarType::Float, x);
    if (xn.numel() == 0) {
        torch::stable::zero_(pooled);
        return {xn, pooled};
    }

    x = canonical_image(x);
    ParamHolder param;
    PoolFwdArgs args;
    args.shape = norm_shape(x, eps);
    NormShape& s = args.shape;
    args.plan = norm_plan(s.batch, s.tokens, s.dim, kNormFwdBlocks);
    args.x = image_arg(x), args.xn = image_arg(xn);
    args.weight = param(weight), args.bias = param(bias);
    s.aligned = vectors_allowed(s.dim, static_cast<int64_t>(x.element_size()), args.x, args.xn);
    Tensor partials = empty({s.batch, args.plan.strips, s.dim}, ScalarType::Float, x);
    args.partials = static_cast<float*>(partials.data_ptr());
    check_cuda(launch_layer_norm_pool_fwd(args, dtype, context.stream()), "layer_norm_pool forward");

    ReduceArgs reduce;
    reduce.partials = args.partials;
    reduce.segments = s.batch, reduce.rows = args.plan.strips, reduce.row_stride = reduce.columns = s.dim;
    reduce.factor = 1.f / static_cast<float>(s.tokens);
    reduce.targets[0] = param_out(pooled, pooled), reduce.counts[0] = s.dim;
    check_cuda(launch_reduce_columns(reduce, dtype, context.stream()), "layer_norm_pool sums");
    return {xn, pooled};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_pool_bwd(Tensor dxn, Tensor dpooled, Tensor x, Tensor weight,
                                                       double eps) {
    check_norm(x, weight, std::nullopt);
    check_image(dxn, "dxn", shape_of(x), x);
    check_shape(dpooled, "dpooled", {x.size(0), x.size(3)});
    GM_CHECK(dpooled.scalar_type() == ScalarType::Float, "dpooled must be float32");
    GM_CHECK(dpooled.device() == x.device(), "dpooled is on another device");
    const DType dtype = dtype_of(x);
    const CudaContext context(x);
    Tensor dx = empty_image_like(x), dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(weight, x);
    if (dx.numel() == 0) {
        torch::stable::zero_(dweight), torch::stable::zero_(dbias);
        return {dx, dweight, dbias};
    }

    x = canonical_image(x), dxn = canonical_image(dxn);
    ParamHolder param;
    PoolBwdArgs args;
    args.shape = norm_shape(x, eps);
    NormShape& s = args.shape;
    args.plan = norm_plan(s.batch, s.tokens, s.dim, kNormBwdBlocks);
    args.dxn = image_arg(dxn), args.x = image_arg(x), args.dx = image_arg(dx);
    args.dpooled = static_cast<const float*>(param(dpooled).ptr), args.weight = param(weight);
    s.aligned = vectors_allowed(s.dim, static_cast<int64_t>(x.element_size()), args.dxn, args.x, args.dx);
    const int64_t columns = 2 * static_cast<int64_t>(s.dim);
    Tensor partials = empty({s.batch, args.plan.strips, columns}, ScalarType::Float, x);
    args.partials = static_cast<float*>(partials.data_ptr());
    check_cuda(launch_layer_norm_pool_bwd(args, dtype, context.stream()), "layer_norm_pool backward");

    ReduceArgs reduce;
    reduce.partials = args.partials;
    reduce.rows = s.batch * args.plan.strips, reduce.row_stride = reduce.columns = columns;
    reduce.targets[0] = param_out(dweight, weight), reduce.targets[1] = param_out(dbias, weight);
    reduce.counts[0] = reduce.counts[1] = s.dim;
    check_cuda(launch_reduce_columns(reduce, dtype, context.stream()), "layer_norm_pool parameter sums");
    return {dx, dweight, dbias};
}

void check_modulated(const Tensor& o, const Tensor& x, const Tensor& scale, const OptTensor& gate, const Tensor& weight,
                     const OptTensor& bias) {
    check_norm(x, weight, bias);
    GM_CHECK(o.dim() == 5 && o.size(3) * o.size(4) == x.size(3),
             "o must be (batch, H, W, G, D) with G * D = ", x.size(3), ", got ", show(shape_of(o)));
    check_image(o, "o", {x.size(0), x.size(1), x.size(2), o.size(3), o.size(4)}, x);
    check_parameter(scale, "scale", {1}, x);
    check_parameter(gate, "gate", {x.size(0), x.size(3)}, x);
}

Tensor modulated_layer_norm_fwd(Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight, Tensor bias,
                                double eps) {
    check_modulated(o, x, scale, gate, weight, bias);
    const DType dtype = dtype_of(x);
    const CudaContext context(x);
    Tensor y = empty_image_like(x);
    if (y.numel() == 0) return y;

    o = canonical_image(o), x = canonical_image(x);
    ParamHolder param;
    ModulatedFwdArgs args;
    args.shape = norm_shape(x, eps);
    NormShape& s = args.shape;
    s.group_dim = static_cast<int>(o.size(4));
    args.plan = norm_plan(s.batch, s.tokens, s.dim, kNormFwdBlocks);
    args.o = image_arg(o), args.x = image_arg(x), args.y = image_arg(y);
    args.scale = param(scale), args.gate = param(gate), args.weight = param(weight), args.bias = param(bias);
    const int64_t size = static_cast<int64_t>(x.element_size());
    s.aligned = vectors_allowed(s.dim, size, args.x, args.y);
    s.o_aligned = vectors_allowed(s.group_dim, size, args.o);
    check_cuda(launch_modulated_layer_norm_fwd(args, dtype, context.stream()), "modulated_layer_norm forward");
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x,
                                                                                    Tensor scale, OptTensor gate,
                                                                                    Tensor weight, double eps) {
    check_modulated(o, x, scale, gate, weight, std::nullopt);
    check_image(dy, "dy", shape_of(x), x);
    const DType dtype = dtype_of(x);
    const CudaContext context(x);
    Tensor d_o = empty_image_like(o), dx = empty_image_like(x);
    Tensor dscale = empty_like_or_absent(scale, x), dgate = empty_like_or_absent(gate, x);
    Tensor dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(weight, x);
    if (dx.numel() == 0) {
        for (Tensor* t : {&dscale, &dgate, &dweight, &dbias}) torch::stable::zero_(*t);
        return {d_o, dx, dscale, dgate, dweight, dbias};
    }

    dy = canonical_image(dy), o = canonical_image(o), x = canonical_image(x);
    ParamHolder param;
    ModulatedBwdArgs args;
    args.shape = norm_shape(x, eps);
    NormShape& s = args.shape;
    s.group_dim = static_cast<int>(o.size(4));
    args.plan = norm_plan(s.batch, s.tokens, s.dim, kNormBwdBlocks, kMaxModulatedBwdVecs);
    args.dy = image_arg(dy), args.o = image_arg(o), args.x = image_arg(x);
    args.d_o = image_arg(d_o), args.dx = image_arg(dx);
    args.scale = param(scale), args.gate = param(gate), args.weight = param(weight);
    const int64_t size = static_cast<int64_t>(x.element_size()), columns = 3 * static_cast<int64_t>(s.dim) + 1;
    s.aligned = vectors_allowed(s.dim, size, args.dy, args.x, args.dx);
    s.o_aligned = vectors_allowed(s.group_dim, size, args.o, args.d_o);
    Tensor partials = empty({s.batch, args.plan.strips, columns}, ScalarType::Float, x);
    args.partials = static_cast<float*>(partials.data_ptr());
    check_cuda(launch_modulated_layer_norm_bwd(args, dtype, context.stream()), "modulated_layer_norm backward");

    ReduceArgs reduce;
    reduce.partials = args.partials;
    reduce.rows = s.batch * args.plan.strips, reduce.row_stride = columns;
    reduce.targets[0] = param_out(dweight, weight), reduce.targets[1] = param_out(dbias, weight);
    reduce.targets[2] = param_out(dscale, scale);
    reduce.counts[0] = reduce.counts[1] = s.dim, reduce.counts[2] = 1;
    reduce.columns = columns - s.dim;
    check_cuda(launch_reduce_columns(reduce, dtype, context.stream()), "modulated_layer_norm parameter sums");
    if (gate) {
        ReduceArgs by_image;
        by_image.partials = args.partials + reduce.columns;
        by_image.segments = s.batch, by_image.rows = args.plan.strips, by_image.row_stride = columns;
        by_image.targets[0] = param_out(dgate, gate), by_image.columns = by_image.counts[0] = s.dim;
        check_cuda(launch_reduce_columns(by_image, dtype, context.stream()), "modulated_layer_norm gate sums");
    }
    return {d_o, dx, dscale, dgate, dweight, dbias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("layer_norm_pool_fwd", TORCH_BOX(&gm::layer_norm_pool_fwd));
    m.impl("layer_norm_pool_bwd", TORCH_BOX(&gm::layer_norm_pool_bwd));
    m.impl("modulated_layer_norm_fwd", TORCH_BOX(&gm::modulated_layer_norm_fwd));
    m.impl("modulated_layer_norm_bwd", TORCH_BOX(&gm::modulated_layer_norm_bwd));
}
