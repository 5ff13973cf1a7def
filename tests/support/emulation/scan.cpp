// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/scan/ on the CPU, for emulation.py: what the op entries of csrc/ops/ do, without torch.
#include <algorithm>
#include <vector>

#include "cuda/images/launch.h"
#include "cuda/scan/launch.h"
#include "cuda/scan/many_states/launch.h"
#include "cuda/scan/plan.h"
#include "cuda/scan/sm90/launch.h"

namespace gm {
namespace {

constexpr int kParameters = 7;
enum Kernel { kPortable, kSm90, kManyStates, kCrossSm90 };  // as in emulation.py

struct Sizes {  // as in emulation.py
    int64_t batch, height, width, groups, dim, states, rank, param_dim, norm_dim;
    int dtype, softplus, aligned;
    float norm_eps;
};

ScanShape shape_of(const Sizes& sizes, const int* directions) {
    ScanShape s{};
    s.batch = sizes.batch, s.scans = 1;
    s.height = static_cast<int>(sizes.height), s.width = static_cast<int>(sizes.width);
    s.groups = static_cast<int>(sizes.groups), s.dim = static_cast<int>(sizes.dim);
    s.states = static_cast<int>(sizes.states), s.rank = static_cast<int>(sizes.rank);
    s.param_dim = static_cast<int>(sizes.param_dim), s.norm_dim = static_cast<int>(sizes.norm_dim);
    s.lanes = scan_lanes(s.dim);
    s.softplus = sizes.softplus != 0, s.aligned = sizes.aligned != 0, s.norm_eps = sizes.norm_eps;
    for (int g = 0; g < s.groups; ++g) s.directions[g / 16] |= static_cast<uint32_t>(directions[g]) << (2 * (g % 16));
    return s;
}

template <class Args>
void set_inputs(Args& args, const ScanShape& s, const ImageArg* images, const ParamArg* parameters) {
    args.shape = s;
    args.u = images[0], args.dt = images[1], args.B = images[2], args.C = images[3], args.z = images[4];
    ParamArg* const places[kParameters] = {&args.A,           &args.D,         &args.dt_weight, &args.dt_bias,
                                           &args.norm_weight, &args.norm_bias, &args.gate};
    for (int i = 0; i < kParameters; ++i) *places[i] = parameters[i];
    args.chunk = static_cast<int>(scan_chunk(s.dim, s.states));
    args.num_chunks = scan_saved_states(s.height, s.width, s.dim, args.chunk);
}

int64_t tokens_of(const ScanShape& s) { return static_cast<int64_t>(s.height) * s.width; }
std::vector<float> carry_of(const ScanShape& s) {
    return std::vector<float>(s.states > 1 ? 2 * s.batch * s.groups * s.states * s.dim : 0);
}

// A cross scan: its scans of the first slice of channels, then those of the next (sm90/launch.h).
int64_t cut_into_slices(ScanShape& s) {
    const int64_t width = scan_slice_room(s.dim), slices = (s.dim + width - 1) / width;
    s.scans = s.groups, s.groups *= static_cast<int>(slices);
    s.dim = s.norm_dim = static_cast<int>(width);
    for (int g = s.scans; g < s.groups; ++g) {
        const uint32_t direction = s.directions[g % s.scans / 16] >> (2 * (g % s.scans % 16)) & 3;
        s.directions[g / 16] |= direction << (2 * (g % 16));
    }
    s.lanes = scan_lanes(s.dim);
    return slices;
}

const char* forward(Kernel kernel, ScanShape s, DType dtype, const ImageArg* images, const ParamArg* parameters,
                    float* states) {
    if (kernel == kCrossSm90) cut_into_slices(s);
    ScanFwdArgs args;
    set_inputs(args, s, images, parameters);
    args.y = images[5], args.states = states;
    std::vector<float> carry = carry_of(s);
    if (states == nullptr && s.states > 1) args.carry = carry.data();
    if (kernel == kManyStates) {
        ManyStatesLayout layout;
        if (const char* const why_not = plan_many_states(s, false, layout)) return why_not;
        args.shape.threads = layout.threads;
        return emulation::problem_of(launch_many_states_fwd(args, layout, dtype, nullptr));
    }
    if (kernel == kPortable) {
        args.shape.threads = scan_fwd_threads(s.lanes, tokens_of(s));
        return emulation::problem_of(launch_grouped_scan_fwd(args, dtype, nullptr));
    }
    ScanFwdSm90Args own{};
    own.scan = args;
    const bool cross = kernel == kCrossSm90;
    if (!(cross ? prepare_cross_scan_fwd_sm90 : prepare_grouped_scan_fwd_sm90)(dtype, own)) return "no tensor map";
    if ((cross ? share_cross_scan_fwd_sm90 : share_grouped_scan_fwd_sm90)(own, dtype) != cudaSuccess)
        return "not shared";
    return emulation::problem_of(
        (cross ? launch_cross_scan_fwd_sm90 : launch_grouped_scan_fwd_sm90)(own, dtype, nullptr));
}

const char* backward(Kernel kernel, ScanShape s, DType dtype, const ImageArg* images, const ParamArg* parameters,
                     const float* states, const ImageArg* gradients, const ParamOut* parameter_gradients) {
    const int64_t slices = kernel == kCrossSm90 ? cut_into_slices(s) : 1;
    ScanBwdArgs args;
    set_inputs(args, s, images, parameters);
    args.dy = images[5], args.states = states;
    args.du = gradients[0], args.ddt = gradients[1], args.dB = gradients[2], args.dC = gradients[3];
    args.dz = gradients[4];
    std::vector<float> carry = carry_of(s);
    if (s.states > 1) args.carry = carry.data();
    // Each slice's gradients of features, which are added up.
    std::vector<uint16_t> parts[3];
    const int64_t scan_tokens = s.batch * tokens_of(s) * s.scans,
                  elements[3] = {scan_tokens * s.rank, scan_tokens, scan_tokens};
    ImageArg* const features[3] = {&args.ddt, &args.dB, &args.dC};
    for (int i = 0; i < 3 && slices > 1; ++i) {
        parts[i].assign(elements[i] * slices, 0xffff);
        features[i]->ptr = parts[i].data(), features[i]->scan = elements[i];
    }
    std::vector<float> partials;
    const auto partials_of = [&](int parts) {
        partials.assign(s.batch * parts * s.groups * (s.states + kFixedRows + s.rank) * std::max(s.dim, s.param_dim),
                        NAN);
        return partials.data();
    };
    ScanReduceArgs sums;
    cudaError_t done = cudaSuccess;
    if (kernel == kManyStates) {
        ManyStatesLayout layout;
        if (const char* const why_not = plan_many_states(s, true, layout)) return why_not;
        args.shape.threads = layout.threads;
        sums.parts = layout.parts, sums.state_parts = 1;
        args.partials = partials_of(sums.parts);
        done = launch_many_states_bwd(args, layout, dtype, nullptr);
    } else if (kernel == kSm90 || kernel == kCrossSm90) {
        ScanBwdSm90Args own{};
        own.scan = args;
        own.scan.shape.threads = kTileThreads;
        const bool cross = kernel == kCrossSm90;
        if (!(cross ? prepare_cross_scan_bwd_sm90 : prepare_grouped_scan_bwd_sm90)(dtype, own)) return "no tensor map";
        if ((cross ? share_cross_scan_bwd_sm90 : share_grouped_scan_bwd_sm90)(own, dtype) != cudaSuccess)
            return "not shared";
        sums.parts = sums.state_parts = own.plan.blocks_per_plane;
        own.scan.partials = partials_of(sums.parts);
        done = (cross ? launch_cross_scan_bwd_sm90 : launch_grouped_scan_bwd_sm90)(own, dtype, nullptr);
    } else {
        args.shape.threads = scan_bwd_threads(s.lanes, tokens_of(s), s.states == 1, dtype == DType::kFloat ? 4 : 2);
        sums.parts = sums.state_parts = args.shape.threads / 32;
        args.partials = partials_of(sums.parts);
        done = launch_grouped_scan_bwd(args, dtype, nullptr);
    }
    if (done != cudaSuccess) return cudaGetErrorString(done);
    sums.partials = partials.data(), sums.batch = s.batch, sums.groups = s.groups;
    sums.dim = kernel == kCrossSm90 ? s.dim : s.param_dim, sums.param_dim = s.param_dim,
    sums.scans = kernel == kCrossSm90 ? s.scans : 0;
    for (int i = 0; i < 3 && slices > 1; ++i) {
        const SumImagesArgs of_slices{parts[i].data(), gradients[i + 1].ptr, elements[i], elements[i],
                                      static_cast<int>(slices)};
        if (launch_sum_images(of_slices, dtype, nullptr) != cudaSuccess) return "slices not added up";
    }
    sums.states = s.states, sums.rank = s.rank;
    sums.norm_weight = args.norm_weight, sums.norm_bias = args.norm_bias, sums.gate = args.gate;
    ParamOut* const places[kParameters] = {&sums.dA,           &sums.dD,         &sums.ddt_weight, &sums.ddt_bias,
                                           &sums.dnorm_weight, &sums.dnorm_bias, &sums.dgate};
    for (int i = 0; i < kParameters; ++i) *places[i] = parameter_gradients[i];
    return launch_scan_reduce(sums, dtype, nullptr) == cudaSuccess ? nullptr : "sums not launched";
}

}  // namespace
}  // namespace gm

// States that a forward saves for a backward, in floats.
extern "C" int64_t emulated_scan_states(const gm::Sizes* sizes) {
    // Of a cross scan that of its slices, which are as many channels or more.
    const int64_t width = gm::scan_slice_room(sizes->dim);
    const int64_t dim = sizes->dim <= gm::kMaxScanDim ? sizes->dim : width, chunk = gm::scan_chunk(dim, sizes->states);
    return sizes->batch * sizes->groups * sizes->states * ((sizes->dim + width - 1) / width * width) *
           gm::scan_saved_states(sizes->height, sizes->width, dim, chunk);
}

// Null, or what went wrong. Images are u, dt, B, C, z and y (backward: dy); parameters and their gradients A, D,
// dt_weight, dt_bias, norm_weight, norm_bias and gate.
extern "C" const char* emulated_scan_fwd(int kernel, const gm::Sizes* sizes, const int* directions,
                                         const gm::ImageArg* images, const gm::ParamArg* parameters, float* states) {
    const gm::ScanShape shape = gm::shape_of(*sizes, directions);
    return gm::forward(static_cast<gm::Kernel>(kernel), shape, static_cast<gm::DType>(sizes->dtype), images, parameters,
                       states);
}
extern "C" const char* emulated_scan_bwd(int kernel, const gm::Sizes* sizes, const int* directions,
                                         const gm::ImageArg* images, const gm::ParamArg* parameters,
                                         const float* states, const gm::ImageArg* gradients,
                                         const gm::ParamOut* parameter_gradients) {
    const gm::ScanShape shape = gm::shape_of(*sizes, directions);
    return gm::backward(static_cast<gm::Kernel>(kernel), shape, static_cast<gm::DType>(sizes->dtype), images,
                        parameters, states, gradients, parameter_gradients);
}
