// SPDX-License-Identifier: Apache-2.0
// cross_selective_scan on CUDA: checks, device guard, allocation, launch. Schemas and layouts: csrc/schemas.cpp.
#include "cuda/cross_plan.h"
#include "cuda/launch.h"
#include "host/cuda_args.h"
#include "host/scan_args.h"
#include "host/stream.h"

namespace gm {
namespace {

// The tensors of a call, canonical once `prepare` has run, and the scratch of its kernels.
struct CrossInputs {
    Tensor u, dt, A, B, C;
    OptTensor D, dt_weight, dt_bias;
    std::vector<int64_t> directions;
    bool softplus;
    int64_t chunk;
    ParamHolder param;
    Tensor sums, carry;
};

CrossSizes check_inputs(const CrossInputs& in) {
    const CrossSizes s =
        check_cross_scan(in.u, in.dt, in.A, in.B, in.C, in.D, in.dt_weight, in.dt_bias, in.directions, in.chunk);
    GM_CHECK(in.chunk == kCrossChunk, "on CUDA chunk must be ", kCrossChunk, ", got ", in.chunk);
    GM_CHECK(s.scans <= kMaxGroups, "the CUDA cross scan takes up to ", kMaxGroups, " directions, got ", s.scans);
    GM_CHECK(s.groups * s.scans <= INT32_MAX, "G * K must be below 2^31, got ", s.groups * s.scans);
    return s;
}

// Group and direction of `t` (batch, H, W, G, K, .), which must be canonical.
CrossImageArg cross_image(const Tensor& t) {
    CrossImageArg image{image_arg(t)};
    image.group = t.stride(3), image.scan = t.stride(4);
    return image;
}

size_t shared_limit() {
    int device = 0, bytes = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory limit");
    return static_cast<size_t>(bytes);
}

// Fills what forward and backward have in common; `in` holds what `args` points to.
void prepare(CrossArgs& args, CrossInputs& in, const CrossSizes& s, bool backward) {
    for (Tensor* t : {&in.u, &in.dt, &in.B, &in.C}) *t = canonical_image(*t);
    const CrossPlan plan = cross_plan(s.tokens(), static_cast<int>(s.dim), static_cast<int>(s.rank),
                                      static_cast<int>(s.scans), shared_limit(), backward);
    ScanShape& shape = args.shape;
    shape = {};
    shape.batch = s.batch;
    shape.height = static_cast<int>(s.height), shape.width = static_cast<int>(s.width);
    shape.groups = static_cast<int>(s.groups), shape.dim = static_cast<int>(s.dim);
    shape.states = static_cast<int>(s.states), shape.rank = static_cast<int>(s.rank);
    shape.lanes = plan.lanes, shape.threads = plan.threads;
    shape.softplus = in.softplus;
    for (int64_t k = 0; k < s.scans; ++k)
        shape.directions[k / 16] |= static_cast<uint32_t>(in.directions[k]) << (2 * (k % 16));
    args.scans = static_cast<int>(s.scans), args.slices = plan.slices;
    args.u = image_arg(in.u);
    args.dt = cross_image(in.dt), args.B = cross_image(in.B), args.C = cross_image(in.C);
    args.A = in.param(in.A), args.D = in.param(in.D);
    args.dt_weight = in.param(in.dt_weight), args.dt_bias = in.param(in.dt_bias);
    const int64_t blocks = s.batch * s.groups * plan.slices, width = plan.lanes * kVec;
    args.sums_bytes = plan.sums_bytes;
    if (s.scans > 1 && plan.sums_bytes == 0) {
        in.sums = empty({blocks, s.tokens(), width}, ScalarType::Float, in.u);
        args.sums = static_cast<float*>(in.sums.data_ptr());
    }
    if (s.states > 1) {
        in.carry = empty({blocks, 2, s.states, width}, ScalarType::Float, in.u);
        args.carry = static_cast<float*>(in.carry.data_ptr());
    }
    args.num_chunks = cross_states_shape(s, in.chunk)[3];
}

bool allows_cross_vectors(const CrossArgs& args, std::initializer_list<ImageArg> images, int64_t size) {
    bool aligned = args.shape.dim % kVec == 0 && allows_vectors(args.u, size);
    for (const ImageArg& image : images) aligned = aligned && allows_vectors(image, size);
    if (args.shape.rank > 0) return aligned;
    return aligned && allows_vectors(args.dt, size) && args.dt.scan % kVec == 0;
}

std::tuple<Tensor, Tensor> cross_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                    OptTensor dt_weight, OptTensor dt_bias,
                                                    std::vector<int64_t> directions, bool softplus, int64_t chunk,
                                                    bool save_states) {
    CrossInputs in{u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk, {}, {}, {}};
    const CrossSizes s = check_inputs(in);
    const DType dtype = dtype_of(u);
    const CudaContext context(u);
    Tensor y = empty_image_like(u);
    Tensor states =
        save_states ? empty(cross_states_shape(s, chunk), ScalarType::Float, u) : empty_absent(ScalarType::Float, u);
    if (s.batch == 0 || s.tokens() == 0) return {y, states};

    CrossFwdArgs args;
    prepare(args, in, s, false);
    args.y = image_arg(y);
    if (save_states) args.states = static_cast<float*>(states.data_ptr());
    args.shape.aligned = allows_cross_vectors(args, {args.y}, static_cast<int64_t>(u.element_size()));
    check_cuda(launch_cross_scan_fwd(args, dtype, context.stream()), "cross_selective_scan forward");
    return {y, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_selective_scan_bwd(
    Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D, OptTensor dt_weight, OptTensor dt_bias,
    Tensor states, std::vector<int64_t> directions, bool softplus, int64_t chunk) {
    CrossInputs in{u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk, {}, {}, {}};
    const CrossSizes s = check_inputs(in);
    check_image(dy, "dy", shape_of(u), u);
    check_shape(states, "states", cross_states_shape(s, chunk));
    const DType dtype = dtype_of(u);
    const CudaContext context(u);

    Tensor du = empty_image_like(u);
    Tensor ddt = empty(shape_of(dt), dt.scalar_type(), u), dB = empty(shape_of(B), B.scalar_type(), u);
    Tensor dC = empty(shape_of(C), C.scalar_type(), u), dA = empty(shape_of(A), A.scalar_type(), u);
    Tensor dD = empty_like_or_absent(D, u), ddt_weight = empty_like_or_absent(dt_weight, u);
    Tensor ddt_bias = empty_like_or_absent(dt_bias, u);
    if (s.batch == 0 || s.tokens() == 0) {
        for (Tensor* t : {&dA, &dD, &ddt_weight, &ddt_bias}) torch::stable::zero_(*t);
        return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias};
    }

    CrossBwdArgs args;
    prepare(args, in, s, true);
    dy = canonical_image(dy);
    if (!states.is_contiguous()) states = torch::stable::contiguous(states);
    args.dy = image_arg(dy), args.du = image_arg(du);
    args.states = static_cast<const float*>(states.data_ptr());
    args.ddt = ddt.data_ptr(), args.dB = dB.data_ptr(), args.dC = dC.data_ptr();
    args.shape.aligned = allows_cross_vectors(args, {args.dy, args.du}, static_cast<int64_t>(u.element_size()));

    const bool is_float = u.scalar_type() == ScalarType::Float;
    ReduceArgs features;  // of all slices
    Tensor slice_parts;
    if (args.slices > 1) {
        features.rows = args.slices;
        features.counts[0] = s.rank > 0 ? ddt.numel() : 0, features.counts[1] = dB.numel();
        features.counts[2] = dC.numel();
        features.columns = features.row_stride = features.counts[0] + features.counts[1] + features.counts[2];
        features.targets[0] = {args.ddt, is_float}, features.targets[1] = {args.dB, is_float};
        features.targets[2] = {args.dC, is_float};
        slice_parts = empty({args.slices, features.columns}, ScalarType::Float, u);
        float* parts = static_cast<float*>(slice_parts.data_ptr());
        features.partials = parts;
        args.slice_stride = features.columns;
        if (s.rank > 0) args.ddt = parts;
        args.dB = parts + features.counts[0], args.dC = parts + features.counts[0] + features.counts[1];
    }
    const int64_t warps = args.shape.threads / 32, rows = s.states + kFixedRows + s.rank, all = s.groups * s.scans;
    const Tensor partials = empty({s.batch, warps, all, rows, s.dim}, ScalarType::Float, u);
    args.partials = static_cast<float*>(partials.data_ptr());
    check_cuda(launch_cross_scan_bwd(args, dtype, context.stream()), "cross_selective_scan backward");
    if (args.slices > 1) {
        check_cuda(launch_reduce_columns(features, dtype, context.stream()), "cross_selective_scan slice sums");
    }

    ScanReduceArgs reduce;
    reduce.partials = args.partials;
    reduce.batch = s.batch, reduce.parts = static_cast<int>(warps), reduce.groups = static_cast<int>(all);
    reduce.dim = args.shape.dim, reduce.states = args.shape.states, reduce.rank = args.shape.rank;
    reduce.dA = param_out(dA, A), reduce.dD = param_out(dD, D);
    reduce.ddt_bias = param_out(ddt_bias, dt_bias), reduce.ddt_weight = param_out(ddt_weight, dt_weight);
    check_cuda(launch_scan_reduce(reduce, dtype, context.stream()), "cross_selective_scan parameter sums");
    return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("cross_selective_scan_fwd", TORCH_BOX(&gm::cross_selective_scan_fwd));
    m.impl("cross_selective_scan_bwd", TORCH_BOX(&gm::cross_selective_scan_bwd));
}
