// SPDX-License-Identifier: Apache-2.0
// LayerNorm over the channels of an image together with the mean of its result over the image, and the backward of
// both.
//
//   n = (x - mean) / sqrt(variance + eps) over C;  xn = n weight + bias;  pooled = mean over H, W of xn before rounding
//   [x is an image plus x_bias, whose gradient is the sum of dx]
//   [sum = x + sum_bias: a later product adds its result to it, which completes the residual stream; sum_bias and the
//    sums of dx_more are multiplied by the drop-path factor of the image]
//   g = dxn [+ dxn_more] [+ dpooled / (H W)];  h = g weight
//   dx = (h - mean(h) - n mean(h n)) / sqrt(variance + eps) [+ dx_more];  dweight = sum g n,  dbias = sum g
//
// One read of the inputs and one write. xn and its gradients may be grouped and padded where x is not. The sums of a
// block over its tokens are one row for each strip; the caller adds the rows. The forward, which is the first kernel
// of a layer, also marks memory "not ready" for the scan of that layer (scan/sm90/inter_block_state.cuh).
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/layer_norm/image.cuh"
#include "cuda/layer_norm/launch.h"
#include "cuda/scan/sm90/inter_block_state.cuh"

namespace gm {
namespace {

// Called by all blocks.
__device__ __forceinline__ void clear_inter_block_state(const PoolFwdArgs& args) {
    for (int64_t i = int64_t{blockIdx.x} * kNormThreads + threadIdx.x; i < args.inter_block_floats;
         i += int64_t{gridDim.x} * kNormThreads)
        args.inter_block_state[i] = __uint_as_float(kNotReady);
}

// Unless an image may be any, loads are one step ahead, and the first come before the tables.
template <class T, class Tile, NormAccess kAccess>
__global__ void __launch_bounds__(kNormThreads, fitted_blocks(NormPass::kForward, Tile::kVectors))
    layer_norm_pool_fwd_kernel(const __grid_constant__ PoolFwdArgs args) {
    begin_kernel();
    constexpr int kVecs = Tile::kVectors;
    constexpr bool kAhead = kAccess != NormAccess::kAny;
    enum { kWeight, kBias, kAdded };  // kAdded: to sum, or to x
    __shared__ SlotRows<3, Tile::kWidth> table;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    __shared__ VectorOffsets<kVecs> x_offsets, xn_offsets, sum_offsets;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const bool add = args.sum.ptr != nullptr, biased = kVecs <= kRowVecs && args.x_bias.ptr != nullptr;
    PixelCursor<const T, Tile, kAccess> x_in(args.x, s, strip, tile, x_offsets);
    GroupCursor<T, Tile, kAccess> xn_out(args.xn, s, strip, tile, xn_offsets);
    PixelCursor<T, Tile, kAccess> sum_out(args.sum, s, strip, tile, sum_offsets);
    typename decltype(x_in)::Stored stored;
    const auto load = [&](int left) {
        x_in.load(tile, left, stored);
        x_in.advance();
    };
    if (kAhead) load(strip.end - strip.first);
    table.fill_at_once(s, args.plan, [&](int c, float(&row)[3]) {
        row[kWeight] = load_param<T>(args.weight, c);
        row[kBias] = load_param<T>(args.bias, c);
        row[kAdded] = biased ? load_param<T>(args.x_bias, c)
                             : drop_path_factor(args.drop_path, strip.batch) * load_param_or<T>(args.sum_bias, c, 0.f);
    });
    if (add) clear_tails<T>(args.sum, s, strip);
    clear_inter_block_state(args);
    __syncthreads();

    typename Tile::Values normed = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::Values x;
        tile.step(left);
        if (!kAhead) load(left);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) x_in.widen(tile, v, stored, x[v]);
        if (kAhead) load(left - args.plan.step);
        if (biased) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                float bias[kVec];
                table.get(kAdded, tile.slot(v), bias);
#pragma unroll
                for (int j = 0; j < kVec; ++j) x[v][j] += bias[j];
            }
        }
        if (add) {
            sum_out.store(tile, [&](int v, float(&sum)[kVec]) {
                table.get(kAdded, tile.slot(v), sum);
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum[j] += x[v][j];
            });
            sum_out.advance();
        }
        tile.normalise(s.eps, x);
        xn_out.store(tile, [&](int v, float(&out)[kVec]) {
            float weight[kVec], bias[kVec];
            table.get(kWeight, tile.slot(v), weight);
            table.get(kBias, tile.slot(v), bias);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                normed[v][j] += x[v][j];
                out[j] = fmaf(x[v][j], weight[j], bias[j]);
            }
        });
        xn_out.advance();
    }
    if (args.partials == nullptr) return;
    float* out = args.partials + strip.number * s.dim;
    const float count = strip.end - strip.first;
    tile.block_sums(normed, sums, [&](int c, int slot, float sum) {
        out[c] = fmaf(table.rows[kWeight][slot], sum, count * table.rows[kBias][slot]);
    });
}

// kBiased: there is x_bias, and so neither xn nor dx_more. (As a branch at run time it would spill.)
template <class T, class Tile, NormAccess kAccess, bool kBiased>
__global__ void __launch_bounds__(kNormThreads, fitted_blocks(NormPass::kBackward, Tile::kVectors))
    layer_norm_pool_bwd_kernel(const __grid_constant__ PoolBwdArgs args) {
    begin_kernel();
    constexpr int kVecs = Tile::kVectors;
    enum { kWeight, kBias, kPooled };
    constexpr bool kAhead = kAccess != NormAccess::kAny &&
                            sizeof(T) == 2;  // with float, the data of a step would take the registers of the sums
    __shared__ SlotRows<3, Tile::kWidth> table;
    __shared__ alignas(16) float sums[kNormWarps][Tile::kWidth];
    __shared__ VectorOffsets<kVecs> x_offsets, dxn_offsets, more_offsets, dx_offsets, dx_more_offsets;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float inverse_tokens = 1.f / s.tokens;
    PixelCursor<const T, Tile, kAccess> x_in(args.x, s, strip, tile, x_offsets),
        dx_more_in(args.dx_more, s, strip, tile, dx_more_offsets);
    GroupCursor<const T, Tile, kAccess> dxn_in(args.dxn, s, strip, tile, dxn_offsets),
        more_in(args.dxn_more, s, strip, tile, more_offsets);
    PixelCursor<T, Tile, kAccess> dx_out(args.dx, s, strip, tile, dx_offsets);
    const bool more = args.dxn_more.ptr != nullptr, dx_more = !kBiased && args.dx_more.ptr != nullptr;
    typename decltype(x_in)::Stored x_stored, dx_more_stored = {};
    typename decltype(dxn_in)::Stored dxn_stored, more_stored = {};
    const auto load = [&](int left) {
        x_in.load(tile, left, x_stored);
        dxn_in.load(tile, left, dxn_stored);
        if (more) more_in.load(tile, left, more_stored);
        x_in.advance(), dxn_in.advance(), more_in.advance();
    };
    const auto load_dx_more = [&](int left) {
        if (dx_more) dx_more_in.load(tile, left, dx_more_stored);
        dx_more_in.advance();
    };
    if (kAhead) load(strip.end - strip.first), load_dx_more(strip.end - strip.first);
    table.fill(s, args.plan, [&](int c, float(&row)[3]) {
        row[kWeight] = load_param<T>(args.weight, c);
        row[kBias] = load_param_or<T>(kBiased ? args.x_bias : args.bias, c, 0.f);
        row[kPooled] = args.dpooled == nullptr ? 0.f : __fmul_rn(args.dpooled[strip.batch * s.dim + c], inverse_tokens);
    });
    clear_tails<T>(args.dx, s, strip);
    __syncthreads();

    typename Tile::Values dweight = {}, dbias = {}, dx_more_sum = {};
    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::Values normed, g;
        tile.step(left);
        if (!kAhead) load(left), load_dx_more(left);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float added[kVec];
            x_in.widen(tile, v, x_stored, normed[v]);
            dxn_in.widen(tile, v, dxn_stored, g[v]);
            more_in.widen(tile, v, more_stored, added);
#pragma unroll
            for (int j = 0; j < kVec; ++j) g[v][j] += added[j];
            if (kBiased) {
                table.get(kBias, tile.slot(v), added);
#pragma unroll
                for (int j = 0; j < kVec; ++j) normed[v][j] += added[j];
            }
        }
        constexpr bool kAtOnce = kAccess == NormAccess::kAligned && kVecs < kRowVecs;  // where registers allow it
        if (kAhead && kAtOnce) load(left - args.plan.step);
        const float inverse_std = tile.normalise(s.eps, normed);
        if (kAhead && !kAtOnce) load(left - args.plan.step);
        if (!kBiased && writes_xn(kVecs) && args.xn != nullptr) {  // dxn_in is one or two steps ahead
            const int64_t ahead = (kAhead ? 2 : 1) * dxn_in.step;
            const GroupCursor<T, Tile, kAccess> xn_out(
                dxn_in, static_cast<T*>(args.xn) - static_cast<const T*>(args.dxn.ptr) - ahead);
            xn_out.store(tile, [&](int v, float(&xn)[kVec]) {
                float weight[kVec], bias[kVec];
                table.get(kWeight, tile.slot(v), weight);
                table.get(kBias, tile.slot(v), bias);
#pragma unroll
                for (int j = 0; j < kVec; ++j) xn[j] = fmaf(normed[v][j], weight[j], bias[j]);
            });
        }
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float weight[kVec], pooled[kVec];
            table.get(kWeight, tile.slot(v), weight);
            table.get(kPooled, tile.slot(v), pooled);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float total = tile.exists ? g[v][j] + pooled[j] : 0.f;
                dweight[v][j] = fmaf(total, normed[v][j], dweight[v][j]);
                dbias[v][j] += total;
                g[v][j] = __fmul_rn(total, weight[j]);
            }
        }
        tile.normalise_backward(normed, g);
        dx_out.store(tile, [&](int v, float(&out)[kVec]) {
            float added[kVec];
            dx_more_in.widen(tile, v, dx_more_stored, added);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                out[j] = fmaf(inverse_std, g[v][j], added[j]);
                if (sums_dx_more(kVecs)) dx_more_sum[v][j] += kBiased ? out[j] : added[j];
            }
        });
        if (kAhead) load_dx_more(left - args.plan.step);
        dx_out.advance();
    }
    const bool third = kBiased || args.sum_dx_more;
    float* out = args.partials + strip.number * (third ? 3 : 2) * s.dim;
    tile.block_sums(dweight, sums, [&](int c, int, float sum) { out[c] = sum; });
    tile.block_sums(dbias, sums, [&](int c, int, float sum) { out[s.dim + c] = sum; });
    if (sums_dx_more(kVecs) && third)
        tile.block_sums(dx_more_sum, sums, [&](int c, int, float sum) {
            out[2 * s.dim + c] = drop_path_factor(args.drop_path, strip.batch) * sum;
        });
}

// Rows too wide for registers: first the statistics, a warp a token; then every thread takes a channel of all tokens.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_pool_fwd_wide_kernel(const __grid_constant__ PoolFwdArgs args) {
    begin_kernel();
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const WideImage<const T> x(args.x, s, strip);
    const WideImage<T> xn(args.xn, s, strip), sums(args.sum, s, strip);
    const auto value = [&](int t, int c) { return to_float(x(t, x.offset(c))); };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) rows.statistics(t, s.dim, s.eps, value);
    __syncthreads();
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float weight = load_param<T>(args.weight, c), bias = load_param<T>(args.bias, c);
        const int64_t x_at = x.offset(c), xn_at = xn.offset(c);
        if (args.sum.ptr != nullptr) {
            const float sum_bias =
                drop_path_factor(args.drop_path, strip.batch) * load_param_or<T>(args.sum_bias, c, 0.f);
            const int64_t sum_at = sums.offset(c);
            for (int t = 0; t < count; ++t) sums(t, sum_at) = from_float<T>(to_float(x(t, x_at)) + sum_bias);
        }
        float sum = 0.f;
        for (int t = 0; t < count; ++t) {
            const float out = fmaf(rows.normed(t, to_float(x(t, x_at))), weight, bias);
            xn(t, xn_at) = from_float<T>(out);
            sum += out;
        }
        if (args.partials != nullptr) args.partials[strip.number * s.dim + c] = sum;
    }
    clear_inter_block_state(args);
    xn.clear_pads(count);
    if (args.sum.ptr != nullptr) clear_tails<T>(args.sum, s, strip);
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_pool_bwd_wide_kernel(const __grid_constant__ PoolBwdArgs args) {
    begin_kernel();
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const float inverse_tokens = 1.f / s.tokens;
    const WideImage<const T> x(args.x, s, strip), dxn(args.dxn, s, strip), more(args.dxn_more, s, strip),
        dx_more(args.dx_more, s, strip);
    const WideImage<T> dx(args.dx, s, strip);
    NormImage xn_image = args.dxn;
    xn_image.ptr = args.xn;
    const WideImage<T> xn(xn_image, s, strip);
    const float* dpooled = args.dpooled == nullptr ? nullptr : args.dpooled + strip.batch * s.dim;
    const auto value = [&](int t, int c) { return to_float(x(t, x.offset(c))); };
    const auto gradient = [&](int t, int c) {
        const float g = fmaf(dpooled == nullptr ? 0.f : dpooled[c], inverse_tokens, to_float(dxn(t, dxn.offset(c))));
        return args.dxn_more.ptr == nullptr ? g : g + to_float(more(t, more.offset(c)));
    };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) {
        rows.statistics(t, s.dim, s.eps, value);
        __syncwarp();
        rows.gradient_means(t, s.dim, value,
                            [&](int, int c) { return gradient(t, c) * load_param<T>(args.weight, c); });
    }
    __syncthreads();
    float* out = args.partials + strip.number * (args.sum_dx_more ? 3 : 2) * s.dim;
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float weight = load_param<T>(args.weight, c), bias = load_param_or<T>(args.bias, c, 0.f);
        const int64_t dx_at = dx.offset(c), xn_at = xn.offset(c);
        float dweight = 0.f, dbias = 0.f, dx_more_sum = 0.f;
        for (int t = 0; t < count; ++t) {
            const float normed = rows.normed(t, value(t, c)), g = gradient(t, c);
            const float more_dx = args.dx_more.ptr == nullptr ? 0.f : to_float(dx_more(t, dx_more.offset(c)));
            dx(t, dx_at) = from_float<T>(rows.backward(t, g * weight, normed) + more_dx);
            if (args.xn != nullptr) xn(t, xn_at) = from_float<T>(fmaf(normed, weight, bias));
            dweight = fmaf(g, normed, dweight);
            dbias += g;
            dx_more_sum += more_dx;
        }
        out[c] = dweight;
        out[s.dim + c] = dbias;
        if (args.sum_dx_more) out[2 * s.dim + c] = drop_path_factor(args.drop_path, strip.batch) * dx_more_sum;
    }
    dx.clear_pads(count);
    if (args.xn != nullptr) xn.clear_pads(count);
    clear_tails<T>(args.dx, s, strip);
}

}  // namespace

cudaError_t launch_layer_norm_pool_fwd(const PoolFwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const NormShape& s = args.shape;
        const NormAccess access =
            std::min({access_of<T>(s, args.x, true), access_of<T>(s, args.xn), access_of<T>(s, args.sum, true)});
        return dispatch_rows<T, true>(args.plan, s, access, [&](auto tile, auto chosen) {
            using Tile = typename decltype(tile)::type;
            auto* kernel = layer_norm_pool_fwd_wide_kernel<T>;
            if constexpr (!std::is_void_v<Tile>) kernel = layer_norm_pool_fwd_kernel<T, Tile, chosen.value>;
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

cudaError_t launch_layer_norm_pool_bwd(const PoolBwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const NormShape& s = args.shape;
        const NormAccess access =
            std::min({access_of<T>(s, args.x, true), access_of<T>(s, args.dxn), access_of<T>(s, args.dxn_more),
                      access_of<T>(s, args.dx, true), access_of<T>(s, args.dx_more, true)});
        return dispatch_rows<T, true>(args.plan, s, access, [&](auto tile, auto chosen) {
            using Tile = typename decltype(tile)::type;
            auto* kernel = layer_norm_pool_bwd_wide_kernel<T>;
            if constexpr (!std::is_void_v<Tile>) {
                kernel = layer_norm_pool_bwd_kernel<T, Tile, chosen.value, false>;
                if constexpr (sums_dx_more(Tile::kVectors))
                    if (args.x_bias.ptr != nullptr) kernel = layer_norm_pool_bwd_kernel<T, Tile, chosen.value, true>;
            }
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
