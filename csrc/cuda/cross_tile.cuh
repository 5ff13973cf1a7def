// SPDX-License-Identifier: Apache-2.0
// What a block of the cross scan works on: a slice of the channels of one group of one image, along every direction in
// turn. scan_tile.cuh says how it holds a slab of a path.
#pragma once

#include "cuda/cross_plan.h"
#include "cuda/scan_tile.cuh"

namespace gm {

struct CrossTile : Tile {
    int first;  // the slice's first channel in its group

    __device__ explicit CrossTile(const CrossArgs& args)
        : Tile(blockIdx.x / args.slices / args.shape.groups, blockIdx.x / args.slices % args.shape.groups,
               args.shape.lanes, args.shape.dim - slice(args) * args.shape.lanes * kVec),
          first(slice(args) * args.shape.lanes * kVec) {}
    static __device__ __forceinline__ int slice(const CrossArgs& args) { return blockIdx.x % args.slices; }
    // Of group and direction, among all.
    __device__ __forceinline__ int64_t scan(const CrossArgs& args, int k) const {
        return static_cast<int64_t>(group) * args.scans + k;
    }
    // Of the states saved along direction k, the `chunk`-th, at state 0 and this thread's first channel.
    __device__ __forceinline__ int64_t state(const CrossArgs& args, int k, int64_t chunk) const {
        const ScanShape& s = args.shape;
        const int64_t path = (group * s.batch + batch) * args.scans + k;
        return (path * args.num_chunks + chunk) * s.states * s.dim + first + channel;
    }
};

using CrossExchange = ScanExchange<kCrossFwdThreads / 32, kCrossChannels>;

// This thread's sums over the directions: those of token t at [t * lanes].
__device__ __forceinline__ float4* cross_sums(const CrossArgs& args, const CrossTile& tile, float4* shared) {
    if (args.sums_bytes > 0) return shared + tile.lane();
    const int64_t plane = static_cast<int64_t>(args.shape.height) * args.shape.width * tile.lanes;
    return reinterpret_cast<float4*>(args.sums) + blockIdx.x * plane + tile.lane();
}

template <class T>
__device__ __forceinline__ Vec4<T> load4(const T* p, int valid, bool aligned) {
    return aligned ? load4<true>(p, valid) : load4<false>(p, valid);
}
template <class T>
__device__ __forceinline__ void store4(T* p, const float (&x)[kVec], int valid, bool aligned) {
    if (aligned) {
        store4<true>(p, x, valid);
    } else {
        store4<false>(p, x, valid);
    }
}

// Adds x to the sum over the directions: the first one of `scans` sets it, the last leaves it in x.
__device__ __forceinline__ void add_scan(float4* sum, int k, int scans, float (&x)[kVec]) {
    if (k > 0) {
        const float4 v = *sum;
        x[0] += v.x, x[1] += v.y, x[2] += v.z, x[3] += v.w;
    }
    if (k + 1 < scans) *sum = make_float4(x[0], x[1], x[2], x[3]);
}

}  // namespace gm
