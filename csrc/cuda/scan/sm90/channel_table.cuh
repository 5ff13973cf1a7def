// SPDX-License-Identifier: Apache-2.0
// The table of channel parameters that the sm_90 scan kernels keep in shared memory.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/scan/sm90/tile_scheduler.cuh"

namespace gm {

// Rows of the table, kWidth floats each. The gate is folded into the norm's scale and shift, which are kept for two
// images. Row kWeight + r is dt_weight of step feature r; the number of such rows is even. Where steps are matrix
// products, the weights come at once behind kA, in another order (phases/step_products.cuh).
enum TableRow {
    kBias,
    kSkip,
    kA,
    kCounted,
    kScale,
    kShift = kScale + 2,
    kWeight = kShift + 2,
    kProductWeight = kCounted
};

template <class Block>
__host__ __device__ int weight_rows(const ScanShape& s) {
    if (Block::kProducts) return Block::rank_tiles(s) * Block::kRankTile;
    return Block::kConstantRank > 0 ? Block::kConstantRank : (s.rank + 1) / 2 * 2;
}
template <class Block>
__host__ __device__ int table_rows(const ScanShape& s) {
    return (Block::kProducts ? kProductWeight : kWeight) + weight_rows<Block>(s);
}

// Where the weight of step feature r for channel c stands among the weights of matrix products: in the order of their
// fragments, four to a lane. Rows of products are channels, 16 a lane's group of four, whose place among the lanes
// depends on the tile, so that what reads along the features meets no bank twice either.
__host__ __device__ constexpr int product_weight(int c, int r) {
    const int lane = c / 16 * 4 + r % 4, tile = r / 8 * 8 + c % 16 / 2;
    return (tile * 32 + (lane ^ (tile & 6))) * 4 + c % 2 + r % 8 / 4 * 2;
}

// The bits of a parameter, made a float only when all loads of a thread are in flight.
__device__ __forceinline__ uint32_t load_param_bits(const ParamArg& p, int64_t i) {
    return p.is_float ? static_cast<const uint32_t*>(p.ptr)[i] : static_cast<const uint16_t*>(p.ptr)[i];
}
template <class T>
__device__ __forceinline__ float param_of(const ParamArg& p, uint32_t bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    return p.is_float ? __uint_as_float(bits) : to_float(reinterpret_cast<const T&>(half));
}

// Writes the rows with the gate of an image, in the middle of a tile. This stays a loop: if the compiler spread its
// loads over the tile's code, they would cost registers there, 4 to 8% of the forward and a seventh of the backward.
template <class T, class Block, class Args>
__device__ __forceinline__ void put_gated_rows(const Args& args, float* table, int image, int batch, int group) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * Block::kWidth; i += Block::kThreads) {
        const int row = i / Block::kWidth, c = i % Block::kWidth, dim = Block::real_dim(args.shape);
        const int64_t channel = static_cast<int64_t>(group) * dim + c;
        float value = 0.f;
        if (c < dim) {
            const float gate =
                load_param_or<T>(args.gate, static_cast<int64_t>(batch) * args.shape.groups * dim + channel, 1.f);
            value = gate * load_param_or<T>(row == 0 ? args.norm_weight : args.norm_bias, channel, 0.f);
        }
        table[(row == 0 ? kScale : kShift) * Block::kWidth + image * Block::kWidth + c] = value;
    }
}

// Writes all rows, for the first image. A thread fills a column, or every kRows-th weight of it, and has all of its
// loads in flight before it waits for one. Lanes without channels get a step of 0 and no skip, which keeps their
// values at 0 and out of all sums. Their step weights are those of the last channel that counts: a weight of 0 would
// make NaN of a feature of -inf, which masks a token.
template <class T, class Block, class Args>
__device__ __forceinline__ void put_rows(const Args& args, float* table, int batch, int group) {
    constexpr int kRows = Block::kThreads / Block::kWidth,
                  kMost = Block::kProducts ? Block::kFeatures : Block::kFeatures - 2,
                  kLoads = (kMost + kRows - 1) / kRows;
    const ScanShape& s = args.shape;
    const int c = threadIdx.x % Block::kWidth, first = threadIdx.x / Block::kWidth;
    const int dim = Block::channels(s, group);
    const bool in = first < kRows && c < dim;
    const int64_t group_begin = Block::first_param(s, group), channel = group_begin + c;
    const int64_t weights = (group_begin + min(c, (Block::kBare ? dim : s.norm_dim) - 1)) * s.rank;
    const auto bits_of = [&](const ParamArg& p, bool wanted, int64_t i) {
        return wanted && p.ptr != nullptr ? load_param_bits(p, i) : 0u;
    };
    const bool fills = in && first == 0;
    const uint32_t bias = bits_of(args.dt_bias, fills, channel), skip = bits_of(args.D, fills, channel),
                   A = bits_of(args.A, fills, channel),
                   gate = bits_of(args.gate, fills, static_cast<int64_t>(batch) * s.groups * dim + channel),
                   norm_weight = bits_of(args.norm_weight, fills, channel),
                   norm_bias = bits_of(args.norm_bias, fills, channel);
    uint32_t weight[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int r = first + i * kRows;
        weight[i] = bits_of(args.dt_weight, first < kRows && r < s.rank, weights + r);
    }
    if (first >= kRows) return;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int r = first + i * kRows;
        if (r < weight_rows<Block>(s)) {
            const float value = param_of<T>(args.dt_weight, weight[i]) * kLog2e;
            if constexpr (Block::kProducts)
                table[kProductWeight * Block::kWidth + product_weight(c, r)] = to_tf32(value);
            else
                table[(kWeight + r) * Block::kWidth + c] = value;
        }
    }
    if (first != 0) return;
    if constexpr (!Block::kProducts) {
        const float open = args.gate.ptr != nullptr ? param_of<T>(args.gate, gate) : 1.f;
        table[kScale * Block::kWidth + c] = open * param_of<T>(args.norm_weight, norm_weight);
        table[kShift * Block::kWidth + c] = open * param_of<T>(args.norm_bias, norm_bias);
    }
    table[kBias * Block::kWidth + c] = in ? param_of<T>(args.dt_bias, bias) * kLog2e : -1e30f;
    table[kSkip * Block::kWidth + c] = param_of<T>(args.D, skip);
    table[kA * Block::kWidth + c] = param_of<T>(args.A, A);
    if constexpr (!Block::kProducts) table[kCounted * Block::kWidth + c] = c < s.norm_dim ? 1.f : 0.f;
}

// The rows of the table, for the four channels of a thread.
template <class Block>
struct ChannelRows {
    const float* const table;
    const int& c0;

    __device__ __forceinline__ float4 operator[](int row) const {
        return *reinterpret_cast<const float4*>(table + row * Block::kWidth + c0);
    }
    __device__ __forceinline__ void get(int row, float (&out)[kVec]) const {
        const float4 v = (*this)[row];
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    }
};

}  // namespace gm
