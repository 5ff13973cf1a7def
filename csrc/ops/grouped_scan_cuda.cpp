// SPDX-License-Identifier: Apache-2.0
// grouped_selective_scan on CUDA: checks, device guard, allocation, launch. Schemas and layouts: csrc/schemas.cpp.
#include "cuda/grouped_scan_sm90.h"
#include "cuda/launch.h"
#include "host/cuda_args.h"
#include "host/scan_args.h"
#include "host/stream.h"

namespace gm {
namespace {

ScanShape scan_shape(const ScanSizes& s, const std::vector<int64_t>& directions, bool softplus, double norm_eps) {
    GM_CHECK(s.dim <= kMaxScanDim, "the CUDA scan takes up to ", kMaxScanDim, " channels a group, got ", s.dim);
    GM_CHECK(s.groups <= kMaxGroups, "the CUDA scan takes up to ", kMaxGroups, " groups, got ", s.groups);
    ScanShape shape{};
    shape.batch = s.batch;
    shape.height = static_cast<int>(s.height);
    shape.width = static_cast<int>(s.width);
    shape.groups = static_cast<int>(s.groups);
    shape.dim = static_cast<int>(s.dim);
    shape.states = static_cast<int>(s.states);
    shape.rank = static_cast<int>(s.rank);
    shape.lanes = scan_lanes(shape.dim);
    shape.softplus = softplus;
    shape.norm_eps = static_cast<float>(norm_eps);
    for (int64_t g = 0; g < s.groups; ++g)
        shape.directions[g / 16] |= static_cast<uint32_t>(directions[g]) << (2 * (g % 16));
    return shape;
}

// Scratch for the carries of N > 1 states.
Tensor carry_scratch(const ScanSizes& s, const Tensor& device_of) {
    return empty({s.batch, s.groups, 2, s.states, s.dim}, ScalarType::Float, device_of);
}

void check_chunk(const ScanShape& shape, int64_t chunk) {
    GM_CHECK(chunk == kBwdSlab / shape.lanes, "on CUDA chunk must be ", kBwdSlab / shape.lanes, " for ", shape.dim,
             " channels, got ", chunk);
}

std::tuple<Tensor, Tensor> grouped_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                      OptTensor dt_weight, OptTensor dt_bias, OptTensor z,
                                                      OptTensor norm_weight, OptTensor norm_bias, OptTensor gate,
                                                      std::vector<int64_t> directions, bool softplus, double norm_eps,
                                                      int64_t chunk, bool save_states) {
    const ScanSizes s =
        check_scan(u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions, chunk);
    ScanFwdArgs args;
    args.shape = scan_shape(s, directions, softplus, norm_eps);
    check_chunk(args.shape, chunk);
    const DType dtype = dtype_of(u);
    const CudaContext context(u);

    Tensor y = empty_image_like(u);
    Tensor states =
        save_states ? empty(states_shape(s, chunk), ScalarType::Float, u) : empty_absent(ScalarType::Float, u);
    if (s.batch == 0 || s.tokens() == 0) return {y, states};

    u = canonical_image(u), dt = canonical_image(dt), B = canonical_image(B), C = canonical_image(C);
    if (z) z = canonical_image(*z);
    ParamHolder param;
    args.u = image_arg(u), args.dt = image_arg(dt), args.B = image_arg(B), args.C = image_arg(C), args.y = image_arg(y);
    if (z) args.z = image_arg(*z);
    args.A = param(A), args.D = param(D), args.dt_weight = param(dt_weight), args.dt_bias = param(dt_bias);
    args.norm_weight = param(norm_weight), args.norm_bias = param(norm_bias), args.gate = param(gate);
    args.chunk = static_cast<int>(chunk);
    Tensor scratch;
    if (save_states) {
        args.states = static_cast<float*>(states.data_ptr());
        args.num_chunks = states.size(2);
    } else if (s.states > 1) {
        scratch = carry_scratch(s, u);
        args.carry = static_cast<float*>(scratch.data_ptr());
    }
    const int64_t size = static_cast<int64_t>(u.element_size());
    args.shape.aligned = s.dim % kVec == 0 && allows_vectors(args.u, size) && allows_vectors(args.z, size) &&
                         allows_vectors(args.y, size) && (s.rank > 0 || allows_vectors(args.dt, size));
    args.shape.threads = scan_fwd_threads(args.shape.lanes, s.tokens());
    ScanFwdSm90Args sm90_args;
    const bool sm90 = prepare_grouped_scan_fwd_sm90(args, dtype, sm90_args);
    check_cuda(sm90 ? launch_grouped_scan_fwd_sm90(sm90_args, dtype, context.stream())
                    : launch_grouped_scan_fwd(args, dtype, context.stream()),
               "grouped_selective_scan forward");
    return {y, states};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients grouped_selective_scan_bwd(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                     OptTensor dt_weight, OptTensor dt_bias, OptTensor z, OptTensor norm_weight,
                                     OptTensor norm_bias, OptTensor gate, Tensor states,
                                     std::vector<int64_t> directions, bool softplus, double norm_eps, int64_t chunk) {
    const ScanSizes s =
        check_scan(u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, directions, chunk);
    check_image(dy, "dy", shape_of(u), u);
    check_shape(states, "states", states_shape(s, chunk));
    ScanBwdArgs args;
    args.shape = scan_shape(s, directions, softplus, norm_eps);
    check_chunk(args.shape, chunk);
    const DType dtype = dtype_of(u);
    const CudaContext context(u);

    Tensor du = empty_image_like(u), ddt = empty_image_like(dt), dB = empty_image_like(B), dC = empty_image_like(C);
    Tensor dz = z ? empty_image_like(*z) : empty_absent(u.scalar_type(), u);
    Tensor dA = empty(shape_of(A), A.scalar_type(), u);
    Tensor dD = empty_like_or_absent(D, u), ddt_weight = empty_like_or_absent(dt_weight, u);
    Tensor ddt_bias = empty_like_or_absent(dt_bias, u), dnorm_weight = empty_like_or_absent(norm_weight, u);
    Tensor dnorm_bias = empty_like_or_absent(norm_bias, u), dgate = empty_like_or_absent(gate, u);
    const Gradients gradients{du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias, dz, dnorm_weight, dnorm_bias, dgate};
    if (s.batch == 0 || s.tokens() == 0) {
        for (Tensor* t : {&dA, &dD, &ddt_weight, &ddt_bias, &dnorm_weight, &dnorm_bias, &dgate})
            torch::stable::zero_(*t);
        return gradients;
    }

    dy = canonical_image(dy), u = canonical_image(u), dt = canonical_image(dt), B = canonical_image(B),
    C = canonical_image(C);
    if (z) z = canonical_image(*z);
    if (!states.is_contiguous()) states = torch::stable::contiguous(states);
    ParamHolder param;
    args.dy = image_arg(dy), args.u = image_arg(u), args.dt = image_arg(dt), args.B = image_arg(B),
    args.C = image_arg(C);
    args.du = image_arg(du), args.ddt = image_arg(ddt), args.dB = image_arg(dB), args.dC = image_arg(dC);
    if (z) args.z = image_arg(*z), args.dz = image_arg(dz);
    args.A = param(A), args.D = param(D), args.dt_weight = param(dt_weight), args.dt_bias = param(dt_bias);
    args.norm_weight = param(norm_weight), args.norm_bias = param(norm_bias), args.gate = param(gate);
    args.states = static_cast<const float*>(states.data_ptr());
    args.chunk = static_cast<int>(chunk);
    args.num_chunks = states.size(2);
    Tensor scratch;
    if (s.states > 1) {
        scratch = carry_scratch(s, u);
        args.carry = static_cast<float*>(scratch.data_ptr());
    }
    const int64_t size = static_cast<int64_t>(u.element_size());
    args.shape.aligned = s.dim % kVec == 0 && allows_vectors(args.u, size) && allows_vectors(args.z, size) &&
                         allows_vectors(args.dy, size) && allows_vectors(args.du, size) &&
                         allows_vectors(args.dz, size) &&
                         (s.rank > 0 || (allows_vectors(args.dt, size) && allows_vectors(args.ddt, size)));
    ScanBwdSm90Args sm90_args;
    const bool sm90 = prepare_grouped_scan_bwd_sm90(args, dtype, sm90_args);
    args.shape.threads =
        sm90 ? kSlabThreads : scan_bwd_threads(args.shape.lanes, s.tokens(), s.states == 1, static_cast<int>(size));
    const int64_t warps = args.shape.threads / 32, rows = s.states + kFixedRows + s.rank;
    Tensor partials = empty({s.batch, warps, s.groups, rows, s.dim}, ScalarType::Float, u);
    args.partials = static_cast<float*>(partials.data_ptr());
    sm90_args.scan.partials = args.partials;
    check_cuda(sm90 ? launch_grouped_scan_bwd_sm90(sm90_args, dtype, context.stream())
                    : launch_grouped_scan_bwd(args, dtype, context.stream()),
               "grouped_selective_scan backward");

    ScanReduceArgs reduce;
    reduce.partials = args.partials;
    reduce.batch = s.batch;
    reduce.warps = static_cast<int>(warps);
    reduce.groups = args.shape.groups, reduce.dim = args.shape.dim;
    reduce.states = args.shape.states, reduce.rank = args.shape.rank;
    reduce.norm_weight = args.norm_weight, reduce.norm_bias = args.norm_bias, reduce.gate = args.gate;
    reduce.dA = param_out(dA, A), reduce.dD = param_out(dD, D), reduce.ddt_bias = param_out(ddt_bias, dt_bias);
    reduce.ddt_weight = param_out(ddt_weight, dt_weight), reduce.dgate = param_out(dgate, gate);
    reduce.dnorm_weight = param_out(dnorm_weight, norm_weight), reduce.dnorm_bias = param_out(dnorm_bias, norm_bias);
    check_cuda(launch_scan_reduce(reduce, dtype, context.stream()), "grouped_selective_scan parameter sums");
    return gradients;
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("grouped_selective_scan_fwd", TORCH_BOX(&gm::grouped_selective_scan_fwd));
    m.impl("grouped_selective_scan_bwd", TORCH_BOX(&gm::grouped_selective_scan_bwd));
}
