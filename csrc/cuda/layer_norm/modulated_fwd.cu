// SPDX-License-Identifier: Apache-2.0
// LayerNorm over all channels of a product of images: how the layer merges its groups, in one read and one write.
//
//   y = (p - mean) / sqrt(variance + eps) * weight + bias over C = G D,  p = o * scale * x * gate
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/layer_norm/image.cuh"
#include "cuda/layer_norm/launch.h"

namespace gm {
namespace {

// Unless an image may be any, loads are one step ahead, and the first come before the table.
template <class T, class Tile, NormAccess kAccess>
__global__ void __launch_bounds__(kNormThreads, fitted_blocks(NormPass::kForward, Tile::kVectors))
    modulated_layer_norm_fwd_kernel(const __grid_constant__ ModulatedFwdArgs args) {
    begin_kernel();
    constexpr int kVecs = Tile::kVectors;
    constexpr bool kAhead = kAccess != NormAccess::kAny;
    enum { kModulation, kWeight, kBias };
    __shared__ SlotRows<3, Tile::kWidth> table;
    __shared__ VectorOffsets<kVecs> o_offsets, x_offsets, y_offsets;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    Tile tile(s, args.plan);
    const float scale = load_param<T>(args.scale, 0);
    GroupCursor<const T, Tile, kAccess> o_in(args.o, s, strip, tile, o_offsets),
        x_in(args.x, s, strip, tile, x_offsets);
    GroupCursor<T, Tile, kAccess> y_out(args.y, s, strip, tile, y_offsets);
    typename decltype(x_in)::Stored o_stored, x_stored;
    const auto load = [&](int left) {
        o_in.load(tile, left, o_stored);
        x_in.load(tile, left, x_stored);
        o_in.advance(), x_in.advance();
    };
    if (kAhead) load(strip.end - strip.first);
    table.fill_at_once(s, args.plan, [&](int c, float(&row)[3]) {
        row[kModulation] = scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f);
        const float kept = keeps_branch(args.drop_path, strip.batch) ? 1.f : 0.f;
        row[kWeight] = kept * load_param<T>(args.weight, c);
        row[kBias] = kept * load_param<T>(args.bias, c);
    });
    __syncthreads();

    for (int left = strip.end - strip.first; left > 0; left -= args.plan.step) {
        typename Tile::Values x;
        tile.step(left);
        if (!kAhead) load(left);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float factor[kVec], o[kVec];
            table.get(kModulation, tile.slot(v), factor);
            o_in.widen(tile, v, o_stored, o);
            x_in.widen(tile, v, x_stored, x[v]);
#pragma unroll
            for (int j = 0; j < kVec; ++j) x[v][j] = __fmul_rn(x[v][j], o[j] * factor[j]);
        }
        if (kAhead) load(left - args.plan.step);
        tile.normalise(s.eps, x);
        y_out.store(tile, [&](int v, float(&y)[kVec]) {
            float weight[kVec], bias[kVec];
            table.get(kWeight, tile.slot(v), weight);
            table.get(kBias, tile.slot(v), bias);
#pragma unroll
            for (int j = 0; j < kVec; ++j) y[j] = fmaf(x[v][j], weight[j], bias[j]);
        });
        y_out.advance();
    }
}

// Rows too wide for registers: first the statistics, a warp a token; then every thread takes a channel of all tokens.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    modulated_layer_norm_fwd_wide_kernel(const __grid_constant__ ModulatedFwdArgs args) {
    begin_kernel();
    __shared__ WideRows rows;
    const NormShape& s = args.shape;
    const Strip strip(s, args.plan);
    const int count = strip.end - strip.first;
    const WideImage<const T> o(args.o, s, strip), x(args.x, s, strip);
    const WideImage<T> y(args.y, s, strip);
    const float scale = load_param<T>(args.scale, 0);
    const auto factor = [&](int c) { return scale * load_param_or<T>(args.gate, strip.batch * s.dim + c, 1.f); };
    const auto value = [&](int t, int c) {
        return to_float(x(t, x.offset(c))) * (to_float(o(t, o.offset(c))) * factor(c));
    };
    for (int t = threadIdx.x >> 5; t < count; t += kNormWarps) rows.statistics(t, s.dim, s.eps, value);
    __syncthreads();
    for (int c = threadIdx.x; c < s.dim; c += kNormThreads) {
        const float kept = keeps_branch(args.drop_path, strip.batch) ? 1.f : 0.f, f = factor(c);
        const float weight = kept * load_param<T>(args.weight, c), bias = kept * load_param<T>(args.bias, c);
        const int64_t o_at = o.offset(c), x_at = x.offset(c), y_at = y.offset(c);
#pragma unroll 2
        for (int t = 0; t < count; ++t) {
            const float p = to_float(x(t, x_at)) * (to_float(o(t, o_at)) * f);
            y(t, y_at) = from_float<T>(fmaf(rows.normed(t, p), weight, bias));
        }
    }
    y.clear_pads(count);
}

}  // namespace

cudaError_t launch_modulated_layer_norm_fwd(const ModulatedFwdArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = args.shape.batch * args.plan.strips;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const NormShape& s = args.shape;
        const NormAccess access = std::min({access_of<T>(s, args.o), access_of<T>(s, args.x), access_of<T>(s, args.y)});
        return dispatch_rows<T>(args.plan, s, access, [&](auto tile, auto chosen) {
            using Tile = typename decltype(tile)::type;
            auto* kernel = modulated_layer_norm_fwd_wide_kernel<T>;
            if constexpr (!std::is_void_v<Tile>) kernel = modulated_layer_norm_fwd_kernel<T, Tile, chosen.value>;
            return launch_kernel(kernel, blocks, kNormThreads, 0, stream, args);
        });
    });
}

}  // namespace gm
