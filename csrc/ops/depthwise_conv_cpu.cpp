// SPDX-License-Identifier: Apache-2.0
// depthwise_conv3x3 on the CPU: checks, allocation, threads over images and tiles of them. Schemas and layouts:
// csrc/schemas.cpp.
#include "cpu/depthwise_conv.h"
#include "host/cpu_args.h"

namespace gm {
namespace {

void check_conv(const Tensor& x, const Tensor& weight, const OptTensor& bias, int64_t activation) {
    GM_CHECK(x.dim() == 5, "x must be (batch, H, W, G, D), got ", show(shape_of(x)));
    check_parameter(weight, "weight", {x.size(3), x.size(4), 3, 3}, x);
    check_parameter(bias, "bias", {x.size(3), x.size(4)}, x);
    GM_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
}

// Params of canonical images; `merge` where the groups of a pixel follow one another in all of them, so that the image
// is one group of G * D channels.
cpu::ConvParams conv_params(const Tensor& x, const Tensor& weight, const OptTensor& bias, int64_t activation,
                            bool merge, cpu::ParameterRows& rows) {
    cpu::ConvParams p{};
    p.dtype = cpu::dtype_of(x);
    p.batch = x.size(0), p.height = x.size(1), p.width = x.size(2);
    p.groups = merge ? 1 : x.size(3);
    p.dim = merge ? x.size(3) * x.size(4) : x.size(4);
    p.padded = cpu::padded_row(p.dim);
    p.activation = static_cast<cpu::Activation>(activation);
    p.x = cpu::const_image(x);
    p.weight = rows(weight, p.groups, p.dim, int64_t{9});
    p.bias = rows(bias, p.groups, p.dim, 0.0);
    return p;
}

bool groups_adjacent(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == t.size(4); }

Tensor depthwise_conv3x3_fwd(Tensor x, Tensor weight, OptTensor bias, int64_t activation) {
    check_conv(x, weight, bias, activation);
    Tensor y = empty_image_like(x);
    if (y.numel() == 0) return y;
    x = canonical_image(x);
    cpu::ParameterRows rows(x);
    const cpu::ConvParams p = conv_params(x, weight, bias, activation, groups_adjacent(x) && groups_adjacent(y), rows);
    const cpu::Image out = cpu::image(y);

    constexpr int64_t kItemElements = 32768;
    const int64_t per_row = p.width * p.dim;
    const int64_t block = std::clamp<int64_t>(kItemElements / per_row / 2 * 2, 2, p.height + p.height % 2);
    const int64_t blocks = (p.height + block - 1) / block;
    const auto kernel = GM_CPU_KERNEL(depthwise_conv_fwd);
    const int64_t scratch = GM_CPU_KERNEL(depthwise_conv_fwd_scratch)(p);
    cpu::for_items(p.batch * p.groups * blocks, block * per_row, scratch, [&](int64_t item, void* memory) {
        const int64_t first = item % blocks * block, image = item / blocks;
        kernel(p, out, image / p.groups, image % p.groups, first, std::min(first + block, p.height), memory);
    });
    return y;
}

// Tiles whose gradient before the activation stays in the second cache level; from the shape alone, since the tiles
// set the order of the sums.
void choose_tiles(const cpu::ConvParams& p, cpu::ConvGradients& grads) {
    constexpr int64_t kTileRows = 16, kTileBytes = 256 * 1024;
    grads.tile_rows = std::clamp<int64_t>(p.height, 1, kTileRows);
    const int64_t channel_bytes = (grads.tile_rows + 2) * std::max<int64_t>(p.width, 1) * 4;
    grads.tile_channels =
        std::clamp(kTileBytes / channel_bytes / cpu::kRowUnit * cpu::kRowUnit, cpu::kRowUnit, p.padded);
    grads.row_tiles = (p.height + grads.tile_rows - 1) / grads.tile_rows;
    grads.channel_tiles = (p.padded + grads.tile_channels - 1) / grads.tile_channels;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv3x3_bwd(Tensor dy, Tensor x, Tensor weight, OptTensor bias,
                                                         int64_t activation) {
    check_conv(x, weight, bias, activation);
    check_image(dy, "dy", shape_of(x), x);
    Tensor dx = empty_image_like(x);
    Tensor dweight = empty_like_or_absent(weight, x), dbias = empty_like_or_absent(bias, x);
    if (dweight.numel() == 0) return {dx, dweight, dbias};
    x = canonical_image(x), dy = canonical_image(dy);
    cpu::ParameterRows rows(x);
    const cpu::ConvParams p = conv_params(x, weight, bias, activation,
                                          groups_adjacent(x) && groups_adjacent(dy) && groups_adjacent(dx), rows);
    cpu::ConvGradients grads{};
    choose_tiles(p, grads);
    const bool empty_image = dx.numel() == 0;
    const int64_t stages = empty_image ? 0 : p.batch * grads.row_tiles;
    cpu::PartialSums partials(stages, p.groups * 10 * p.padded);
    grads.dy = cpu::const_image(dy), grads.dx = cpu::image(dx), grads.partials = partials.data();

    const auto kernel = GM_CPU_KERNEL(depthwise_conv_bwd);
    const int64_t scratch = GM_CPU_KERNEL(depthwise_conv_bwd_scratch)(p, grads);
    const int64_t tiles = p.groups * grads.channel_tiles;
    const int64_t elements = grads.tile_rows * p.width * grads.tile_channels;
    cpu::for_items(stages * tiles, elements, scratch, [&](int64_t item, void* memory) {
        const int64_t stage = item / tiles, tile = item % tiles;
        kernel(p, grads, stage / grads.row_tiles, tile / grads.channel_tiles, stage % grads.row_tiles,
               tile % grads.channel_tiles, memory);
    });
    const std::vector<double> sums = partials.total();
    cpu::store_sums(sums.data(), 10, 0, dweight, p.groups, p.dim, 9);
    if (bias) cpu::store_sums(sums.data(), 10, 9, dbias, p.groups, p.dim, 1);
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CPU, m) {
    m.impl("depthwise_conv3x3_fwd", TORCH_BOX(&depthwise_conv3x3_fwd));
    m.impl("depthwise_conv3x3_bwd", TORCH_BOX(&depthwise_conv3x3_bwd));
}

}  // namespace gm
