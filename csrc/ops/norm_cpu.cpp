// SPDX-License-Identifier: Apache-2.0
// layer_norm_pool and modulated_layer_norm on the CPU: checks, allocation, threads over blocks of tokens. Schemas and
// layouts: csrc/schemas.cpp.
#include "cpu/norm.h"
#include "host/cpu_args.h"

namespace gm {
namespace {

// Tokens that one thread takes at a time; from the shape alone, since blocks set the order of the sums.
int64_t block_tokens(int64_t channels) { return std::clamp<int64_t>(16384 / std::max<int64_t>(channels, 1), 8, 64); }

cpu::NormPoolParams pool_params(const Tensor& x, const Tensor& weight, const OptTensor& bias, double eps,
                                cpu::ParameterRows& rows) {
    cpu::NormPoolParams p{};
    p.dtype = cpu::dtype_of(x);
    p.batch = x.size(0), p.tokens = x.size(1) * x.size(2), p.dim = x.size(3), p.padded = cpu::padded_row(p.dim);
    p.block = block_tokens(p.dim), p.blocks = (p.tokens + p.block - 1) / p.block;
    p.eps = eps;
    p.x = cpu::const_image(x);
    p.weight = rows(weight, 1, p.dim, int64_t{1});
    p.bias = rows(bias, 1, p.dim, 0.0);
    return p;
}

void check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    GM_CHECK(x.dim() == 4, "x must be (batch, H, W, C), got ", show(shape_of(x)));
    check_parameter(weight, "weight", {x.size(3)}, x);
    check_parameter(bias, "bias", {x.size(3)}, x);
}

std::tuple<Tensor, Tensor> layer_norm_pool_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
    check_norm(x, weight, bias);
    Tensor xn = empty_image_like(x);
    Tensor pooled = empty({x.size(0), x.size(3)}, accumulate_type(x.scalar_type()), x);
    if (pooled.numel() == 0) return {xn, pooled};
    x = canonical_image(x);
    cpu::ParameterRows rows(x);
    const cpu::NormPoolParams p = pool_params(x, weight, bias, eps, rows);
    const cpu::PartialSums partials(p.batch * p.blocks, p.padded);
    const cpu::NormPoolOutputs out{cpu::image(xn), partials.data()};
    const auto kernel = GM_CPU_KERNEL(layer_norm_pool_fwd);
    const int64_t scratch = GM_CPU_KERNEL(norm_scratch)(p.dtype, p.padded);
    cpu::for_items(p.batch * p.blocks, p.block * p.dim, scratch,
                   [&](int64_t item, void* memory) { kernel(p, out, item / p.blocks, item % p.blocks, memory); });
    for (int64_t b = 0; b < p.batch; ++b) {
        std::vector<double> mean = partials.total(b * p.blocks, p.blocks);
        for (double& v : mean) v /= static_cast<double>(std::max<int64_t>(p.tokens, 1));
        cpu::store_sums(mean.data(), 1, 0, pooled, 1, p.dim, 1, b * p.dim);
    }
    return {xn, pooled};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_pool_bwd(Tensor dxn, Tensor dpooled, Tensor x, Tensor weight, Tensor bias,
                                                       double eps) {
    check_norm(x, weight, bias);
    check_image(dxn, "dxn", shape_of(x), x);
    check_shape(dpooled, "dpooled", {x.size(0), x.size(3)});
    GM_CHECK(dpooled.scalar_type() == accumulate_type(x.scalar_type()),
             "dpooled must be float32 (float64 for float64)");
    GM_CHECK(same_device(dpooled, x), "dpooled is on another device");
    Tensor dx = empty_image_like(x), dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(bias, x);
    x = canonical_image(x), dxn = canonical_image(dxn);
    cpu::ParameterRows rows(x);
    const cpu::NormPoolParams p = pool_params(x, weight, std::nullopt, eps, rows);
    const cpu::PartialSums partials(p.batch * p.blocks, 2 * p.padded);
    const cpu::NormPoolGradients grads{cpu::const_image(dxn), rows(dpooled, p.batch, p.dim, int64_t{1}), cpu::image(dx),
                                       partials.data()};
    const auto kernel = GM_CPU_KERNEL(layer_norm_pool_bwd);
    const int64_t scratch = GM_CPU_KERNEL(norm_scratch)(p.dtype, p.padded);
    cpu::for_items(p.batch * p.blocks, p.block * p.dim, scratch,
                   [&](int64_t item, void* memory) { kernel(p, grads, item / p.blocks, item % p.blocks, memory); });
    const std::vector<double> sums = partials.total();
    cpu::store_sums(sums.data(), 2, 0, dweight, 1, p.dim, 1);
    cpu::store_sums(sums.data(), 2, 1, dbias, 1, p.dim, 1);
    return {dx, dweight, dbias};
}

void check_modulated(const Tensor& o, const Tensor& x, const Tensor& scale, const OptTensor& gate, const Tensor& weight,
                     const Tensor& bias) {
    check_norm(x, weight, bias);
    GM_CHECK(o.dim() == 5 && o.size(3) * o.size(4) == x.size(3),
             "o must be (batch, H, W, G, D) with G * D = ", x.size(3), ", got ", show(shape_of(o)));
    check_image(o, "o", {x.size(0), x.size(1), x.size(2), o.size(3), o.size(4)}, x);
    check_parameter(scale, "scale", {1}, x);
    check_parameter(gate, "gate", {x.size(0), x.size(3)}, x);
}

// `merge` where the groups of a pixel follow one another, so that they are one.
cpu::ModulatedNormParams modulated_params(const Tensor& o, const Tensor& x, const Tensor& scale, const OptTensor& gate,
                                          const Tensor& weight, const OptTensor& bias, double eps, bool merge,
                                          cpu::ParameterRows& rows) {
    cpu::ModulatedNormParams p{};
    const int64_t channels = x.size(3);
    p.dtype = cpu::dtype_of(x);
    p.batch = x.size(0), p.tokens = x.size(1) * x.size(2);
    p.groups = merge ? 1 : o.size(3), p.dim = merge ? channels : o.size(4);
    p.padded = cpu::padded_row(channels);
    p.block = block_tokens(channels), p.blocks = (p.tokens + p.block - 1) / p.block;
    p.eps = eps;
    const void* factor = rows(scale, 1, 1, int64_t{1});
    p.scale = p.dtype == cpu::DType::kDouble ? *static_cast<const double*>(factor) : *static_cast<const float*>(factor);
    p.o = cpu::const_image(o), p.x = cpu::const_image(x);
    p.weight = rows(weight, 1, channels, int64_t{1});
    p.bias = rows(bias, 1, channels, 0.0);
    p.gate = rows(gate, p.batch, channels, 1.0);
    return p;
}

bool groups_adjacent(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == t.size(4); }

Tensor modulated_layer_norm_fwd(Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight, Tensor bias,
                                double eps) {
    check_modulated(o, x, scale, gate, weight, bias);
    Tensor y = empty_image_like(x);
    if (y.numel() == 0) return y;
    o = canonical_image(o), x = canonical_image(x);
    cpu::ParameterRows rows(x);
    const cpu::ModulatedNormParams p = modulated_params(o, x, scale, gate, weight, bias, eps, groups_adjacent(o), rows);
    const cpu::Image out = cpu::image(y);
    const auto kernel = GM_CPU_KERNEL(modulated_layer_norm_fwd);
    const int64_t scratch = GM_CPU_KERNEL(norm_scratch)(p.dtype, p.padded);
    cpu::for_items(p.batch * p.blocks, p.block * x.size(3), scratch,
                   [&](int64_t item, void* memory) { kernel(p, out, item / p.blocks, item % p.blocks, memory); });
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x,
                                                                                    Tensor scale, OptTensor gate,
                                                                                    Tensor weight, Tensor bias,
                                                                                    double eps) {
    check_modulated(o, x, scale, gate, weight, bias);
    check_image(dy, "dy", shape_of(x), x);
    Tensor d_o = empty_image_like(o), dx = empty_image_like(x);
    Tensor dscale = empty_like_or_absent(scale, x), dgate = empty_like_or_absent(gate, x);
    Tensor dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(bias, x);
    if (x.size(3) == 0) {  // the sums have no row for dscale then
        torch::stable::zero_(dscale);
        return {d_o, dx, dscale, dgate, dweight, dbias};
    }
    dy = canonical_image(dy), o = canonical_image(o), x = canonical_image(x);
    cpu::ParameterRows rows(x);
    const cpu::ModulatedNormParams p = modulated_params(o, x, scale, gate, weight, std::nullopt, eps,
                                                        groups_adjacent(o) && groups_adjacent(d_o), rows);
    const cpu::PartialSums partials(p.batch * p.blocks, 4 * p.padded);
    const cpu::ModulatedNormGradients grads{cpu::const_image(dy), cpu::image(d_o), cpu::image(dx), partials.data()};
    const auto kernel = GM_CPU_KERNEL(modulated_layer_norm_bwd);
    const int64_t scratch = GM_CPU_KERNEL(norm_scratch)(p.dtype, p.padded);
    const int64_t channels = x.size(3);
    cpu::for_items(p.batch * p.blocks, p.block * channels, scratch,
                   [&](int64_t item, void* memory) { kernel(p, grads, item / p.blocks, item % p.blocks, memory); });
    const std::vector<double> sums = partials.total();
    cpu::store_sums(sums.data(), 4, 0, dweight, 1, channels, 1);
    cpu::store_sums(sums.data(), 4, 1, dbias, 1, channels, 1);
    cpu::store_sums(sums.data() + 3 * p.padded, 1, 0, dscale, 1, 1, 1);
    for (int64_t b = 0; gate && b < p.batch; ++b) {
        const std::vector<double> sum = partials.total(b * p.blocks, p.blocks);
        cpu::store_sums(sum.data(), 4, 2, dgate, 1, channels, 1, b * channels);
    }
    return {d_o, dx, dscale, dgate, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CPU, m) {
    m.impl("layer_norm_pool_fwd", TORCH_BOX(&layer_norm_pool_fwd));
    m.impl("layer_norm_pool_bwd", TORCH_BOX(&layer_norm_pool_bwd));
    m.impl("modulated_layer_norm_fwd", TORCH_BOX(&modulated_layer_norm_fwd));
    m.impl("modulated_layer_norm_bwd", TORCH_BOX(&modulated_layer_norm_bwd));
}

}  // namespace gm
