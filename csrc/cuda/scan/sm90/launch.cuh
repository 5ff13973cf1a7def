// SPDX-License-Identifier: Apache-2.0
// What launching a sm_90 scan kernel takes: blocks that run at once, teams that share planes, template arguments.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>
#include <vector>

#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/scan/sm90/inter_block_state.cuh"
#include "cuda/scan/sm90/launch.h"

namespace gm {

// Blocks of a kernel that the current device runs at once.
inline cudaError_t blocks_at_once(const void* kernel, int threads, int shared, int64_t& blocks) {
    struct Known {
        const void* kernel;
        int device, shared;
        int64_t blocks;
    };
    thread_local std::vector<Known> known;
    int device = 0, multiprocessors = 0, resident = 0, cooperative = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    for (const Known& k : known)
        if (k.kernel == kernel && k.device == device && k.shared == shared) return blocks = k.blocks, cudaSuccess;
    error = raise_shared_limit(kernel, shared);
    if (error == cudaSuccess) error = multiprocessors_of_device(multiprocessors);
    if (error == cudaSuccess) error = device_attribute(cudaDevAttrCooperativeLaunch, cooperative);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared);
    if (error != cudaSuccess) return error;
    blocks = cooperative ? int64_t{resident} * multiprocessors : 0;
    known.push_back({kernel, device, shared, blocks});
    return cudaSuccess;
}

// Images that the current device's cache holds, of a pass that reads and writes `tensors` of them; 0 where their groups
// share no 64 bytes, of which the memory moves no fewer.
inline cudaError_t cached_images(const ImageArg& image, const ScanShape& shape, size_t tensors, double& images) {
    images = 0.;
    const bool interleaved = shape.groups > 1 && image.group < image.token;
    if (!interleaved || shape.dim > 16) return cudaSuccess;
    int bytes = 0;
    const cudaError_t error = device_attribute(cudaDevAttrL2CacheSize, bytes);
    const double of_image =
        2. * static_cast<double>(tensors) * static_cast<double>(image.token) * shape.height * shape.width;
    images = bytes / of_image;
    return error;
}

template <class Kernel, class Args>
cudaError_t share_sm90(Kernel kernel, int threads, int shared, size_t tensors, Args& args) {
    int64_t at_once = 0;
    double cached = 0.;
    cudaError_t error = blocks_at_once(reinterpret_cast<const void*>(kernel), threads, shared, at_once);
    if (error == cudaSuccess) error = cached_images(args.scan.u, args.scan.shape, tensors, cached);
    if (error == cudaSuccess) share_planes(args.scan.shape, at_once, cached, args.plan);
    return error;
}

// As many blocks as run at once, `resident` an SM, each with several planes of one group: it loads the next plane while
// it computes, and reads its parameters once (2% at 64 x 56 against a block a plane). Those that share planes wait for
// one another and must all run. How an SM's memory is cut into shared memory and cache is left to the driver: asked for
// the most shared memory, it leaves 28 KB of cache, too little for the features of two planes at 56 x 56, of which a
// slab of columns reads a few of each row: 7% of the forward there, 13% at 112 x 112.
template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, int threads, int resident, int shared, cudaStream_t stream, const Args& args) {
    const ScanShape& shape = args.scan.shape;
    if (args.plan.ways > 1) {
        if (!args.exchange_marked) {
            const size_t bytes = exchange_floats(shape, args.plan) * sizeof(float);
            const cudaError_t error = cudaMemsetAsync(args.exchange, kAbsent & 0xff, bytes, stream);
            if (error != cudaSuccess) return error;
        }
        const int64_t blocks = int64_t{args.plan.teams} * args.plan.ways * shape.groups;
        return launch_at_once(kernel, blocks, threads, shared, stream, args);
    }
    int multiprocessors = 0;
    const cudaError_t error = multiprocessors_of_device(multiprocessors);
    if (error != cudaSuccess) return error;
    const int64_t at_once = std::max(resident * multiprocessors / shape.groups, 1) * int64_t{shape.groups};
    const int64_t blocks = std::min(shape.batch * shape.groups, at_once);
    return launch_kernel(kernel, blocks, threads, shared, stream, args);
}

// f(type tag, std::integral_constant<int, lanes>, std::bool_constant<whole>, std::bool_constant<runs>). Slabs of runs
// are a kernel of their own: what their places cost, in instructions and registers, the others need not pay (5% of the
// backward).
template <class F>
cudaError_t dispatch_sm90(DType dtype, const ScanShape& shape, const SlabPlan& plan, F&& f) {
    const int used = sm90_lanes(shape);
    const bool runs = plan.columns == 0,
               whole = shape.dim == used * kVec && shape.norm_dim == shape.dim && shape.param_dim == shape.dim;
    const auto with_cut = [&](auto tag, auto lanes) {
        return runs ? f(tag, lanes, std::false_type{}, std::true_type{})
                    : f(tag, lanes, std::false_type{}, std::false_type{});
    };
    const auto with_width = [&](auto tag, auto lanes) {
        return whole && !runs ? f(tag, lanes, std::true_type{}, std::false_type{}) : with_cut(tag, lanes);
    };
    const auto with_lanes = [&](auto tag) {
        switch (used) {
            case 4: return with_width(tag, std::integral_constant<int, 4>{});
            case 8: return with_width(tag, std::integral_constant<int, 8>{});
            case 16: return with_width(tag, std::integral_constant<int, 16>{});
            case kNarrowLanes: return with_cut(tag, std::integral_constant<int, kNarrowLanes>{});
            default: return with_cut(tag, std::integral_constant<int, 32>{});  // whole, a few would spill
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
