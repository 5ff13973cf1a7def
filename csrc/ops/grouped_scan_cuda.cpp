// SPDX-License-Identifier: Apache-2.0
// grouped_selective_scan on CUDA: checks, device guard, allocation, launch. Schemas and layouts: csrc/schemas.cpp.
#include <optional>
#include <vector>

#include "cuda/scan/launch.h"
#include "cuda/scan/sm90/launch.h"
#include "cuda/scan/sm90/select.h"
#include "host/cuda_args.h"
#include "host/explain.h"
#include "host/scan_args.h"
#include "host/stream.h"
#include "ops/entries_cuda.h"
#include "ops/scan_kernels.h"
#include "ops/scan_sm90.h"
#include "ops/tma_images.h"

namespace gm {
namespace {

constexpr const char* kOp = "grouped_selective_scan";

ScanShape scan_shape(const ScanSizes& s, const ScanInputs& in) {
    GM_CHECK(s.groups <= kMaxGroups, "the CUDA scan takes up to ", kMaxGroups, " groups, got ", s.groups);
    ScanShape shape{};
    shape.batch = s.batch;
    shape.height = static_cast<int>(s.height);
    shape.width = static_cast<int>(s.width);
    shape.groups = static_cast<int>(s.groups);
    shape.dim = static_cast<int>(s.dim);
    shape.scans = 1, shape.param_dim = shape.dim;
    shape.states = static_cast<int>(s.states);
    shape.rank = static_cast<int>(s.rank);
    shape.lanes = scan_lanes(shape.dim);
    shape.norm_dim = static_cast<int>(in.norm_dim > 0 ? in.norm_dim : s.dim);
    shape.softplus = in.softplus;
    shape.norm_eps = static_cast<float>(in.norm_eps);
    for (int64_t g = 0; g < s.groups; ++g)
        shape.directions[g / 16] |= static_cast<uint32_t>(in.directions[g]) << (2 * (g % 16));
    return shape;
}

int64_t saved_states(const ScanSizes& s, int64_t chunk) { return scan_saved_states(s.height, s.width, s.dim, chunk); }

Shape states_shape(const ScanSizes& s, int64_t chunk) {
    return {s.batch * s.groups * saved_states(s, chunk) * s.states * s.dim};
}

// Scratch for the carries of N > 1 states.
Tensor carry_scratch(const ScanSizes& s, const Tensor& device_of) {
    return empty({s.batch, s.groups, 2, s.states, s.dim}, ScalarType::Float, device_of);
}

ScanSizes check_inputs(const ScanInputs& in) {
    const ScanSizes s = check_scan(in.u, in.dt, in.A, in.B, in.C, in.D, in.dt_weight, in.dt_bias, in.z, in.norm_weight,
                                   in.norm_bias, in.gate, in.directions, in.chunk);
    GM_CHECK(in.norm_dim >= 0 && in.norm_dim <= s.dim, "norm_dim must be 0 to ", s.dim, ", got ", in.norm_dim);
    check_cuda_chunk(s.dim, s.states, in.chunk);
    return s;
}

// Prepares the inputs, and in the backward `dy`, for the kernel that takes the scan: for a sm_90 kernel images that
// TMA moves, in `tma_images`, else canonical ones. Returns why no sm_90 kernel takes it, or null.
const char* prepare_inputs(std::optional<TmaImages>& tma_images, ScanInputs& in, Tensor* dy, ScanShape& shape,
                           DType dtype, const CudaContext& context) {
    for (Tensor* t : {&in.dt, &in.B, &in.C}) *t = canonical_image(*t);
    std::vector<Tensor*> images{&in.u};
    if (in.z) images.push_back(&*in.z);
    if (dy != nullptr) images.push_back(dy);
    const char* const why_not = why_not_grouped_scan_sm90(shape, in.z.has_value(), in.norm_weight.has_value(), dtype);
    if (why_not == nullptr) {
        note(kOp, dy == nullptr ? " forward" : " backward", ": the sm_90 kernel");
        tma_images.emplace(kOp, shape, context);
        tma_images->read(images);
    } else {
        for (Tensor* t : images) *t = canonical_image(*t);
    }
    return why_not;
}

// What forward and backward read; the inputs must be canonical.
template <class Args>
void set_inputs(Args& args, const ScanInputs& in, ParamHolder& param) {
    args.u = image_arg(in.u), args.dt = image_arg(in.dt), args.B = image_arg(in.B), args.C = image_arg(in.C);
    if (in.z) args.z = image_arg(*in.z);
    args.A = param(in.A), args.D = param(in.D), args.dt_weight = param(in.dt_weight), args.dt_bias = param(in.dt_bias);
    args.norm_weight = param(in.norm_weight), args.norm_bias = param(in.norm_bias), args.gate = param(in.gate);
    args.chunk = static_cast<int>(in.chunk);
}

std::tuple<Tensor, Tensor> grouped_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                      OptTensor dt_weight, OptTensor dt_bias, OptTensor z,
                                                      OptTensor norm_weight, OptTensor norm_bias, OptTensor gate,
                                                      std::vector<int64_t> directions, bool softplus, double norm_eps,
                                                      int64_t chunk, bool save_states) {
    const CudaContext context(u);
    const ScanInputs in{u,           dt,        A,    B,          C,        D,        dt_weight, dt_bias, z,
                        norm_weight, norm_bias, gate, directions, softplus, norm_eps, 0,         chunk};
    const Tensor y = empty_image_like(u);
    OptTensor states;
    if (save_states) states = empty(states_shape(check_inputs(in), chunk), ScalarType::Float, u);
    ScanForward(y, states, in, context).launch();
    return {y, states ? *states : empty_absent(ScalarType::Float, u)};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients grouped_selective_scan_bwd(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                     OptTensor dt_weight, OptTensor dt_bias, OptTensor z, OptTensor norm_weight,
                                     OptTensor norm_bias, OptTensor gate, Tensor states,
                                     std::vector<int64_t> directions, bool softplus, double norm_eps, int64_t chunk) {
    const CudaContext context(u);
    ScanImageGradients images{empty_image_like(u), empty_image_like(dt), empty_image_like(B), empty_image_like(C),
                              std::nullopt};
    if (z) images.dz = empty_image_like(*z);
    const ScanParameterGradients p = scan_bwd_into(images, dy,
                                                   {u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias,
                                                    gate, directions, softplus, norm_eps, 0, chunk},
                                                   states, context);
    const Tensor dz = z ? *images.dz : empty_absent(u.scalar_type(), u);
    return {images.du,    images.ddt, p.dA, images.dB,      images.dC,    p.dD,
            p.ddt_weight, p.ddt_bias, dz,   p.dnorm_weight, p.dnorm_bias, p.dgate};
}

}  // namespace

struct ScanForward::Planned {
    const CudaContext& context;
    DType dtype;
    ScanInputs in;
    ParamHolder param{};
    ScanFwdSm90Args args{};  // the portable kernels use args.scan alone
    std::optional<TmaImages> tma_images{};
    const char* why_not_sm90 = nullptr;
    Tensor carry{}, inter_block_state{};

    static constexpr const char* kName = "grouped_selective_scan forward";
};

ScanForward::~ScanForward() = default;

ScanForward::ScanForward(const Tensor& y, const OptTensor& states, ScanInputs in, const CudaContext& context) {
    const ScanSizes s = check_inputs(in);
    check_image(y, "y", shape_of(in.u), in.u);
    if (states) check_states(*states, states_shape(s, in.chunk), in.u);
    const DType dtype = dtype_of(in.u);
    const ScanShape shape = scan_shape(s, in);
    if (s.batch == 0 || s.tokens() == 0) return;

    planned_.reset(new Planned{context, dtype, std::move(in)});
    Planned& p = *planned_;
    ScanFwdArgs& args = p.args.scan;
    args.shape = shape;
    p.why_not_sm90 = prepare_inputs(p.tma_images, p.in, nullptr, args.shape, dtype, context);
    set_inputs(args, p.in, p.param);
    args.y = p.tma_images ? p.tma_images->write(y, *p.in.z) : image_arg(y);
    if (states) {
        args.states = static_cast<float*>(states->data_ptr());
        args.num_chunks = saved_states(s, p.in.chunk);
    } else if (s.states > 1) {
        p.carry = carry_scratch(s, p.in.u);
        args.carry = static_cast<float*>(p.carry.data_ptr());
    }
    const int64_t size = static_cast<int64_t>(p.in.u.element_size());
    args.shape.aligned = s.dim % kVec == 0 && allows_vectors(args.u, size) && allows_vectors(args.z, size) &&
                         allows_vectors(args.y, size) && (s.rank > 0 || allows_vectors(args.dt, size));
    if (!p.tma_images) return;
    GM_CHECK(prepare_grouped_scan_fwd_sm90(dtype, p.args), Planned::kName, ": the driver refused a tensor map of u ",
             show(shape_of(p.in.u)));
    check_cuda(share_grouped_scan_fwd_sm90(p.args, dtype), Planned::kName);
    p.inter_block_state = inter_block_scratch(p.args, p.in.u);
}

OptTensor ScanForward::inter_block_state_to_clear() {
    if (planned_ == nullptr || planned_->args.inter_block_state == nullptr) return std::nullopt;
    planned_->args.inter_block_state_cleared = true;
    return planned_->inter_block_state;
}

void ScanForward::launch() {
    if (planned_ == nullptr) return;
    Planned& p = *planned_;
    const cudaStream_t stream = p.context.stream();
    if (p.tma_images) {
        p.tma_images->start();
        check_cuda(launch_grouped_scan_fwd_sm90(p.args, p.dtype, stream), Planned::kName);
        p.tma_images->finish();
    } else {
        check_cuda(launch_scan_fwd(p.args.scan, p.dtype, stream, kOp, p.why_not_sm90), Planned::kName);
    }
}

ScanParameterGradients scan_bwd_into(const ScanImageGradients& images, Tensor dy, ScanInputs in, Tensor states,
                                     const CudaContext& context) {
    const ScanSizes s = check_inputs(in);
    check_image(dy, "dy", shape_of(in.u), in.u);
    check_states(states, states_shape(s, in.chunk), in.u);
    ScanBwdArgs args;
    args.shape = scan_shape(s, in);
    const DType dtype = dtype_of(in.u);

    ScanParameterGradients p;
    p.dA = empty(shape_of(in.A), in.A.scalar_type(), in.u);
    p.dD = empty_like_or_absent(in.D, in.u), p.ddt_weight = empty_like_or_absent(in.dt_weight, in.u);
    p.ddt_bias = empty_like_or_absent(in.dt_bias, in.u);
    p.dnorm_weight = empty_like_or_absent(in.norm_weight, in.u);
    p.dnorm_bias = empty_like_or_absent(in.norm_bias, in.u), p.dgate = empty_like_or_absent(in.gate, in.u);
    if (s.batch == 0 || s.tokens() == 0) {
        for (Tensor* t : {&p.dA, &p.dD, &p.ddt_weight, &p.ddt_bias, &p.dnorm_weight, &p.dnorm_bias, &p.dgate})
            torch::stable::zero_(*t);
        return p;
    }

    std::optional<TmaImages> tma_images;
    const char* const why_not_sm90 = prepare_inputs(tma_images, in, &dy, args.shape, dtype, context);
    if (tma_images) tma_images->start();
    ParamHolder param;
    set_inputs(args, in, param);
    args.dy = image_arg(dy);
    args.du = tma_images ? tma_images->write(images.du, in.u) : image_arg(images.du);
    args.ddt = image_arg(images.ddt), args.dB = image_arg(images.dB), args.dC = image_arg(images.dC);
    if (in.z) args.dz = tma_images ? tma_images->write(*images.dz, *in.z) : image_arg(*images.dz);
    args.states = static_cast<const float*>(states.data_ptr());
    args.num_chunks = saved_states(s, in.chunk);
    Tensor scratch;
    if (s.states > 1) {
        scratch = carry_scratch(s, in.u);
        args.carry = static_cast<float*>(scratch.data_ptr());
    }
    const int64_t size = static_cast<int64_t>(in.u.element_size());
    args.shape.aligned = s.dim % kVec == 0 && allows_vectors(args.u, size) && allows_vectors(args.z, size) &&
                         allows_vectors(args.dy, size) && allows_vectors(args.du, size) &&
                         allows_vectors(args.dz, size) &&
                         (s.rank > 0 || (allows_vectors(args.dt, size) && allows_vectors(args.ddt, size)));
    const int64_t rows = s.states + kFixedRows + s.rank;
    int parts = 0, state_parts = 0;
    Tensor partials;
    const auto make_partials = [&] {
        partials = empty({s.batch, parts, s.groups, rows, s.dim}, ScalarType::Float, in.u);
        return static_cast<float*>(partials.data_ptr());
    };
    constexpr const char* kName = "grouped_selective_scan backward";
    if (tma_images) {
        args.shape.threads = kTileThreads;
        ScanBwdSm90Args sm90_args{};
        sm90_args.scan = args;
        GM_CHECK(prepare_grouped_scan_bwd_sm90(dtype, sm90_args), kName, ": the driver refused a tensor map of u ",
                 show(shape_of(in.u)));
        check_cuda(share_grouped_scan_bwd_sm90(sm90_args, dtype), kName);
        const Tensor inter_block_state = inter_block_scratch(sm90_args, in.u);
        parts = state_parts = sm90_args.plan.blocks_per_plane;
        sm90_args.scan.partials = args.partials = make_partials();
        check_cuda(launch_grouped_scan_bwd_sm90(sm90_args, dtype, context.stream()), kName);
        tma_images->finish();
    } else {
        const ScanBwdKernel kernel(args.shape, static_cast<int>(size), kOp, why_not_sm90);
        parts = kernel.parts, state_parts = kernel.state_parts;
        args.partials = make_partials();
        check_cuda(kernel.launch(args, dtype, context.stream()), kName);
    }

    ScanReduceArgs reduce;
    reduce.partials = args.partials;
    reduce.batch = s.batch;
    reduce.parts = parts, reduce.state_parts = state_parts;
    reduce.groups = args.shape.groups, reduce.dim = reduce.param_dim = static_cast<int>(s.dim);
    reduce.states = args.shape.states, reduce.rank = args.shape.rank;
    reduce.norm_weight = args.norm_weight, reduce.norm_bias = args.norm_bias, reduce.gate = args.gate;
    reduce.dA = param_out(p.dA, in.A), reduce.dD = param_out(p.dD, in.D);
    reduce.ddt_bias = param_out(p.ddt_bias, in.dt_bias), reduce.ddt_weight = param_out(p.ddt_weight, in.dt_weight);
    reduce.dgate = param_out(p.dgate, in.gate), reduce.dnorm_weight = param_out(p.dnorm_weight, in.norm_weight);
    reduce.dnorm_bias = param_out(p.dnorm_bias, in.norm_bias);
    check_cuda(launch_scan_reduce(reduce, dtype, context.stream()), "grouped_selective_scan parameter sums");
    return p;
}

}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("grouped_selective_scan_fwd", TORCH_BOX(&gm::grouped_selective_scan_fwd));
    m.impl("grouped_selective_scan_bwd", TORCH_BOX(&gm::grouped_selective_scan_bwd));
}
