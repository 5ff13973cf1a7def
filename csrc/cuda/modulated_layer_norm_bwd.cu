// SPDX-License-Identifier: Apache-2.0
// Backward of modulated_layer_norm, in one read of dy, o and x and one write of their gradients.
//
//   n = (p - mean) / sqrt(variance + eps),  p = o * scale * x * gate;  h = dy weight
//   dp = (h - mean(h) - n mean(h n)) / sqrt(variance + eps);  do = dp * scale * x * gate,  dx = dp * scale * o * gate
//   dweight = sum dy n,  dbias = sum dy;  with S = sum over an image of dp * o * x:
//   dgate = scale * S,  dscale = sum over images and channels of gate * S
//
// The sums leave the block as one row a strip, which launch_reduce_columns adds.
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/modulated_norm_tile.cuh"

namespace gm {
namespace {

// Where the sums of a strip start in its row of partial sums.
struct PartialRow {
    float *dweight, *dbias, *dscale, *dgate;

    __device__ PartialRow(const ModulatedBwdArgs& args, int64_t strip)
        : dweight(args.partials + strip * (3 * static_cast<int64_t>(args.shape.dim) + 1)),
          dbias(dweight + args.shape.dim),
          dscale(dbias + args.shape.dim),
          dgate(dscale + 1) {}
};

// 0 blocks an SM: ptxas chooses the registers, up to 168, for three blocks or more. Pointers to single elements need
// more, and there its choice would spill some; a bound of two blocks lets it use what it needs.
template <class T, int kVecs, bool kAligned, bool kGroupsAligned>
__global__ void __launch_bounds__(kNormThreads, kAligned ? 0 : 2)
    modulated_layer_norm_bwd_kernel(const __grid_constant__ ModulatedBwdArgs args) {
    using Tile = RowTile<kVecs, kAligned>;
    enum { kModulation, kWeight };
    __shared__ ChannelRows<2, Tile::kWidth> table;
    __shared__ GroupOffsets<Tile::kWidth> offsets, d_o_offsets;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float scale = load_param<T>(args.scale, 0);
    table.fill(s.dim, [&](int c, float(&row)[2]) {
        row[kModulation] = scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f);
        row[kWeight] = load_param<T>(args.weight, c);
    });
    offsets.fill(s, args.o.group);
    d_o_offsets.fill(s, args.d_o.group);
    __syncthreads();
    Cursor<const T> o_in(args.o, strip, tile, 0), x_in(args.x, strip, tile, tile.channel(0)),
        dy_in(args.dy, strip, tile, tile.channel(0));
    Cursor<T> d_o_out(args.d_o, strip, tile, 0), dx_out(args.dx, strip, tile, tile.channel(0));

    typename Tile::Sums dweight = {}, dbias = {}, products = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::template Stored<T> o_stored, x_stored, dy_stored;
        typename Tile::Values normed, h;
        float inverse_std[Tile::kRows];
        tile.sweep(left);
        load_groups<kGroupsAligned>(tile, o_in, offsets, o_stored);
        tile.load([&](int r, int v) { return x_in.at(r, v); }, x_stored);
        tile.load([&](int r, int v) { return dy_in.at(r, v); }, dy_stored);
        o_in.advance(), x_in.advance(), dy_in.advance();
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec];
            table.get(kModulation, tile.channel(v), factor);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                float o[kVec], x[kVec];
                o_stored[r][v].widen(o);
                x_stored[r][v].widen(x);
#pragma unroll
                for (int j = 0; j < kVec; ++j) normed[r][v][j] = __fmul_rn(x[j], o[j] * factor[j]);
            }
        }
        tile.normalise(s.eps, normed, inverse_std);
        tile.widen(dy_stored, h);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float weight[kVec];
            table.get(kWeight, tile.channel(v), weight);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    dweight[v][j] = fmaf(h[r][v][j], normed[r][v][j], dweight[v][j]);
                    dbias[v][j] += h[r][v][j];
                    h[r][v][j] = __fmul_rn(h[r][v][j], weight[j]);
                }
        }
        tile.normalise_backward(normed, inverse_std, h);
        // normed and h make room for do and dx
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec];
            table.get(kModulation, tile.channel(v), factor);
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                float o[kVec], x[kVec];
                o_stored[r][v].widen(o);
                x_stored[r][v].widen(x);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float through_o = h[r][v][j] * o[j];
                    products[v][j] = fmaf(through_o, x[j], products[v][j]);
                    normed[r][v][j] = h[r][v][j] * (x[j] * factor[j]);
                    h[r][v][j] = through_o * factor[j];
                }
            }
        }
        store_groups<kGroupsAligned>(tile, d_o_out, d_o_offsets, normed);
        tile.store([&](int r, int v) { return dx_out.at(r, v); }, h);
        d_o_out.advance(), dx_out.advance();
    }
    const PartialRow out(args, strip.number);
    tile.block_sums(dweight, sums, [&](int c, float sum) { out.dweight[c] = sum; });
    tile.block_sums(dbias, sums, [&](int c, float sum) { out.dbias[c] = sum; });
    float dscale = 0.f;
    tile.block_sums(products, sums, [&](int c, float sum) {
        dscale = fmaf(load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f), sum, dscale);
        out.dgate[c] = scale * sum;
    });
    dscale = block_total(dscale);
    if (threadIdx.x == 0) *out.dscale = dscale;
}

// Rows beyond the registers: statistics first, a warp a token; then every thread takes a channel through all tokens.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    modulated_layer_norm_bwd_wide_kernel(const __grid_constant__ ModulatedBwdArgs args) {
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const auto at = [&](const ImageArg& image) {
        return static_cast<T*>(image.ptr) + strip.batch * image.batch + strip.first * image.token;
    };
    const T *o = at(args.o), *x = at(args.x), *dy = at(args.dy);
    T *d_o = at(args.d_o), *dx = at(args.dx);
    const auto in_group = [&](const ImageArg& image, int c) {
        const int group = c / s.group_dim;
        return group * image.group + (c - group * s.group_dim);
    };
    const float scale = load_param<T>(args.scale, 0);
    const auto factor = [&](int c) { return scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f); };
    const auto value = [&](int t, int c) {
        return to_float(x[t * args.x.token + c]) * (to_float(o[t * args.o.token + in_group(args.o, c)]) * factor(c));
    };
    const auto gradient = [&](int t, int c) { return to_float(dy[t * args.dy.token + c]); };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) {
        rows.statistics(t, s.dim, s.eps, value);
        __syncwarp();
        rows.gradient_means(t, s.dim, value,
                            [&](int, int c) { return gradient(t, c) * load_param<T>(args.weight, c); });
    }
    __syncthreads();
    const PartialRow out(args, strip.number);
    float dscale = 0.f;
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float weight = load_param<T>(args.weight, c), f = factor(c);
        const int64_t o_offset = in_group(args.o, c), d_o_offset = in_group(args.d_o, c);
        float dweight = 0.f, dbias = 0.f, products = 0.f;
#pragma unroll 2
        for (int t = 0; t < count; ++t) {
            const float ov = to_float(o[t * args.o.token + o_offset]), xv = to_float(x[t * args.x.token + c]);
            const float normed = rows.normed(t, xv * (ov * f)), g = gradient(t, c);
            const float dp = rows.backward(t, g * weight, normed), through_o = dp * ov;
            d_o[t * args.d_o.token + d_o_offset] = from_float<T>(dp * (xv * f));
            dx[t * args.dx.token + c] = from_float<T>(through_o * f);
            dweight = fmaf(g, normed, dweight);
            dbias += g;
            products = fmaf(through_o, xv, products);
        }
        out.dweight[c] = dweight;
        out.dbias[c] = dbias;
        out.dgate[c] = scale * products;
        dscale = fmaf(load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f), products, dscale);
    }
    dscale = block_total(dscale);
    if (threadIdx.x == 0) *out.dscale = dscale;
}

}  // namespace

cudaError_t launch_modulated_layer_norm_bwd(const ModulatedBwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return dispatch_rows<kMaxModulatedBwdVecs>(args.plan.vecs, args.shape.aligned, [&](auto vecs, auto aligned) {
            auto* kernel = modulated_layer_norm_bwd_wide_kernel<T>;
            if constexpr (vecs.value > 0) {
                kernel = modulated_layer_norm_bwd_kernel<T, vecs.value, aligned.value, false>;
                if (aligned.value && args.shape.o_aligned)
                    kernel = modulated_layer_norm_bwd_kernel<T, vecs.value, aligned.value, aligned.value>;
            }
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
