// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan: flips, step projection, scan, skip, norm and gates in one read and one write.
//
//   step = softplus(dt_weight dt + dt_bias);  h_t = exp(step A) h_{t-1} + step B u;  y = C . h + D u
//   out = LayerNorm(y) * silu(z) * gate
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/scan/launch.h"
#include "cuda/scan/tile.cuh"

namespace gm {
namespace {

// kSingle: one state a channel (N = 1), whose carry stays in registers. Otherwise the states are walked one after the
// other and their carries wait in device memory (states or carry).
template <class T, bool kSingle, bool kAligned>
__global__ void __launch_bounds__(kFwdThreads, kSingle&& kAligned && sizeof(T) == 2 ? 2 : 1)
    grouped_scan_fwd_kernel(const __grid_constant__ ScanFwdArgs args) {
    begin_kernel();
    constexpr int kTokens = kFwdTokens;
    __shared__ ScanExchange exchange;
    __shared__ ChannelTable<5> table;  // of every channel, to spare registers; so are planes read once a slab
    __shared__ Plane<const T> u, B, C, dt, z;
    __shared__ Plane<T> y_out;
    extern __shared__ float4 dynamic_shared[];

    const ScanShape& s = args.shape;
    const Tile tile(s);
    const int c0 = tile.channel, valid = tile.valid, lanes = tile.lanes;
    const int64_t param = static_cast<int64_t>(tile.group) * s.param_dim + c0;  // of the thread's first channel
    const StepWeight<T> weight(s, args.dt_weight, tile, reinterpret_cast<float*>(dynamic_shared));

    const bool has_norm = args.norm_weight.ptr != nullptr, has_z = args.z.ptr != nullptr;
    enum { kBias, kSkip, kScale, kShift, kA };  // the gate is folded into the norm's scale and shift
    table.fill(s.dim, [&](int c, float(&row)[5]) {
        const int64_t i = static_cast<int64_t>(tile.group) * s.param_dim + c;
        const int64_t gate_index = static_cast<int64_t>(tile.batch) * s.groups * s.dim + i;
        const float gate = load_param_or<T>(args.gate, gate_index, 1.f);
        row[kBias] = load_param_or<T>(args.dt_bias, i, 0.f) / Math<T>::kStepUnit;
        row[kSkip] = load_param_or<T>(args.D, i, 0.f);
        row[kScale] = gate * load_param_or<T>(args.norm_weight, i, 1.f);
        row[kA] = kSingle ? load_param<T>(args.A, i) : 0.f;
        row[kShift] = gate * load_param_or<T>(args.norm_bias, i, 0.f);
    });
    if (threadIdx.x == 0) {
        u = Plane<const T>(args.u, tile, 0);
        B = Plane<const T>(args.B, tile, 0);
        C = Plane<const T>(args.C, tile, 0);
        dt = Plane<const T>(args.dt, tile, 0);
        z = Plane<const T>(args.z, tile, 0);
        y_out = Plane<T>(args.y, tile, 0);
    }
    float carry[kVec] = {};
    __syncthreads();

    const int tokens = s.height * s.width, slab_tokens = tile.num_chunks() * kTokens;
    const int states = kSingle ? 1 : s.states;
    const int64_t plane_states = static_cast<int64_t>(states) * s.dim;  // of one saved state
    // States are saved every kBwdSlab / lanes tokens: that many threads apart.
    const int threads_chunks = kBwdSlab / kTokens / lanes, chunks_per_slab = max(tile.num_chunks() / threads_chunks, 1);
    const auto saved_state = [&](int64_t chunk) {
        return args.states + (static_cast<int64_t>(blockIdx.x) * args.num_chunks + chunk) * plane_states + c0;
    };
    const auto carried_state = [&](int slab) {  // entering the slab, where it waits in device memory
        return args.states != nullptr
                   ? saved_state(slab * chunks_per_slab)
                   : args.carry + (static_cast<int64_t>(blockIdx.x) * 2 + (slab & 1)) * plane_states + c0;
    };
    int buffer = 0;

    for (int first = 0, slab = 0; first < tokens; first += slab_tokens, ++slab) {
        const int begin = first + tile.chunk * kTokens;
        const Path<kTokens> path(s, tile.direction, begin);
        float step[kTokens][kVec], y[kTokens][kVec], skip[kVec];
        {
            float bias[kVec];
            table.get(kBias, c0, bias);
            load_steps<kAligned>(s, dt, weight, bias, path, c0, valid, step);
        }
        table.get(kSkip, c0, skip);

        for (int n = 0; n < states; ++n) {
            float a_coef[kVec], P[kVec], h[kVec], decayed_C[kTokens][kVec], entering[kVec];
            if (kSingle) table.get(kA, c0, a_coef);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                if (!kSingle) a_coef[j] = j < valid ? load_param<T>(args.A, (param + j) * states + n) : 0.f;
                P[j] = 1.f;
                h[j] = 0.f;
            }
            if (!kSingle) {  // written two barriers ago by the previous slab
                const float* in = carried_state(slab);
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    carry[j] = slab > 0 && j < valid ? in[static_cast<int64_t>(n) * s.dim + j] : 0.f;
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
            block_scan<false>(tile, exchange, buffer, P, h, carry, entering);
#pragma unroll
            for (int k = 0; k < kTokens; ++k)
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);

            if (args.states != nullptr && tile.chunk % threads_chunks == 0 && begin < tokens) {
                float* out =
                    saved_state(slab * chunks_per_slab + tile.chunk / threads_chunks) + static_cast<int64_t>(n) * s.dim;
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (j < valid) out[j] = entering[j];
            }
            if (!kSingle && tile.chunk == 0 && first + slab_tokens < tokens) {
                float* out = carried_state(slab + 1) + static_cast<int64_t>(n) * s.dim;
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (j < valid) out[j] = carry[j];
            }
        }

        // The tokens are found anew rather than kept: 7 registers at the point where they are dearest.
        int again = begin;
        asm volatile("" : "+r"(again));
        const Path<kTokens> out_path(s, tile.direction, again);
        float scale[kVec], shift[kVec];
        table.get(kScale, c0, scale);
        table.get(kShift, c0, shift);
        if (has_norm) {
            const float inverse_dim = 1.f / s.norm_dim;
            const int normed = min(valid, s.norm_dim - c0);
            float mean[kTokens], variance[kTokens];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                mean[k] = 0.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j) mean[k] += y[k][j];
            }
            lane_sums(mean, lanes);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                variance[k] = 0.f;
                mean[k] = mean_of(mean[k], s.norm_dim, inverse_dim);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    y[k][j] = j < normed ? y[k][j] - mean[k] : 0.f;
                    variance[k] = fmaf(y[k][j], y[k][j], variance[k]);
                }
            }
            lane_sums(variance, lanes);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float inverse_std = Math<T>::rsqrt(fmaf(variance[k], inverse_dim, s.norm_eps));
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(y[k][j] * inverse_std, scale[j], shift[j]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < kTokens; ++k)
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[k][j] *= scale[j];
        }
        if (has_z) {
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const Vec4<T> zv = load4<kAligned>(z.at(out_path.token[k]) + c0, valid);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float x = to_float(zv.v[j]);
                    y[k][j] *= x * Math<T>::sigmoid(x);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kTokens; ++k)
            if (k < out_path.count) store4<kAligned>(y_out.at(out_path.token[k]) + c0, y[k], valid);
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
