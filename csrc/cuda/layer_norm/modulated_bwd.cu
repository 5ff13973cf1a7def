// SPDX-License-Identifier: Apache-2.0
// Backward of modulated_layer_norm, in one read of dy, o and x and one write of their gradients and, where wanted, of
// the forward's result.
//
//   n = (p - mean) / sqrt(variance + eps),  p = o * scale * x * gate;  h = dy weight
//   dp = (h - mean(h) - n mean(h n)) / sqrt(variance + eps);  do = dp * scale * x * gate,  dx = dp * scale * o * gate
//   dweight = sum dy n,  dbias = sum dy;  with S = sum over an image of dp * o * x:
//   dgate = scale * S,  dscale = sum over images and channels of gate * S
//
// The sums of a block are one row for each strip; the caller adds the rows.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/layer_norm/image.cuh"
#include "cuda/layer_norm/launch.h"

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

// Unless an image may be any, loads are one step ahead, and the first come before the table.
template <class T, class Tile, NormAccess kAccess>
__global__ void __launch_bounds__(kNormThreads, fitted_blocks(NormPass::kBackward, Tile::kVectors))
    modulated_layer_norm_bwd_kernel(const __grid_constant__ ModulatedBwdArgs args) {
    begin_kernel();
    constexpr int kVecs = Tile::kVectors;
    enum { kModulation, kWeight, kBias };
    constexpr bool kAhead = kAccess != NormAccess::kAny &&
                            sizeof(T) == 2;  // with float, the data of a step would take the registers of the sums
    __shared__ SlotRows<3, Tile::kWidth> table;
    __shared__ VectorOffsets<kVecs> dy_offsets, o_offsets, x_offsets, d_o_offsets, dx_offsets;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float scale = load_param<T>(args.scale, 0);
    GroupCursor<const T, Tile, kAccess> o_in(args.o, s, strip, tile, o_offsets),
        x_in(args.x, s, strip, tile, x_offsets), dy_in(args.dy, s, strip, tile, dy_offsets);
    GroupCursor<T, Tile, kAccess> d_o_out(args.d_o, s, strip, tile, d_o_offsets),
        dx_out(args.dx, s, strip, tile, dx_offsets);
    typename decltype(x_in)::Stored o_stored, x_stored, dy_stored, o_next, x_next;
    const auto load = [&](int left, auto& o, auto& x) {
        o_in.load(tile, left, o);
        x_in.load(tile, left, x);
        o_in.advance(), x_in.advance();
    };
    const auto load_dy = [&](int left) {
        dy_in.load(tile, left, dy_stored);
        dy_in.advance();
    };
    if (kAhead) load(strip.end - strip.first, o_stored, x_stored), load_dy(strip.end - strip.first);
    table.fill(s, args.plan, [&](int c, float(&row)[3]) {
        row[kModulation] = scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f);
        row[kWeight] = load_param<T>(args.weight, c);
        row[kBias] = load_param_or<T>(args.bias, c, 0.f);
    });
    __syncthreads();

    typename Tile::Values dweight = {}, dbias = {}, products = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::Values normed, h;
        tile.step(left);
        if (kAhead)
            load(left - args.plan.step, o_next, x_next);
        else
            load(left, o_stored, x_stored), load_dy(left);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec], o[kVec], x[kVec];
            table.get(kModulation, tile.slot(v), factor);
            o_in.widen(tile, v, o_stored, o);
            x_in.widen(tile, v, x_stored, x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) normed[v][j] = __fmul_rn(x[j], o[j] * factor[j]);
        }
        const float inverse_std = tile.normalise(s.eps, normed);
        if (args.y != nullptr) {  // dy_in is one step ahead
            const int64_t distance = static_cast<T*>(args.y) - static_cast<const T*>(args.dy.ptr);
            const GroupCursor<T, Tile, kAccess> y_out(dy_in, distance - dy_in.step);
            y_out.store(tile, [&](int v, float(&y)[kVec]) {
                float weight[kVec], bias[kVec];
                table.get(kWeight, tile.slot(v), weight);
                table.get(kBias, tile.slot(v), bias);
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[j] = fmaf(normed[v][j], weight[j], bias[j]);
            });
        }
#pragma unroll
        for (int v = 0; v < kVecs; ++v) dy_in.widen(tile, v, dy_stored, h[v]);
        if (kAhead) load_dy(left - args.plan.step);
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
        tile.normalise_backward(normed, h);
        // normed's registers take dx; do and dx are 0 in the padding, where o, x and the factor are
        d_o_out.store(tile, [&](int v, float(&d_o)[kVec]) {
            float factor[kVec], o[kVec], x[kVec];
            table.get(kModulation, tile.slot(v), factor);
            o_in.widen(tile, v, o_stored, o);
            x_in.widen(tile, v, x_stored, x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float dp = __fmul_rn(inverse_std, h[v][j]), through_o = dp * o[j];
                products[v][j] = fmaf(through_o, x[j], products[v][j]);
                d_o[j] = dp * (x[j] * factor[j]);
                normed[v][j] = through_o * factor[j];
            }
        });
        dx_out.store(tile, [&](int v, float(&dx)[kVec]) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) dx[j] = normed[v][j];
        });
        d_o_out.advance(), dx_out.advance();
        if (kAhead)
#pragma unroll
            for (int v = 0; v < kVecs; ++v) o_stored[v] = o_next[v], x_stored[v] = x_next[v];
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

// Rows too wide for registers: first the statistics, a warp a token; then every thread takes a channel of all tokens.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    modulated_layer_norm_bwd_wide_kernel(const __grid_constant__ ModulatedBwdArgs args) {
    begin_kernel();
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const WideImage<const T> o(args.o, s, strip), x(args.x, s, strip), dy(args.dy, s, strip);
    const WideImage<T> d_o(args.d_o, s, strip), dx(args.dx, s, strip);
    NormImage y_image = args.dy;
    y_image.ptr = args.y;
    const WideImage<T> y(y_image, s, strip);
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
        const float bias = load_param_or<T>(args.bias, c, 0.f);
        const int64_t o_at = o.offset(c), x_at = x.offset(c), d_o_at = d_o.offset(c), dx_at = dx.offset(c);
        const int64_t y_at = y.offset(c);
        float dweight = 0.f, dbias = 0.f, products = 0.f;
#pragma unroll 2
        for (int t = 0; t < count; ++t) {
            const float ov = to_float(o(t, o_at)), xv = to_float(x(t, x_at));
            const float normed = rows.normed(t, xv * (ov * f)), g = gradient(t, c);
            const float dp = rows.backward(t, g * weight, normed), through_o = dp * ov;
            d_o(t, d_o_at) = from_float<T>(dp * (xv * f));
            dx(t, dx_at) = from_float<T>(through_o * f);
            if (args.y != nullptr) y(t, y_at) = from_float<T>(fmaf(normed, weight, bias));
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
    if (args.y != nullptr) y.clear_pads(count);
    dscale = block_total(dscale);
    if (threadIdx.x == 0) *out.dscale = dscale;
}

}  // namespace

cudaError_t launch_modulated_layer_norm_bwd(const ModulatedBwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const NormShape& s = args.shape;
        const NormAccess access = std::min({access_of<T>(s, args.o), access_of<T>(s, args.x), access_of<T>(s, args.dy),
                                            access_of<T>(s, args.d_o), access_of<T>(s, args.dx)});
        return dispatch_rows<T, false, kRowVecs>(args.plan, s, access, [&](auto tile, auto chosen) {
            using Tile = typename decltype(tile)::type;
            auto* kernel = modulated_layer_norm_bwd_wide_kernel<T>;
            if constexpr (!std::is_void_v<Tile>) kernel = modulated_layer_norm_bwd_kernel<T, Tile, chosen.value>;
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
