// SPDX-License-Identifier: Apache-2.0
// grouped_selective_scan on the CPU: checks, allocation, threads over (batch, group). Schemas and layouts:
// csrc/schemas.cpp.
#include "cpu/grouped_scan.h"
#include "host/cpu_args.h"
#include "host/scan_args.h"

namespace gm {
namespace {

Shape states_shape(const ScanSizes& s, int64_t chunk) {
    return {s.batch * s.groups * ((s.tokens() + chunk - 1) / chunk) * s.states * s.dim};
}

// Canonical image inputs and parameter rows, alive as long as the params that point into them.
struct ScanInputs {
    Tensor u, dt, B, C;
    OptTensor z;
    cpu::ParameterRows rows;
    cpu::ScanParams params{};

    ScanInputs(const ScanSizes& s, const Tensor& u_in, const Tensor& dt_in, const Tensor& A, const Tensor& B_in,
               const Tensor& C_in, const OptTensor& D, const OptTensor& dt_weight, const OptTensor& dt_bias,
               const OptTensor& z_in, const OptTensor& norm_weight, const OptTensor& norm_bias, const OptTensor& gate,
               const std::vector<int64_t>& directions, bool softplus, double norm_eps, int64_t chunk)
        : u(canonical_image(u_in)),
          dt(canonical_image(dt_in)),
          B(canonical_image(B_in)),
          C(canonical_image(C_in)),
          rows(u_in) {
        if (z_in) z = canonical_image(*z_in);
        cpu::ScanParams& p = params;
        p.dtype = cpu::dtype_of(u);
        p.batch = s.batch, p.height = s.height, p.width = s.width, p.groups = s.groups, p.dim = s.dim;
        p.padded = cpu::padded_row(s.dim);
        p.states = s.states, p.rank = s.rank;
        p.directions = directions.data();
        p.softplus = softplus;
        p.norm_eps = norm_eps;
        p.chunk = chunk, p.chunks = (s.tokens() + chunk - 1) / chunk;
        p.u = cpu::const_image(u), p.dt = cpu::const_image(dt), p.B = cpu::const_image(B), p.C = cpu::const_image(C);
        if (z) p.z = cpu::const_image(*z);
        p.A = rows(A, s.groups, s.dim, s.states);
        if (dt_weight) p.dt_weight = rows(*dt_weight, s.groups, s.dim, s.rank, cpu::RowPad::kLastChannel);
        p.D = rows(D, s.groups, s.dim, 0.0);
        p.dt_bias = rows(dt_bias, s.groups, s.dim, 0.0);
        if (norm_weight) p.norm_weight = rows(norm_weight, s.groups, s.dim, 1.0);
        p.norm_bias = rows(norm_bias, s.groups, s.dim, 0.0);
        p.gate = rows(gate, s.batch * s.groups, s.dim, 1.0);
    }
};

std::tuple<Tensor, Tensor> grouped_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                      OptTensor dt_weight, OptTensor dt_bias, OptTensor z,
                                                      OptTensor norm_weight, OptTensor norm_bias, OptTensor gate,
                                                      std::vector<int64_t> directions, bool softplus, double norm_eps,
                                                      int64_t chunk, bool save_states) {
    const ScanSizes s =
        check_scan(u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions, chunk);
    const ScalarType wide = accumulate_type(u.scalar_type());
    Tensor y = empty_image_like(u);
    Tensor states = save_states ? empty(states_shape(s, chunk), wide, u) : empty_absent(wide, u);
    if (s.batch == 0 || s.tokens() == 0) return {y, states};

    const ScanInputs in(s, u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions, softplus,
                        norm_eps, chunk);
    const cpu::ScanOutputs out{cpu::image(y), save_states ? states.data_ptr() : nullptr};

    // Channels are independent up to the norm: without one, idle threads take tiles of them.
    const int64_t images = s.batch * s.groups;
    const cpu::ChannelTiles tiles(s.dim, images, norm_weight ? 1 : in.params.padded / cpu::kRowUnit);
    const auto kernel = GM_CPU_KERNEL(grouped_scan_fwd);
    const int64_t scratch =
        tiles.scratch([&](int64_t channels) { return GM_CPU_KERNEL(grouped_scan_fwd_scratch)(in.params, channels); });
    cpu::for_items(images * tiles.count, s.tokens() * tiles.width * s.states, scratch, [&](int64_t item, void* memory) {
        const int64_t image = item / tiles.count, tile = item % tiles.count;
        kernel(in.params, out, image / s.groups, image % s.groups, tile * tiles.width, tiles.size(tile), memory);
    });
    return {y, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
grouped_selective_scan_bwd(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                           OptTensor dt_weight, OptTensor dt_bias, OptTensor z, OptTensor norm_weight,
                           OptTensor norm_bias, OptTensor gate, Tensor states, std::vector<int64_t> directions,
                           bool softplus, double norm_eps, int64_t chunk) {
    const ScanSizes s =
        check_scan(u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions, chunk);
    check_image(dy, "dy", shape_of(u), u);
    check_states(states, states_shape(s, chunk), u);

    Tensor du = empty_image_like(u), ddt = empty_image_like(dt), dB = empty_image_like(B), dC = empty_image_like(C);
    Tensor dz = z ? empty_image_like(*z) : empty_absent(u.scalar_type(), u);
    Tensor dA = empty_like_or_absent(A, u), dD = empty_like_or_absent(D, u), dgate = empty_like_or_absent(gate, u);
    Tensor ddt_weight = empty_like_or_absent(dt_weight, u), ddt_bias = empty_like_or_absent(dt_bias, u);
    Tensor dnorm_weight = empty_like_or_absent(norm_weight, u), dnorm_bias = empty_like_or_absent(norm_bias, u);

    const int64_t rows = s.states + s.rank + 5, row = cpu::padded_row(s.dim);
    const bool empty_image = s.tokens() == 0;
    cpu::PartialSums partials(empty_image ? 0 : s.batch, s.groups * rows * row);
    if (!empty_image) {
        dy = canonical_image(dy);
        const ScanInputs in(s, u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions,
                            softplus, norm_eps, chunk);
        cpu::ScanGradients grads{cpu::const_image(dy),
                                 states.data_ptr(),
                                 cpu::image(du),
                                 cpu::image(ddt),
                                 cpu::image(dB),
                                 cpu::image(dC),
                                 {},
                                 partials.data()};
        if (z) grads.dz = cpu::image(dz);
        const auto kernel = GM_CPU_KERNEL(grouped_scan_bwd);
        const int64_t scratch = GM_CPU_KERNEL(grouped_scan_bwd_scratch)(in.params);
        cpu::for_items(s.batch * s.groups, s.tokens() * s.dim * s.states, scratch, [&](int64_t item, void* memory) {
            kernel(in.params, grads, item / s.groups, item % s.groups, memory);
        });
    }

    const std::vector<double> sums = partials.total();
    const auto store = [&](const Tensor& grad, int64_t first, int64_t count) {
        if (grad.numel() > 0) cpu::store_sums(sums.data(), rows, first, grad, s.groups, s.dim, count);
    };
    store(dA, 0, s.states);
    store(ddt_weight, s.states, s.rank);
    store(ddt_bias, s.states + s.rank, 1);
    store(dD, s.states + s.rank + 1, 1);
    store(dnorm_weight, s.states + s.rank + 2, 1);
    store(dnorm_bias, s.states + s.rank + 3, 1);
    if (gate && empty_image) {
        torch::stable::zero_(dgate);
    } else if (gate) {  // one row a (batch, group): nothing to sum
        cpu::store_sums(partials.data(), rows, rows - 1, dgate, s.batch * s.groups, s.dim, 1);
    }
    return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias, dz, dnorm_weight, dnorm_bias, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CPU, m) {
    m.impl("grouped_selective_scan_fwd", TORCH_BOX(&grouped_selective_scan_fwd));
    m.impl("grouped_selective_scan_bwd", TORCH_BOX(&grouped_selective_scan_bwd));
}

}  // namespace gm
