// SPDX-License-Identifier: Apache-2.0
// What both directions of modulated_layer_norm share: access to o, whose groups lie apart, next to images of whole
// tokens.
#pragma once

#include "cuda/norm_tile.cuh"

namespace gm {

// Element offsets of all channels within a token of o. The caller's __syncthreads makes them visible.
template <int kWidth>
struct GroupOffsets {
    volatile int64_t of[kWidth];  // volatile for the reason of ChannelRows::get

    __device__ void fill(const NormShape& s, int64_t group_stride) {
        for (int c = threadIdx.x; c < s.dim; c += blockDim.x) {
            const int group = c / s.group_dim;
            of[c] = group * group_stride + (c - group * s.group_dim);
        }
    }
};

// kGroupsAligned: the vectors of a token of o are aligned, and none crosses from one group into the next.
template <bool kGroupsAligned, class T, class Tile, int kWidth>
__device__ __forceinline__ void load_groups(const Tile& tile, const Cursor<const T>& o,
                                            const GroupOffsets<kWidth>& offsets,
                                            Packed<T, kVec> (&out)[Tile::kRows][Tile::kVectors]) {
    if constexpr (kGroupsAligned) {
        tile.load([&](int r, int v) { return o.token(r) + offsets.of[tile.channel(v)]; }, out);
    } else {
        tile.load_each([&](int r, int v, int j) { return o.token(r) + offsets.of[tile.channel(v) + j]; }, out);
    }
}

template <bool kGroupsAligned, class T, class Tile, int kWidth>
__device__ __forceinline__ void store_groups(const Tile& tile, const Cursor<T>& o, const GroupOffsets<kWidth>& offsets,
                                             const typename Tile::Values& x) {
    if constexpr (kGroupsAligned) {
        tile.store([&](int r, int v) { return o.token(r) + offsets.of[tile.channel(v)]; }, x);
    } else {
        tile.store_each([&](int r, int v, int j) { return o.token(r) + offsets.of[tile.channel(v) + j]; }, x);
    }
}

}  // namespace gm
