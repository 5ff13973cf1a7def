// SPDX-License-Identifier: Apache-2.0
// layer_norm_pool and modulated_layer_norm on CUDA: checks, device guard, allocation, launch. Schemas and layouts:
// csrc/schemas.cpp.
#include "cuda/layer_norm/launch.h"
#include "cuda/parameters/launch.h"
#include "host/cuda_args.h"
#include "host/stream.h"
#include "ops/entries_cuda.h"

namespace gm {
namespace {

// An image (batch, H, W, C), or (batch, H, W, G, width) with D channels a group followed by zeros.
struct NormSizes {
    int64_t batch, height, width, channels, groups;
    int64_t group_dim() const { return groups > 0 ? channels / groups : 0; }
};

NormSizes norm_sizes(const Tensor& image, const char* name, const Tensor& weight, int64_t groups) {
    GM_CHECK(weight.dim() == 1, "weight must be (C,), got ", show(shape_of(weight)));
    const NormSizes s{image.size(0), image.size(1), image.size(2), weight.size(0), groups};
    GM_CHECK(s.height * s.width <= INT32_MAX, "H * W must be below 2^31, got ", s.height * s.width);
    GM_CHECK(s.channels <= INT32_MAX / 8, "C must be below 2^28, got ", s.channels);
    GM_CHECK(groups > 0 ? s.channels % groups == 0 : s.channels == 0, name, " has ", groups,
             " groups, which do not divide ", s.channels, " channels");
    return s;
}

void check_norm_image(const Tensor& t, const char* name, const NormSizes& s, const Tensor& like) {
    const Shape plain{s.batch, s.height, s.width, s.channels};
    if (t.dim() == 5) {
        const int64_t width = t.size(4);
        GM_CHECK(width >= s.group_dim(), name, " must have at least ", s.group_dim(), " channels a group, got ", width);
        check_image(t, name, {s.batch, s.height, s.width, s.groups, width}, like);
    } else {
        check_image(t, name, plain, like);
    }
}

// `t` must be canonical.
NormImage norm_image(const Tensor& t, const NormSizes& s) {
    NormImage image;
    static_cast<ImageArg&>(image) = image_arg(t);
    image.width = static_cast<int>(t.dim() == 5 ? t.size(4) : s.group_dim());
    image.group = s.groups == 1 ? 0 : t.dim() == 5 ? t.stride(3) : s.group_dim();
    image.aligned = image.width % kVec == 0 && allows_vectors(image, static_cast<int64_t>(t.element_size()));
    return image;
}

// An image that the kernel writes, with pixels padded or not: zeros go after their channels.
NormImage padded_norm_image(const Tensor& t, const NormSizes& s) {
    NormImage image = norm_image(t, s);
    if (t.dim() == 4) image.tail = static_cast<int>(std::min<int64_t>(image.token - s.channels, kPixelUnit - 1));
    return image;
}

// Where a kernel writes `t`. It must have the layout of `like`, and is written by the same accesses by which `like`,
// described by `image`, is read.
void* place_like(const Tensor& t, const char* name, const Tensor& like, NormImage& image, const NormSizes& s) {
    check_image(t, name, shape_of(like), like);
    for (int64_t d = 0; d < like.dim(); ++d)
        GM_CHECK(t.stride(d) == like.stride(d), name, " must have the strides of its gradient");
    image.aligned = image.aligned && norm_image(t, s).aligned;
    return t.data_ptr();
}

template <class... Images>
NormShape norm_shape(const NormSizes& s, double eps, const Images&... images) {
    NormShape shape{};
    shape.batch = s.batch, shape.tokens = s.height * s.width;
    shape.dim = static_cast<int>(s.channels);
    shape.groups = static_cast<int>(s.groups), shape.group_dim = static_cast<int>(s.group_dim());
    shape.group_width = (std::max({shape.group_dim, images.width...}) + kVec - 1) / kVec * kVec;
    shape.eps = static_cast<float>(eps);
    return shape;
}

void check_biased(const OptTensor& x_bias, const NormPlan& plan, const NormSizes& s) {
    GM_CHECK(!x_bias || (plan.vecs > 0 && sums_dx_more(plan.vecs)), "x_bias takes up to ", kBiasedChannels,
             " channels, got ", s.channels);
}

}  // namespace

int64_t norm_strips(int64_t batch, int64_t tokens, int64_t groups, int64_t width) {
    const int64_t slots = groups * round_up(width, kVec);
    return norm_plan(batch, tokens, static_cast<int>(slots), NormPass::kForward).strips;
}

void layer_norm_pool_fwd_into(const Tensor& xn, NormPoolInputs in, const CudaContext& context) {
    Tensor& x = in.x;
    GM_CHECK(x.dim() == 4, "x must be (batch, H, W, C), got ", show(shape_of(x)));
    const NormSizes sizes = norm_sizes(x, "xn", in.weight, xn.dim() == 5 ? xn.size(3) : 1);
    check_norm_image(x, "x", sizes, x);
    check_norm_image(xn, "xn", sizes, x);
    check_parameter(in.weight, "weight", {sizes.channels}, x);
    check_parameter(in.bias, "bias", {sizes.channels}, x);
    check_parameter(in.sum_bias, "sum_bias", {sizes.channels}, x);
    check_parameter(in.x_bias, "x_bias", {sizes.channels}, x);
    GM_CHECK(!in.x_bias || !in.sum, "x_bias and sum do not go together");
    if (in.sum) check_norm_image(*in.sum, "sum", sizes, x);
    const DType dtype = dtype_of(x);
    if (x.numel() == 0) return;

    x = canonical_image(x);
    ParamHolder param;
    PoolFwdArgs args;
    args.x = norm_image(x, sizes), args.xn = norm_image(xn, sizes);
    if (in.sum) args.sum = padded_norm_image(*in.sum, sizes);
    args.shape = norm_shape(sizes, in.eps, args.x, args.xn);
    const NormShape& s = args.shape;
    args.plan = norm_plan(s.batch, s.tokens, s.slots(), NormPass::kForward);
    args.weight = param(in.weight), args.bias = param(in.bias), args.sum_bias = param(in.sum_bias);
    args.x_bias = param(in.x_bias), args.drop_path = in.drop_path;
    check_biased(in.x_bias, args.plan, sizes);
    if (in.partials) {
        check_shape(*in.partials, "partials", {s.batch, args.plan.strips, sizes.channels});
        args.partials = static_cast<float*>(in.partials->data_ptr());
    }
    if (in.inter_block_state) {
        GM_CHECK(is_float(*in.inter_block_state) && in.inter_block_state->is_contiguous() &&
                     same_device(*in.inter_block_state, x),
                 "inter_block_state must be contiguous, float32 and on the device of x");
        args.inter_block_state = static_cast<float*>(in.inter_block_state->data_ptr()),
        args.inter_block_floats = in.inter_block_state->numel();
    }
    check_cuda(launch_layer_norm_pool_fwd(args, dtype, context.stream()), "layer_norm_pool forward");
}

NormPoolResult layer_norm_pool_bwd(NormPoolGradients gradients, Tensor x, Tensor weight, double eps,
                                   const CudaContext& context) {
    auto& [dxn, dxn_more, dpooled, dx_more, padded, xn, bias, drop_path, x_bias] = gradients;
    GM_CHECK(x.dim() == 4, "x must be (batch, H, W, C), got ", show(shape_of(x)));
    const NormSizes sizes = norm_sizes(x, "dxn", weight, dxn.dim() == 5 ? dxn.size(3) : 1);
    check_norm_image(x, "x", sizes, x);
    check_norm_image(dxn, "dxn", sizes, x);
    if (dxn_more) check_norm_image(*dxn_more, "dxn_more", sizes, x);
    if (dx_more) check_norm_image(*dx_more, "dx_more", sizes, x);
    check_parameter(weight, "weight", {sizes.channels}, x);
    check_parameter(bias, "bias", {sizes.channels}, x);
    GM_CHECK(xn.has_value() == bias.has_value(), "xn and bias go together");
    check_parameter(x_bias, "x_bias", {sizes.channels}, x);
    GM_CHECK(!x_bias || (!dx_more && !xn), "x_bias goes with neither dx_more nor xn");
    if (dpooled) {
        check_shape(*dpooled, "dpooled", {sizes.batch, sizes.channels});
        GM_CHECK(dpooled->scalar_type() == ScalarType::Float, "dpooled must be float32");
        GM_CHECK(dpooled->device() == x.device(), "dpooled is on another device");
    }
    const DType dtype = dtype_of(x);
    Tensor dx =
        padded ? empty_padded_image(sizes.batch, sizes.height, sizes.width, sizes.channels, x) : empty_image_like(x);
    if (dx.numel() == 0) return {dx, partial_rows(0, (x_bias ? 3 : 2) * sizes.channels, x), false};

    x = canonical_image(x), dxn = canonical_image(dxn);
    ParamHolder param;
    PoolBwdArgs args;
    args.dxn = norm_image(dxn, sizes), args.x = norm_image(x, sizes), args.dx = padded_norm_image(dx, sizes);
    const auto optional_image = [&](OptTensor& t, NormImage& image) {
        if (!t) return;
        t = canonical_image(*t);
        image = norm_image(*t, sizes);
    };
    optional_image(dxn_more, args.dxn_more), optional_image(dx_more, args.dx_more);
    if (xn) args.xn = place_like(*xn, "xn", dxn, args.dxn, sizes);
    args.shape = norm_shape(sizes, eps, args.dxn, args.dxn_more, args.x);
    const NormShape& s = args.shape;
    args.plan = norm_plan(s.batch, s.tokens, s.slots(), NormPass::kBackward);
    if (xn && !writes_xn(args.plan.vecs)) {
        layer_norm_pool_fwd_into(*xn, {x, weight, *bias, eps}, context);
        args.xn = nullptr;
    }
    if (dpooled) args.dpooled = static_cast<const float*>(param(dpooled).ptr);
    args.weight = param(weight), args.bias = param(bias), args.x_bias = param(x_bias), args.drop_path = drop_path;
    check_biased(x_bias, args.plan, sizes);
    args.sum_dx_more = dx_more && sums_dx_more(args.plan.vecs);
    const int64_t columns = (args.sum_dx_more || x_bias ? 3 : 2) * static_cast<int64_t>(s.dim);
    const PartialRows sums = partial_rows(s.batch * args.plan.strips, columns, x);
    args.partials = static_cast<float*>(sums.values.data_ptr());
    check_cuda(launch_layer_norm_pool_bwd(args, dtype, context.stream()), "layer_norm_pool backward");
    return {dx, sums, args.sum_dx_more};
}

namespace {

NormSizes check_modulated(const Tensor& o, const Tensor& x, const Tensor& scale, const OptTensor& gate,
                          const Tensor& weight, const OptTensor& bias) {
    GM_CHECK(o.dim() == 5, "o must be (batch, H, W, G, D), got ", show(shape_of(o)));
    const NormSizes s = norm_sizes(o, "o", weight, o.size(3));
    check_norm_image(o, "o", s, x);
    check_norm_image(x, "x", s, x);
    check_parameter(scale, "scale", {1}, x);
    check_parameter(gate, "gate", {s.batch, s.channels}, x);
    check_parameter(weight, "weight", {s.channels}, x);
    check_parameter(bias, "bias", {s.channels}, x);
    return s;
}

}  // namespace

void modulated_layer_norm_fwd_into(const Tensor& y, Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight,
                                   Tensor bias, double eps, const CudaContext& context, const DropPathArg& drop_path) {
    const NormSizes sizes = check_modulated(o, x, scale, gate, weight, bias);
    check_norm_image(y, "y", sizes, x);
    const DType dtype = dtype_of(x);
    if (y.numel() == 0) return;

    o = canonical_image(o), x = canonical_image(x);
    ParamHolder param;
    ModulatedFwdArgs args;
    args.o = norm_image(o, sizes), args.x = norm_image(x, sizes), args.y = norm_image(y, sizes);
    args.shape = norm_shape(sizes, eps, args.o, args.x, args.y);
    const NormShape& s = args.shape;
    args.plan = norm_plan(s.batch, s.tokens, s.slots(), NormPass::kForward);
    args.drop_path = drop_path;
    args.scale = param(scale), args.gate = param(gate), args.weight = param(weight), args.bias = param(bias);
    check_cuda(launch_modulated_layer_norm_fwd(args, dtype, context.stream()), "modulated_layer_norm forward");
}

ModulatedGradients modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight,
                                            double eps, const CudaContext& context, const OptTensor& y,
                                            const OptTensor& bias) {
    const NormSizes sizes = check_modulated(o, x, scale, gate, weight, bias);
    GM_CHECK(y.has_value() == bias.has_value(), "y and bias go together");
    check_norm_image(dy, "dy", sizes, x);
    const DType dtype = dtype_of(x);
    Tensor d_o = empty_image_like(o), dx = empty_image_like(x);
    const int64_t columns = 3 * sizes.channels + 1;
    if (dx.numel() == 0) return {d_o, dx, partial_rows(0, columns, x)};

    dy = canonical_image(dy), o = canonical_image(o), x = canonical_image(x);
    ParamHolder param;
    ModulatedBwdArgs args;
    args.dy = norm_image(dy, sizes), args.o = norm_image(o, sizes), args.x = norm_image(x, sizes);
    args.d_o = norm_image(d_o, sizes), args.dx = norm_image(dx, sizes);
    if (y) args.y = place_like(*y, "y", dy, args.dy, sizes);
    args.shape = norm_shape(sizes, eps, args.dy, args.o, args.x);
    const NormShape& s = args.shape;
    args.plan = norm_plan(s.batch, s.tokens, s.slots(), NormPass::kBackward, kRowVecs);
    args.scale = param(scale), args.gate = param(gate), args.weight = param(weight), args.bias = param(bias);
    const PartialRows sums = partial_rows(s.batch * args.plan.strips, columns, x);
    args.partials = static_cast<float*>(sums.values.data_ptr());
    check_cuda(launch_modulated_layer_norm_bwd(args, dtype, context.stream()), "modulated_layer_norm backward");
    return {d_o, dx, sums};
}

void reduce_rows(const PartialRows& partials, int64_t first, int64_t segments, const std::vector<Tensor>& targets,
                 DType dtype, const CudaContext& context, float factor) {
    GM_CHECK(targets.size() <= kReduceTargets, "too many targets for one launch");
    if (segments == 0) return;
    ReduceArgs args;
    args.partials = partials.column(first);
    args.segments = segments, args.rows = partials.rows / segments, args.row_stride = partials.columns;
    args.factor = factor;
    for (size_t i = 0; i < targets.size(); ++i) {
        args.targets[i] = param_out(targets[i], targets[i]);
        args.counts[i] = targets[i].numel() / segments;
        args.columns += args.counts[i];
    }
    check_cuda(launch_reduce_columns(args, dtype, context.stream()), "sums");
}

namespace {

std::tuple<Tensor, Tensor> pool_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
    GM_CHECK(x.dim() == 4, "x must be (batch, H, W, C), got ", show(shape_of(x)));
    const CudaContext context(x);
    const int64_t batch = x.size(0), tokens = x.size(1) * x.size(2), channels = x.size(3);
    const Tensor xn = empty_image_like(x);
    Tensor pooled = empty({batch, channels}, ScalarType::Float, x);
    const int64_t strips = norm_strips(batch, tokens, 1, channels);
    const Tensor partials = empty({batch, strips, channels}, ScalarType::Float, x);
    layer_norm_pool_fwd_into(xn, {x, weight, bias, eps, partials}, context);
    if (x.numel() == 0) {
        torch::stable::zero_(pooled);
        return {xn, pooled};
    }
    reduce_rows({partials, batch * strips, channels}, 0, batch, {pooled}, dtype_of(x), context,
                1.f / static_cast<float>(tokens));
    return {xn, pooled};
}

std::tuple<Tensor, Tensor, Tensor> summed(const NormPoolResult& result, const Tensor& weight, const Tensor& bias,
                                          const CudaContext& context, std::vector<Tensor> more = {}) {
    check_parameter(bias, "bias", shape_of(weight), result.dx);
    const Tensor dweight = empty_like_or_absent(weight, weight), dbias = empty_like_or_absent(bias, weight);
    more.insert(more.begin(), {dweight, dbias});
    reduce_rows(result.sums, 0, 1, more, dtype_of(result.dx), context);
    return {result.dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> pool_bwd(Tensor dxn, Tensor dpooled, Tensor x, Tensor weight, Tensor bias,
                                            double eps) {
    GM_CHECK(dxn.dim() == 4, "dxn must be (batch, H, W, C), got ", show(shape_of(dxn)));
    const CudaContext context(x);
    return summed(layer_norm_pool_bwd({dxn, std::nullopt, dpooled}, x, weight, eps, context), weight, bias, context);
}

Tensor token_norm_fwd(Tensor x, OptTensor x_bias, Tensor weight, Tensor bias, double eps) {
    const CudaContext context(x);
    const Tensor xn = empty_image_like(x);
    NormPoolInputs inputs{x, weight, bias, eps};
    inputs.x_bias = x_bias;
    layer_norm_pool_fwd_into(xn, inputs, context);
    return xn;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_norm_bwd(Tensor dy, Tensor x, OptTensor x_bias, Tensor weight,
                                                          Tensor bias, double eps) {
    GM_CHECK(dy.dim() == 4, "dy must be (batch, H, W, C), got ", show(shape_of(dy)));
    const CudaContext context(x);
    NormPoolGradients gradients{dy};
    gradients.x_bias = x_bias;
    const NormPoolResult result = layer_norm_pool_bwd(gradients, x, weight, eps, context);
    const Tensor dx_bias = empty_like_or_absent(x_bias, x);
    std::vector<Tensor> more;
    if (x_bias) more.push_back(dx_bias);
    const auto [dx, dweight, dbias] = summed(result, weight, bias, context, more);
    return {dx, dweight, dbias, dx_bias};
}

Tensor modulated_fwd(Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight, Tensor bias, double eps) {
    GM_CHECK(x.dim() == 4, "x must be (batch, H, W, C), got ", show(shape_of(x)));
    const CudaContext context(x);
    const Tensor y = empty(shape_of(x), x.scalar_type(), x);
    modulated_layer_norm_fwd_into(y, o, x, scale, gate, weight, bias, eps, context);
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_bwd(Tensor dy, Tensor o, Tensor x, Tensor scale,
                                                                         OptTensor gate, Tensor weight, Tensor bias,
                                                                         double eps) {
    const CudaContext context(x);
    check_parameter(bias, "bias", shape_of(weight), x);
    const ModulatedGradients g = modulated_layer_norm_bwd(dy, o, x, scale, gate, weight, eps, context);
    const DType dtype = dtype_of(x);
    const Tensor dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(bias, x);
    const Tensor dscale = empty_like_or_absent(scale, x), dgate = empty_like_or_absent(gate, x);
    reduce_rows(g.sums, 0, 1, {dweight, dbias, dscale}, dtype, context);
    if (gate) reduce_rows(g.sums, 2 * weight.numel() + 1, x.size(0), {dgate}, dtype, context);
    return {g.d_o, g.dx, dscale, dgate, dweight, dbias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("layer_norm_pool_fwd", TORCH_BOX(&gm::pool_fwd));
    m.impl("layer_norm_pool_bwd", TORCH_BOX(&gm::pool_bwd));
    m.impl("token_norm_fwd", TORCH_BOX(&gm::token_norm_fwd));
    m.impl("token_norm_bwd", TORCH_BOX(&gm::token_norm_bwd));
    m.impl("modulated_layer_norm_fwd", TORCH_BOX(&gm::modulated_fwd));
    m.impl("modulated_layer_norm_bwd", TORCH_BOX(&gm::modulated_bwd));
}
