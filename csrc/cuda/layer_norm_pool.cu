// SPDX-License-Identifier: Apache-2.0
// LayerNorm over the channels of an image together with the mean of its result over the image, and the backward of
// both.
//
//   n = (x - mean) / sqrt(variance + eps) over C;  xn = n weight + bias;  pooled = mean over H, W of xn before rounding
//   g = dxn + dpooled / (H W);  h = g weight;  dx = (h - mean(h) - n mean(h n)) / sqrt(variance + eps)
//   dweight = sum g n,  dbias = sum g
//
// One read of the inputs and one write. Sums over tokens leave the block as one row a strip, which
// launch_reduce_columns adds.
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/norm_tile.cuh"

namespace gm {
namespace {

template <class T, int kVecs, bool kAligned>
__global__ void __launch_bounds__(kNormThreads) layer_norm_pool_fwd_kernel(const __grid_constant__ PoolFwdArgs args) {
    using Tile = RowTile<kVecs, kAligned>;
    enum { kWeight, kBias };
    __shared__ ChannelRows<2, Tile::kWidth> table;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    table.fill(s.dim, [&](int c, float(&row)[2]) {
        row[kWeight] = load_param<T>(args.weight, c);
        row[kBias] = load_param<T>(args.bias, c);
    });
    __syncthreads();
    Cursor<const T> x_in(args.x, strip, tile, tile.channel(0));
    Cursor<T> xn_out(args.xn, strip, tile, tile.channel(0));

    typename Tile::Sums normed = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::template Stored<T> stored;
        typename Tile::Values x;
        float inverse_std[Tile::kRows];
        tile.sweep(left);
        tile.load([&](int r, int v) { return x_in.at(r, v); }, stored);
        x_in.advance();
        tile.widen(stored, x);
        tile.normalise(s.eps, x, inverse_std);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float weight[kVec], bias[kVec];
            table.get(kWeight, tile.channel(v), weight);
            table.get(kBias, tile.channel(v), bias);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    normed[v][j] += x[r][v][j];
                    x[r][v][j] = fmaf(x[r][v][j], weight[j], bias[j]);
                }
        }
        tile.store([&](int r, int v) { return xn_out.at(r, v); }, x);
        xn_out.advance();
    }
    float* out = args.partials + strip.number * s.dim;
    const float count = strip.end - strip.first;
    tile.block_sums(normed, sums, [&](int c, float sum) {
        out[c] = fmaf(table.rows[kWeight][c], sum, count * table.rows[kBias][c]);
    });
}

template <class T, int kVecs, bool kAligned>
__global__ void __launch_bounds__(kNormThreads) layer_norm_pool_bwd_kernel(const __grid_constant__ PoolBwdArgs args) {
    using Tile = RowTile<kVecs, kAligned>;
    enum { kWeight, kPooled };
    __shared__ ChannelRows<2, Tile::kWidth> table;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float inverse_tokens = 1.f / s.tokens;
    table.fill(s.dim, [&](int c, float(&row)[2]) {
        row[kWeight] = load_param<T>(args.weight, c);
        row[kPooled] = __fmul_rn(args.dpooled[strip.batch * s.dim + c], inverse_tokens);
    });
    __syncthreads();
    Cursor<const T> x_in(args.x, strip, tile, tile.channel(0)), dxn_in(args.dxn, strip, tile, tile.channel(0));
    Cursor<T> dx_out(args.dx, strip, tile, tile.channel(0));

    typename Tile::Sums dweight = {}, dbias = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::template Stored<T> x_stored, dxn_stored;
        typename Tile::Values normed, g;
        float inverse_std[Tile::kRows];
        tile.sweep(left);
        tile.load([&](int r, int v) { return x_in.at(r, v); }, x_stored);
        tile.load([&](int r, int v) { return dxn_in.at(r, v); }, dxn_stored);
        x_in.advance(), dxn_in.advance();
        tile.widen(x_stored, normed);
        tile.widen(dxn_stored, g);
        tile.normalise(s.eps, normed, inverse_std);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float weight[kVec], pooled[kVec];
            table.get(kWeight, tile.channel(v), weight);
            table.get(kPooled, tile.channel(v), pooled);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float total = tile.exists[r] ? g[r][v][j] + pooled[j] : 0.f;
                    dweight[v][j] = fmaf(total, normed[r][v][j], dweight[v][j]);
                    dbias[v][j] += total;
                    g[r][v][j] = __fmul_rn(total, weight[j]);
                }
        }
        tile.normalise_backward(normed, inverse_std, g);
        tile.store([&](int r, int v) { return dx_out.at(r, v); }, g);
        dx_out.advance();
    }
    float* out = args.partials + strip.number * 2 * s.dim;
    tile.block_sums(dweight, sums, [&](int c, float sum) { out[c] = sum; });
    tile.block_sums(dbias, sums, [&](int c, float sum) { out[s.dim + c] = sum; });
}

// Rows beyond the registers: statistics first, a warp a token; then every thread takes a channel through all tokens.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_pool_fwd_wide_kernel(const __grid_constant__ PoolFwdArgs args) {
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const T* x = static_cast<const T*>(args.x.ptr) + strip.batch * args.x.batch + strip.first * args.x.token;
    T* xn = static_cast<T*>(args.xn.ptr) + strip.batch * args.xn.batch + strip.first * args.xn.token;
    const auto value = [&](int t, int c) { return to_float(x[t * args.x.token + c]); };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) rows.statistics(t, s.dim, s.eps, value);
    __syncthreads();
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float weight = load_param<T>(args.weight, c), bias = load_param<T>(args.bias, c);
        float sum = 0.f;
        for (int t = 0; t < count; ++t) {
            const float out = fmaf(rows.normed(t, value(t, c)), weight, bias);
            xn[t * args.xn.token + c] = from_float<T>(out);
            sum += out;
        }
        args.partials[strip.number * s.dim + c] = sum;
    }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_pool_bwd_wide_kernel(const __grid_constant__ PoolBwdArgs args) {
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const float inverse_tokens = 1.f / s.tokens;
    const T* x = static_cast<const T*>(args.x.ptr) + strip.batch * args.x.batch + strip.first * args.x.token;
    const T* dxn = static_cast<const T*>(args.dxn.ptr) + strip.batch * args.dxn.batch + strip.first * args.dxn.token;
    T* dx = static_cast<T*>(args.dx.ptr) + strip.batch * args.dx.batch + strip.first * args.dx.token;
    const float* dpooled = args.dpooled + strip.batch * s.dim;
    const auto value = [&](int t, int c) { return to_float(x[t * args.x.token + c]); };
    const auto gradient = [&](int t, int c) {
        return fmaf(dpooled[c], inverse_tokens, to_float(dxn[t * args.dxn.token + c]));
    };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) {
        rows.statistics(t, s.dim, s.eps, value);
        __syncwarp();
        rows.gradient_means(t, s.dim, value,
                            [&](int, int c) { return gradient(t, c) * load_param<T>(args.weight, c); });
    }
    __syncthreads();
    float* out = args.partials + strip.number * 2 * s.dim;
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float weight = load_param<T>(args.weight, c);
        float dweight = 0.f, dbias = 0.f;
        for (int t = 0; t < count; ++t) {
            const float normed = rows.normed(t, value(t, c)), g = gradient(t, c);
            dx[t * args.dx.token + c] = from_float<T>(rows.backward(t, g * weight, normed));
            dweight = fmaf(g, normed, dweight);
            dbias += g;
        }
        out[c] = dweight;
        out[s.dim + c] = dbias;
    }
}

}  // namespace

cudaError_t launch_layer_norm_pool_fwd(const PoolFwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return dispatch_rows(args.plan.vecs, args.shape.aligned, [&](auto vecs, auto aligned) {
            auto* kernel = layer_norm_pool_fwd_wide_kernel<T>;
            if constexpr (vecs.value > 0) kernel = layer_norm_pool_fwd_kernel<T, vecs.value, aligned.value>;
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

cudaError_t launch_layer_norm_pool_bwd(const PoolBwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return dispatch_rows(args.plan.vecs, args.shape.aligned, [&](auto vecs, auto aligned) {
            auto* kernel = layer_norm_pool_bwd_wide_kernel<T>;
            if constexpr (vecs.value > 0) kernel = layer_norm_pool_bwd_kernel<T, vecs.value, aligned.value>;
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
