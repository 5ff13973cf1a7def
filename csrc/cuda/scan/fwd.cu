// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan: flips, step projection, scan, skip, norm and gates in one read and one write.
//
//   step = softplus(dt_weight dt + dt_bias);  h_t = exp(step A) h_{t-1} + step B u;  y = C . h + D u
//   out = LayerNorm(y) * silu(z) * gate
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/scan/fwd_phases.cuh"
#include "cuda/scan/launch.h"

namespace gm {
namespace {

// kSingle: one state a channel (N = 1), whose carry stays in registers. With more, the states are computed one after
// another, and their carries are kept in device memory (states or carry).
template <class T, bool kSingle, bool kAligned>
__global__ void __launch_bounds__(kFwdThreads, kSingle&& kAligned && sizeof(T) == 2 ? 2 : 1)
    grouped_scan_fwd_kernel(const __grid_constant__ ScanFwdArgs args) {
    begin_kernel();
    constexpr int kTokens = kFwdTokens;
    __shared__ ScanExchange exchange;
    // Of every channel, to spare registers; for the same reason planes are read once a tile.
    __shared__ ChannelTable<kFwdTableRows> table;
    __shared__ Plane<const T> u, B, C, dt, z;
    __shared__ Plane<T> y_out;
    extern __shared__ float4 dynamic_shared[];

    const ScanShape& s = args.shape;
    const ThreadCoord coord(s);
    const int c0 = coord.channel, valid = coord.valid, lanes = coord.lanes;
    const int64_t param = static_cast<int64_t>(coord.group) * s.param_dim + c0;  // of the thread's first channel
    const StepWeight<T> weight(s, args.dt_weight, coord, reinterpret_cast<float*>(dynamic_shared));

    const bool has_norm = args.norm_weight.ptr != nullptr, has_z = args.z.ptr != nullptr;
    fill_table<T, kSingle>(args, coord, table);
    if (threadIdx.x == 0) {
        u = Plane<const T>(args.u, coord, 0);
        B = Plane<const T>(args.B, coord, 0);
        C = Plane<const T>(args.C, coord, 0);
        dt = Plane<const T>(args.dt, coord, 0);
        z = Plane<const T>(args.z, coord, 0);
        y_out = Plane<T>(args.y, coord, 0);
    }
    float carry[kVec] = {};
    __syncthreads();

    const int tokens = s.height * s.width, tile_tokens = coord.num_chunks() * kTokens;
    const int states = kSingle ? 1 : s.states;
    const int64_t plane_states = static_cast<int64_t>(states) * s.dim;  // of one saved state
    // States are saved every args.chunk tokens: at every threads_chunks-th chunk.
    const int threads_chunks = (kSingle ? kBwdTile / lanes : args.chunk) / kTokens,
              chunks_per_tile = max(coord.num_chunks() / threads_chunks, 1);
    const auto saved_state = [&](int64_t chunk) {
        return args.states + (static_cast<int64_t>(blockIdx.x) * args.num_chunks + chunk) * plane_states + c0;
    };
    const auto carried_state = [&](int tile) {  // the state that enters the tile, where it is kept in device memory
        return args.states != nullptr
                   ? saved_state(tile * chunks_per_tile)
                   : args.carry + (static_cast<int64_t>(blockIdx.x) * 2 + (tile & 1)) * plane_states + c0;
    };
    int buffer = 0;

    for (int first = 0, tile = 0; first < tokens; first += tile_tokens, ++tile) {
        const int begin = first + coord.chunk * kTokens;
        const Path<kTokens> path(s, coord.direction, begin);
        float step[kTokens][kVec], y[kTokens][kVec], skip[kVec];
        {
            float bias[kVec];
            table.get(kFwdBias, c0, bias);
            load_steps<kAligned>(s, dt, weight, bias, path, c0, valid, step);
        }
        table.get(kFwdSkip, c0, skip);

        for (int n = 0; n < states; ++n) {
            float a_coef[kVec], P[kVec], h[kVec], decayed_C[kTokens][kVec], entering[kVec];
            if (kSingle) table.get(kFwdA, c0, a_coef);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                if (!kSingle) a_coef[j] = j < valid ? load_param<T>(args.A, (param + j) * states + n) : 0.f;
                P[j] = 1.f;
                h[j] = 0.f;
            }
            if (!kSingle) {  // written by the previous tile, two barriers ago
                const float* in = carried_state(tile);
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    carry[j] = tile > 0 && j < valid ? in[static_cast<int64_t>(n) * s.dim + j] : 0.f;
            }
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float b = Math<T>::kStepUnit * to_float(B.at(path.token[k])[n]);
                const float c = to_float(C.at(path.token[k])[n]);
                const Vec4<T> uv = load4<kAligned>(u.at(path.token[k]) + c0, valid);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float x = to_float(uv.v[j]), a = Math<T>::decay(step[k][j], a_coef[j]);
                    h[j] = fmaf(a, h[j], step[k][j] * (b * x));
                    P[j] *= a;
                    y[k][j] = fmaf(c, h[j], kSingle || n == 0 ? skip[j] * x : y[k][j]);
                    decayed_C[k][j] = c * P[j];
                }
            }
            block_scan<false>(coord, exchange, buffer, P, h, carry, entering);
#pragma unroll
            for (int k = 0; k < kTokens; ++k)
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);

            if (args.states != nullptr && coord.chunk % threads_chunks == 0 && begin < tokens) {
                float* out = saved_state(tile * chunks_per_tile + coord.chunk / threads_chunks) +
                             static_cast<int64_t>(n) * s.dim;
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (j < valid) out[j] = entering[j];
            }
            if (!kSingle && coord.chunk == 0 && first + tile_tokens < tokens) {
                float* out = carried_state(tile + 1) + static_cast<int64_t>(n) * s.dim;
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (j < valid) out[j] = carry[j];
            }
        }

        // The tokens are computed again instead of kept: 7 registers, at the point where they are scarcest.
        int again = begin;
        asm volatile("" : "+r"(again));
        const Path<kTokens> out_path(s, coord.direction, again);
        finish_outputs<T, kAligned>(s, coord, has_norm, has_z, table, z, y_out, out_path, y);
    }
}

template <class T, bool kSingle>
cudaError_t launch(const ScanFwdArgs& args, cudaStream_t stream) {
    const size_t shared = args.shape.rank <= kMaxStagedRank ? sizeof(float) * 32 * kVec * args.shape.rank : 0;
    const auto kernel =
        args.shape.aligned ? grouped_scan_fwd_kernel<T, kSingle, true> : grouped_scan_fwd_kernel<T, kSingle, false>;
    return launch_kernel(kernel, args.shape.batch * args.shape.groups, args.shape.threads, shared, stream, args);
}

}  // namespace

cudaError_t launch_grouped_scan_fwd(const ScanFwdArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return args.shape.states == 1 ? launch<T, true>(args, stream) : launch<T, false>(args, stream);
    });
}

}  // namespace gm
