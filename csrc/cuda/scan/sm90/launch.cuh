// SPDX-License-Identifier: Apache-2.0
// How the sm_90 scan kernels are launched: blocks that run at once, blocks that share planes, template arguments.
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

// Blocks of a kernel that the current device runs at once; 0 where it has no cooperative launches.
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

// Images that fit in the L2 cache of the current device, for a pass that reads and writes `tensors` of them. 0 where
// no two groups share 64 bytes, the least that the memory moves.
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

// As many blocks as run at once, `resident` an SM, each with several planes of one group: a block loads its next plane
// while it computes, and reads its parameters once (2% at 64 x 56 against a block a plane). Blocks that share planes
// wait for one another, so all of them must run at once. The driver decides how an SM's memory is split between shared
// memory and L1 cache. Asked for the most shared memory, it leaves 28 KB of cache, too little for the features of two
// planes at 56 x 56, of which a tile of columns reads a few in each row: 7% of the forward there, 13% at 112 x 112.
template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, int threads, int resident, int shared, cudaStream_t stream, const Args& args) {
    const ScanShape& shape = args.scan.shape;
    if (args.plan.blocks_per_plane > 1) {
        if (!args.inter_block_state_cleared) {
            const size_t bytes = inter_block_floats(shape, args.plan) * sizeof(float);
            const cudaError_t error = cudaMemsetAsync(args.inter_block_state, kNotReady & 0xff, bytes, stream);
            if (error != cudaSuccess) return error;
        }
        const int64_t blocks = int64_t{args.plan.teams} * args.plan.blocks_per_plane * shape.groups;
        return launch_at_once(kernel, blocks, threads, shared, stream, args);
    }
    int multiprocessors = 0;
    const cudaError_t error = multiprocessors_of_device(multiprocessors);
    if (error != cudaSuccess) return error;
    const int64_t at_once = std::max(resident * multiprocessors / shape.groups, 1) * int64_t{shape.groups};
    const int64_t blocks = std::min(shape.batch * shape.groups, at_once);
    return launch_kernel(kernel, blocks, threads, shared, stream, args);
}

// Calls f(type tag, std::integral_constant<int, lanes>, std::bool_constant<whole>, std::bool_constant<runs>). Tiles of
// runs have a kernel of their own: finding a token's place costs instructions and registers there, 5% of the backward,
// which the others need not pay. Of bare scans none is built for whole widths.
template <bool kBare, class F>
cudaError_t dispatch_sm90(DType dtype, const ScanShape& shape, const TilePlan& plan, F&& f) {
    const int used = sm90_lanes(shape);
    const bool runs = plan.columns == 0,
               whole = shape.dim == used * kVec && shape.norm_dim == shape.dim && shape.param_dim == shape.dim;
    const auto with_cut = [&](auto tag, auto lanes) {
        return runs ? f(tag, lanes, std::false_type{}, std::true_type{})
                    : f(tag, lanes, std::false_type{}, std::false_type{});
    };
    const auto with_width = [&](auto tag, auto lanes) {
        if constexpr (kBare)
            return with_cut(tag, lanes);
        else
            return whole && !runs ? f(tag, lanes, std::true_type{}, std::false_type{}) : with_cut(tag, lanes);
    };
    const auto with_lanes = [&](auto tag) {
        switch (used) {
            case 4: return with_width(tag, std::integral_constant<int, 4>{});
            case 8: return with_width(tag, std::integral_constant<int, 8>{});
            case 16: return with_width(tag, std::integral_constant<int, 16>{});
            case kNarrowLanes: return with_cut(tag, std::integral_constant<int, kNarrowLanes>{});
            default:
                return with_cut(tag, std::integral_constant<int, 32>{});  // some of the whole-width kernels would spill
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
