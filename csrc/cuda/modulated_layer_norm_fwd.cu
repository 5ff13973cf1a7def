// SPDX-License-Identifier: Apache-2.0
// LayerNorm over all channels of a product of images: how the layer merges its groups, in one read and one write.
//
//   y = (p - mean) / sqrt(variance + eps) * weight + bias over C = G D,  p = o * scale * x * gate
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/modulated_norm_tile.cuh"

namespace gm {
namespace {

// 0 blocks an SM: ptxas chooses the registers, 40 to 64. Pointers to single elements and the widest rows need more, and
// there its choice would spill some; a bound of two blocks lets it use what it needs.
template <class T, int kVecs, bool kAligned, bool kGroupsAligned>
__global__ void __launch_bounds__(kNormThreads, kAligned&& kVecs < 8 ? 0 : 2)
    modulated_layer_norm_fwd_kernel(const __grid_constant__ ModulatedFwdArgs args) {
    using Tile = RowTile<kVecs, kAligned>;
    enum { kModulation, kWeight, kBias };
    __shared__ ChannelRows<3, Tile::kWidth> table;
    __shared__ GroupOffsets<Tile::kWidth> offsets;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float scale = load_param<T>(args.scale, 0);
    table.fill(s.dim, [&](int c, float(&row)[3]) {
        row[kModulation] = scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f);
        row[kWeight] = load_param<T>(args.weight, c);
        row[kBias] = load_param<T>(args.bias, c);
    });
    offsets.fill(s, args.o.group);
    __syncthreads();
    Cursor<const T> o_in(args.o, strip, tile, 0), x_in(args.x, strip, tile, tile.channel(0));
    Cursor<T> y_out(args.y, strip, tile, tile.channel(0));

    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::template Stored<T> o_stored, x_stored;
        typename Tile::Values x;
        float inverse_std[Tile::kRows];
        tile.sweep(left);
        load_groups<kGroupsAligned>(tile, o_in, offsets, o_stored);
        tile.load([&](int r, int v) { return x_in.at(r, v); }, x_stored);
        o_in.advance(), x_in.advance();
        tile.widen(x_stored, x);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec];
            table.get(kModulation, tile.channel(v), factor);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                float o[kVec];
                o_stored[r][v].widen(o);
#pragma unroll
                for (int j = 0; j < kVec; ++j) x[r][v][j] = __fmul_rn(x[r][v][j], o[j] * factor[j]);
            }
        }
        tile.normalise(s.eps, x, inverse_std);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float weight[kVec], bias[kVec];
            table.get(kWeight, tile.channel(v), weight);
            table.get(kBias, tile.channel(v), bias);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
                for (int j = 0; j < kVec; ++j) x[r][v][j] = fmaf(x[r][v][j], weight[j], bias[j]);
        }
        tile.store([&](int r, int v) { return y_out.at(r, v); }, x);
        y_out.advance();
    }
}

// Rows beyond the registers: statistics first, a warp a token; then every thread takes a channel through all tokens.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    modulated_layer_norm_fwd_wide_kernel(const __grid_constant__ ModulatedFwdArgs args) {
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const T* o = static_cast<const T*>(args.o.ptr) + strip.batch * args.o.batch + strip.first * args.o.token;
    const T* x = static_cast<const T*>(args.x.ptr) + strip.batch * args.x.batch + strip.first * args.x.token;
    T* y = static_cast<T*>(args.y.ptr) + strip.batch * args.y.batch + strip.first * args.y.token;
    const auto in_group = [&](int c) {
        const int group = c / s.group_dim;
        return group * args.o.group + (c - group * s.group_dim);
    };
    const float scale = load_param<T>(args.scale, 0);
    const auto factor = [&](int c) { return scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f); };
    const auto value = [&](int t, int c) {
        return to_float(x[t * args.x.token + c]) * (to_float(o[t * args.o.token + in_group(c)]) * factor(c));
    };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) rows.statistics(t, s.dim, s.eps, value);
    __syncthreads();
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float weight = load_param<T>(args.weight, c), bias = load_param<T>(args.bias, c), f = factor(c);
        const int64_t o_offset = in_group(c);
#pragma unroll 2
        for (int t = 0; t < count; ++t) {
            const float p = to_float(x[t * args.x.token + c]) * (to_float(o[t * args.o.token + o_offset]) * f);
            y[t * args.y.token + c] = from_float<T>(fmaf(rows.normed(t, p), weight, bias));
        }
    }
}

}  // namespace

cudaError_t launch_modulated_layer_norm_fwd(const ModulatedFwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return dispatch_rows(args.plan.vecs, args.shape.aligned, [&](auto vecs, auto aligned) {
            auto* kernel = modulated_layer_norm_fwd_wide_kernel<T>;
            if constexpr (vecs.value > 0) {
                kernel = modulated_layer_norm_fwd_kernel<T, vecs.value, aligned.value, false>;
                if (aligned.value && args.shape.o_aligned)
                    kernel = modulated_layer_norm_fwd_kernel<T, vecs.value, aligned.value, aligned.value>;
            }
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
