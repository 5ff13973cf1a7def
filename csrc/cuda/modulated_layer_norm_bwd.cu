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
#include "cuda/norm_tile.cuh"

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

template <class T, int kVecs>
__global__ void __launch_bounds__(kNormThreads)
    modulated_layer_norm_bwd_kernel(const __grid_constant__ ModulatedBwdArgs args) {
    using Tile = RowTile<kVecs>;
    enum { kModulation, kWeight };
    __shared__ SlotRows<2, Tile::kWidth> table;
    __shared__ VectorOffsets<kVecs> dy_offsets, o_offsets, x_offsets, d_o_offsets, dx_offsets;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float scale = load_param<T>(args.scale, 0);
    table.fill(s, [&](int c, float(&row)[2]) {
        row[kModulation] = scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f);
        row[kWeight] = load_param<T>(args.weight, c);
    });
    Cursor<const T, kVecs> o_in(args.o, s, strip, tile, o_offsets), x_in(args.x, s, strip, tile, x_offsets),
        dy_in(args.dy, s, strip, tile, dy_offsets);
    Cursor<T, kVecs> d_o_out(args.d_o, s, strip, tile, d_o_offsets), dx_out(args.dx, s, strip, tile, dx_offsets);
    __syncthreads();

    typename Tile::Values dweight = {}, dbias = {}, products = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::template Stored<T> o_stored, x_stored, dy_stored;
        typename Tile::Values normed, h;
        tile.step(left);
        tile.load(o_in, o_stored);
        tile.load(x_in, x_stored);
        tile.load(dy_in, dy_stored);
        o_in.advance(), x_in.advance(), dy_in.advance();
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec], o[kVec], x[kVec];
            table.get(kModulation, tile.slot(v), factor);
            o_stored[v].widen(o);
            x_stored[v].widen(x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) normed[v][j] = __fmul_rn(x[j], o[j] * factor[j]);
        }
        const float inverse_std = tile.normalise(s.eps, normed);
        tile.widen(dy_stored, h);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float weight[kVec];
            table.get(kWeight, tile.slot(v), weight);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                dweight[v][j] = fmaf(h[v][j], normed[v][j], dweight[v][j]);
                dbias[v][j] += h[v][j];
                h[v][j] = __fmul_rn(h[v][j], weight[j]);
            }
        }
        tile.normalise_backward(normed, inverse_std, h);
        // normed and h make room for do and dx; both are 0 in pads, where o and x are
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec], o[kVec], x[kVec];
            table.get(kModulation, tile.slot(v), factor);
            o_stored[v].widen(o);
            x_stored[v].widen(x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float through_o = h[v][j] * o[j];
                products[v][j] = fmaf(through_o, x[j], products[v][j]);
                normed[v][j] = h[v][j] * (x[j] * factor[j]);
                h[v][j] = through_o * factor[j];
            }
        }
        tile.store(d_o_out, normed);
        tile.store(dx_out, h);
        d_o_out.advance(), dx_out.advance();
    }
    const PartialRow out(args, strip.number);
    tile.block_sums(dweight, sums, [&](int c, int, float sum) { out.dweight[c] = sum; });
    tile.block_sums(dbias, sums, [&](int c, int, float sum) { out.dbias[c] = sum; });
    float dscale = 0.f;
    tile.block_sums(products, sums, [&](int c, int, float sum) {
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
    const WideImage<const T> o(args.o, s, strip), x(args.x, s, strip), dy(args.dy, s, strip);
    const WideImage<T> d_o(args.d_o, s, strip), dx(args.dx, s, strip);
    const float scale = load_param<T>(args.scale, 0);
    const auto factor = [&](int c) { return scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f); };
    const auto value = [&](int t, int c) {
        return to_float(x(t, x.offset(c))) * (to_float(o(t, o.offset(c))) * factor(c));
    };
    const auto gradient = [&](int t, int c) { return to_float(dy(t, dy.offset(c))); };
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
        const int64_t o_at = o.offset(c), x_at = x.offset(c), d_o_at = d_o.offset(c), dx_at = dx.offset(c);
        float dweight = 0.f, dbias = 0.f, products = 0.f;
#pragma unroll 2
        for (int t = 0; t < count; ++t) {
            const float ov = to_float(o(t, o_at)), xv = to_float(x(t, x_at));
            const float normed = rows.normed(t, xv * (ov * f)), g = gradient(t, c);
            const float dp = rows.backward(t, g * weight, normed), through_o = dp * ov;
            d_o(t, d_o_at) = from_float<T>(dp * (xv * f));
            dx(t, dx_at) = from_float<T>(through_o * f);
            dweight = fmaf(g, normed, dweight);
            dbias += g;
            products = fmaf(through_o, xv, products);
        }
        out.dweight[c] = dweight;
        out.dbias[c] = dbias;
        out.dgate[c] = scale * products;
        dscale = fmaf(load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f), products, dscale);
    }
    d_o.clear_pads(count), dx.clear_pads(count);
    dscale = block_total(dscale);
    if (threadIdx.x == 0) *out.dscale = dscale;
}

}  // namespace

cudaError_t launch_modulated_layer_norm_bwd(const ModulatedBwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return dispatch_rows<kRowVecs>(args.plan.vecs, [&](auto vecs) {
            auto* kernel = modulated_layer_norm_bwd_wide_kernel<T>;
            if constexpr (vecs.value > 0) kernel = modulated_layer_norm_bwd_kernel<T, vecs.value>;
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
