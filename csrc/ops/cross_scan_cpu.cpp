// SPDX-License-Identifier: Apache-2.0
// cross_selective_scan on the CPU: the grouped scan's kernels on K groups that share one image, whose results are added
// in float (double for double). Threads over (batch, group) and, forward, tiles of channels. Schemas and layouts:
// csrc/schemas.cpp.
#include "cpu/grouped_scan.h"
#include "host/cpu_args.h"
#include "host/scan_args.h"

namespace gm {
namespace {

// Group g of an image (batch, H, W, G, D), in which all directions are at one place, or (batch, H, W, G, K, .).
cpu::Image image(const Tensor& t, int64_t g) {
    const ImageStrides strides = image_strides(t);
    char* data = static_cast<char*>(t.data_ptr()) + g * t.stride(3) * static_cast<int64_t>(t.element_size());
    return {data, strides.batch, strides.token, t.dim() == 6 ? t.stride(4) : 0};
}
cpu::ConstImage const_image(const Tensor& t, int64_t g) {
    const cpu::Image i = image(t, g);
    return {i.data, i.batch, i.token, i.group};
}

// Where an image is summed: the image itself, or one of float32 for 16-bit types.
Tensor sum_image(const Tensor& t) {
    const ScalarType wide = accumulate_type(t.scalar_type());
    if (t.scalar_type() == wide) return t;
    Shape strides(t.dim());
    for (int64_t i = 0; i < t.dim(); ++i) strides[i] = t.stride(i);
    return empty_strided(shape_of(t), strides, wide, t);
}

// Canonical image inputs and parameter rows, alive as long as the params that point into them.
struct CrossInputs {
    Tensor u, dt, B, C;
    cpu::ParameterRows rows;
    std::vector<cpu::ScanParams> params;  // one a group: its K directions as groups

    CrossInputs(const CrossSizes& s, const Tensor& u_in, const Tensor& dt_in, const Tensor& A, const Tensor& B_in,
                const Tensor& C_in, const OptTensor& D, const OptTensor& dt_weight, const OptTensor& dt_bias,
                const std::vector<int64_t>& directions, bool softplus, int64_t chunk)
        : u(canonical_image(u_in)),
          dt(canonical_image(dt_in)),
          B(canonical_image(B_in)),
          C(canonical_image(C_in)),
          rows(u_in) {
        const int64_t all = s.groups * s.scans, padded = cpu::padded_row(s.dim);
        const int64_t wide = accumulate_type(u.scalar_type()) == ScalarType::Double ? 8 : 4;
        const void* A_rows = rows(A, all, s.dim, s.states);
        const void* weight_rows = dt_weight ? rows(*dt_weight, all, s.dim, s.rank, cpu::RowPad::kLastChannel) : nullptr;
        const void* D_rows = rows(D, all, s.dim, 0.0);
        const void* bias_rows = rows(dt_bias, all, s.dim, 0.0);
        const void* no_norm_bias = rows(std::nullopt, s.scans, s.dim, 0.0);
        const void* no_gate = rows(std::nullopt, s.batch * s.scans, s.dim, 1.0);
        for (int64_t g = 0; g < s.groups; ++g) {
            const auto of_group = [&](const void* data, int64_t count) {
                return data == nullptr ? nullptr : static_cast<const char*>(data) + g * s.scans * count * padded * wide;
            };
            cpu::ScanParams p{};
            p.dtype = cpu::dtype_of(u);
            p.batch = s.batch, p.height = s.height, p.width = s.width, p.groups = s.scans, p.dim = s.dim;
            p.padded = padded;
            p.states = s.states, p.rank = s.rank;
            p.directions = directions.data();
            p.softplus = softplus;
            p.chunk = chunk, p.chunks = (s.tokens() + chunk - 1) / chunk;
            p.u = const_image(u, g), p.dt = const_image(dt, g), p.B = const_image(B, g), p.C = const_image(C, g);
            p.A = of_group(A_rows, s.states), p.dt_weight = of_group(weight_rows, s.rank);
            p.D = of_group(D_rows, 1), p.dt_bias = of_group(bias_rows, 1);
            p.norm_bias = no_norm_bias, p.gate = no_gate;
            params.push_back(p);
        }
    }
};

std::tuple<Tensor, Tensor> cross_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                    OptTensor dt_weight, OptTensor dt_bias,
                                                    std::vector<int64_t> directions, bool softplus, int64_t chunk,
                                                    bool save_states) {
    const CrossSizes s = check_cross_scan(u, dt, A, B, C, D, dt_weight, dt_bias, directions, chunk);
    const ScalarType wide = accumulate_type(u.scalar_type());
    Tensor y = empty_image_like(u);
    Tensor states = save_states ? empty(cross_states_shape(s, chunk), wide, u) : empty_absent(wide, u);
    if (s.batch == 0 || s.tokens() == 0) return {y, states};

    const CrossInputs in(s, u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk);
    const Tensor sum = sum_image(y);
    const int64_t group_states = states.numel() / s.groups * static_cast<int64_t>(states.element_size());
    std::vector<cpu::ScanOutputs> out(s.groups);
    for (int64_t g = 0; g < s.groups; ++g) {
        out[g].sum = image(sum, g);
        if (save_states) out[g].states = static_cast<char*>(states.data_ptr()) + g * group_states;
    }

    // Channels are independent: idle threads take tiles of them.
    const int64_t images = s.batch * s.groups;
    const cpu::ChannelTiles tiles(s.dim, images, cpu::padded_row(s.dim) / cpu::kRowUnit);
    const auto kernel = GM_CPU_KERNEL(grouped_scan_fwd);
    const int64_t scratch = tiles.scratch(
        [&](int64_t channels) { return GM_CPU_KERNEL(grouped_scan_fwd_scratch)(in.params[0], channels); });
    const int64_t work = s.tokens() * tiles.width * s.states * s.scans;
    cpu::for_items(images * tiles.count, work, scratch, [&](int64_t item, void* memory) {
        const int64_t batch = item / tiles.count / s.groups, g = item / tiles.count % s.groups;
        const int64_t tile = item % tiles.count;
        for (int64_t k = 0; k < s.scans; ++k)
            kernel(in.params[g], out[g], batch, k, tile * tiles.width, tiles.size(tile), memory);
    });
    if (sum.scalar_type() != y.scalar_type()) torch::stable::copy_(y, sum);
    return {y, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_selective_scan_bwd(
    Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D, OptTensor dt_weight, OptTensor dt_bias,
    Tensor states, std::vector<int64_t> directions, bool softplus, int64_t chunk) {
    const CrossSizes s = check_cross_scan(u, dt, A, B, C, D, dt_weight, dt_bias, directions, chunk);
    check_image(dy, "dy", shape_of(u), u);
    check_states(states, cross_states_shape(s, chunk), u);

    Tensor du = empty_image_like(u), ddt = empty_image_like(dt), dB = empty_image_like(B), dC = empty_image_like(C);
    Tensor dA = empty_like_or_absent(A, u), dD = empty_like_or_absent(D, u);
    Tensor ddt_weight = empty_like_or_absent(dt_weight, u), ddt_bias = empty_like_or_absent(dt_bias, u);

    const int64_t rows = s.states + s.rank + 5, row = cpu::padded_row(s.dim);  // see cpu::ScanGradients
    const bool no_tokens = s.tokens() == 0;
    const int64_t group_sums = s.scans * rows * row, batch = no_tokens ? 0 : s.batch;
    cpu::PartialSums partials(s.groups * batch, group_sums);
    if (batch > 0) {
        dy = canonical_image(dy);
        const CrossInputs in(s, u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk);
        const Tensor du_sum = sum_image(du);
        const int64_t group_states = states.numel() / s.groups * static_cast<int64_t>(states.element_size());
        std::vector<cpu::ScanGradients> grads(s.groups);
        for (int64_t g = 0; g < s.groups; ++g) {
            grads[g].dy = const_image(dy, g);
            grads[g].states = static_cast<const char*>(states.data_ptr()) + g * group_states;
            grads[g].du_sum = image(du_sum, g);
            grads[g].ddt = image(ddt, g), grads[g].dB = image(dB, g), grads[g].dC = image(dC, g);
            grads[g].partials = partials.data() + g * batch * group_sums;
        }
        const auto kernel = GM_CPU_KERNEL(grouped_scan_bwd);
        const int64_t scratch = GM_CPU_KERNEL(grouped_scan_bwd_scratch)(in.params[0]);
        const int64_t work = s.tokens() * s.dim * s.states * s.scans;
        cpu::for_items(batch * s.groups, work, scratch, [&](int64_t item, void* memory) {
            const int64_t g = item % s.groups;
            for (int64_t k = 0; k < s.scans; ++k) kernel(in.params[g], grads[g], item / s.groups, k, memory);
        });
        if (du_sum.scalar_type() != du.scalar_type()) torch::stable::copy_(du, du_sum);
    }

    std::vector<double> sums;
    for (int64_t g = 0; g < s.groups; ++g) {
        const std::vector<double> of_group = partials.total(g * batch, batch);
        sums.insert(sums.end(), of_group.begin(), of_group.end());
    }
    const auto store = [&](const Tensor& grad, int64_t first, int64_t count) {
        if (grad.numel() > 0) cpu::store_sums(sums.data(), rows, first, grad, s.groups * s.scans, s.dim, count);
    };
    store(dA, 0, s.states);
    store(ddt_weight, s.states, s.rank);
    store(ddt_bias, s.states + s.rank, 1);
    store(dD, s.states + s.rank + 1, 1);
    return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CPU, m) {
    m.impl("cross_selective_scan_fwd", TORCH_BOX(&cross_selective_scan_fwd));
    m.impl("cross_selective_scan_bwd", TORCH_BOX(&cross_selective_scan_bwd));
}

}  // namespace gm
