// SPDX-License-Identifier: Apache-2.0
// Backward of the cross selective scan: for each direction as in grouped_scan_bwd.cu, slabs from the last to the first,
// each recomputed forward from the state saved at its start. dy is the same for all directions; du is added up over
// them as the forward adds up y.
//
// dB, dC and the gradient of the step features are sums over channels: with several slices each writes its own part, in
// float, and reduce_columns adds the slices. Parameter gradients: a row of partial sums a warp, which scan_reduce adds.
// The step and its gradient are in units of Math<T>::kStepUnit throughout.
#include "cuda/cross_tile.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"

namespace gm {
namespace {

template <class T>
__global__ void __launch_bounds__(kCrossBwdThreads) cross_scan_bwd_kernel(const __grid_constant__ CrossBwdArgs args) {
    constexpr int kTokens = kCrossTokens;
    __shared__ CrossExchange exchange;
    __shared__ ChannelTable<2, kCrossChannels> table;
    __shared__ Plane<const T> dout, dt, B, C;  // of the direction; in shared memory, as du_out, to spare registers
    __shared__ Plane<T> du_out;
    extern __shared__ float4 dynamic_shared[];
    enum { kBias, kSkip };

    const ScanShape& s = args.shape;
    const CrossTile tile(args);
    const int c0 = tile.first + tile.channel, valid = tile.valid, lanes = tile.lanes;
    const int tokens = s.height * s.width, slab_tokens = tile.num_chunks() * kTokens, states = s.states;
    const int num_slabs = (tokens + slab_tokens - 1) / slab_tokens;
    const Plane<const T> u(args.u, tile, c0);
    float4* const sums = cross_sums(args, tile, dynamic_shared);
    float* const weights = reinterpret_cast<float*>(dynamic_shared) + args.sums_bytes / sizeof(float);
    const int64_t carry_size = static_cast<int64_t>(states) * lanes * kVec;  // adjoints entering a slab, with N > 1
    float* const carried = args.carry + blockIdx.x * 2 * carry_size + tile.channel;
    const int64_t all_scans = static_cast<int64_t>(s.groups) * args.scans, rows = states + kFixedRows + s.rank;
    const bool sliced = args.slices > 1, writes_partials = tile.chunk_in_warp == 0;
    int buffer = 0;

    for (int scan = 0; scan < args.scans; ++scan) {
        const int64_t row = tile.scan(args, scan) * s.dim + tile.first;  // of the slice's parameters
        const int direction = Tile::direction_of(s, scan);
        float* const partials =
            args.partials +
            ((static_cast<int64_t>(tile.batch) * tile.num_warps() + tile.warp()) * all_scans + tile.scan(args, scan)) *
                rows * s.dim +
            c0;
        __syncthreads();  // the direction before is done with the tables, and its sums are there for other threads
        if (threadIdx.x == 0) {
            dt = Plane<const T>(args.dt, tile, scan * args.dt.scan);
            B = Plane<const T>(args.B, tile, scan * args.B.scan), C = Plane<const T>(args.C, tile, scan * args.C.scan);
            dout = Plane<const T>(args.dy, tile, tile.first), du_out = Plane<T>(args.du, tile, tile.first);
        }
        table.fill(s.dim - tile.first, [&](int c, float(&out)[2]) {
            out[kBias] = load_param_or<T>(args.dt_bias, row + c, 0.f) / Math<T>::kStepUnit;
            out[kSkip] = load_param_or<T>(args.D, row + c, 0.f);
        });
        const StepWeight<T, kCrossChannels> weight(s, args.dt_weight, tile, tile.scan(args, scan), tile.first, weights);
        __syncthreads();

        // Sums of the warp for each of its channels: of all slabs at once, or added slab by slab.
        const auto add_partial = [&](int64_t i, float(&sum)[kVec], float unit, bool first_time) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) sum[j] = unit * chunk_sum(sum[j], lanes);
            if (!writes_partials) return;
            float* p = partials + i * s.dim;
#pragma unroll
            for (int j = 0; j < kVec; ++j)
                if (j < valid) p[j] = first_time ? sum[j] : p[j] + sum[j];
        };
        // Sums over the channels of each token, written by one lane a token: the i-th of `count` features.
        const auto write_token_sums = [&](float(&sum)[kTokens], float unit, void* out, const Path<kTokens>& path,
                                          int count, int i) {
            lane_sums(sum, lanes);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                if (k >= path.count || tile.lane() != (k & (lanes - 1))) continue;
                const int64_t token = static_cast<int64_t>(tile.batch) * tokens + path.token[k];
                const int64_t at = (token * all_scans + tile.scan(args, scan)) * count + i;
                if (sliced) {
                    static_cast<float*>(out)[CrossTile::slice(args) * args.slice_stride + at] = unit * sum[k];
                } else {
                    static_cast<T*>(out)[at] = from_float<T>(unit * sum[k]);
                }
            }
        };

        float adjoint_carry[kVec] = {}, dskip[kVec] = {}, dbias[kVec] = {};
        for (int slab = num_slabs - 1; slab >= 0; --slab) {
            const bool first_time = slab == num_slabs - 1;
            const Path<kTokens> path(s, direction, slab * slab_tokens + tile.chunk * kTokens);
            const float* saved =
                args.states + tile.state(args, scan, static_cast<int64_t>(slab) * slab_tokens / kCrossChunk);
            float step[kTokens][kVec], dy[kTokens][kVec], du[kTokens][kVec], dstep[kTokens][kVec], bias[kVec],
                skip[kVec];
            table.get(kBias, tile.channel, bias);
            table.get(kSkip, tile.channel, skip);
            if (s.aligned) {
                load_steps<true>(s, dt, weight, bias, path, c0, valid, step);
            } else {
                load_steps<false>(s, dt, weight, bias, path, c0, valid, step);
            }
            const auto load_u = [&](int k) { return load4(u.at(path.token[k]), valid, s.aligned); };
#pragma unroll
            for (int k = 0; k < kTokens; ++k)
                to_floats(load4(dout.at(path.token[k]) + tile.channel, k < path.count ? valid : 0, s.aligned), dy[k]);

            for (int n = 0; n < states; ++n) {
                float A[kVec], P[kVec], local[kVec], carry[kVec], entering[kVec], adjoint[kVec], dA[kVec];
                float h[kTokens][kVec], dB[kTokens], dC[kTokens];
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    A[j] = j < valid ? load_param<T>(args.A, (row + tile.channel + j) * states + n) : 0.f;
                    carry[j] = j < valid ? saved[static_cast<int64_t>(n) * s.dim + j] : 0.f;
                    P[j] = 1.f;
                    local[j] = dA[j] = 0.f;
                    // written by the slab before, at least one barrier ago
                    if (states > 1)
                        adjoint_carry[j] = first_time ? 0.f : carried[(slab & 1) * carry_size + n * lanes * kVec + j];
                }
                const auto load_B = [&](int k) { return Math<T>::kStepUnit * to_float(B.at(path.token[k])[n]); };
                slab_states<T>(tile, exchange, buffer, A, step, load_B, load_u, carry, h, entering);
                hide(A);
#pragma unroll
                for (int k = kTokens - 1; k >= 0; --k) {
                    const float c = to_float(C.at(path.token[k])[n]);
                    dC[k] = 0.f;
#pragma unroll
                    for (int j = 0; j < kVec; ++j) {
                        const float decay = Math<T>::decay(step[k][j], A[j]);
                        local[j] = decay * fmaf(c, dy[k][j], local[j]);
                        P[j] *= decay;
                        dC[k] = fmaf(dy[k][j], h[k][j], dC[k]);
                    }
                }
                write_token_sums(dC, 1.f, args.dC, path, states, n);
                block_scan<true>(tile, exchange, buffer, P, local, adjoint_carry, adjoint);
                if (states > 1 && tile.chunk == 0) {
#pragma unroll
                    for (int j = 0; j < kVec; ++j)
                        carried[((slab + 1) & 1) * carry_size + n * lanes * kVec + j] = adjoint_carry[j];
                }
                hide(A);
#pragma unroll
                for (int k = kTokens - 1; k >= 0; --k) {
                    const float b = load_B(k), c = to_float(C.at(path.token[k])[n]);
                    const Vec4<T> uv = load_u(k);
                    dB[k] = 0.f;
#pragma unroll
                    for (int j = 0; j < kVec; ++j) {
                        const float x = to_float(uv.v[j]), g = fmaf(c, dy[k][j], adjoint[j]);
                        const float decay = Math<T>::decay(step[k][j], A[j]);
                        const float through = g * decay * (k > 0 ? h[k > 0 ? k - 1 : 0][j] : entering[j]);
                        const float ds = fmaf(Math<T>::kStepUnit * A[j], through, g * (b * x)), gs = g * step[k][j];
                        dA[j] = fmaf(through, step[k][j], dA[j]);
                        dstep[k][j] = n == 0 ? ds : dstep[k][j] + ds;
                        du[k][j] = fmaf(gs, b, n == 0 ? skip[j] * dy[k][j] : du[k][j]);
                        dB[k] = fmaf(gs, x, dB[k]);
                        adjoint[j] = decay * g;
                        if (n == 0) dskip[j] = fmaf(dy[k][j], x, dskip[j]);
                    }
                }
                write_token_sums(dB, Math<T>::kStepUnit, args.dB, path, states, n);
                add_partial(n, dA, Math<T>::kStepUnit, first_time);
            }

#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                if (k < path.count) {
                    add_scan(sums + static_cast<int64_t>(path.token[k]) * lanes, scan, args.scans, du[k]);
                    if (scan + 1 == args.scans)
                        store4(du_out.at(path.token[k]) + tile.channel, du[k], valid, s.aligned);
                }
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    if (s.softplus) dstep[k][j] *= Math<T>::softplus_slope(step[k][j]);
                    if (k >= path.count) dstep[k][j] = 0.f;
                    dbias[j] += dstep[k][j];
                }
                if (s.rank == 0 && k < path.count) {
                    const int64_t token = static_cast<int64_t>(tile.batch) * tokens + path.token[k];
                    float ddt[kVec];
#pragma unroll
                    for (int j = 0; j < kVec; ++j) ddt[j] = dstep[k][j] / Math<T>::kStepUnit;
                    store4(static_cast<T*>(args.ddt) + (token * all_scans + tile.scan(args, scan)) * s.dim + c0, ddt,
                           valid, s.aligned);
                }
            }
            for (int r = 0; r < s.rank; ++r) {
                float w[kVec], dw[kVec] = {}, ddt[kTokens];
                weight.get(r, w);
#pragma unroll
                for (int k = 0; k < kTokens; ++k) {
                    const float d = to_float(dt.at(path.token[k])[r]);
                    ddt[k] = 0.f;
#pragma unroll
                    for (int j = 0; j < kVec; ++j) {
                        ddt[k] = fmaf(dstep[k][j], w[j], ddt[k]);
                        dw[j] = fmaf(dstep[k][j], d, dw[j]);
                    }
                }
                write_token_sums(ddt, 1.f, args.ddt, path, s.rank, r);
                add_partial(states + kFixedRows + r, dw, 1.f / Math<T>::kStepUnit, first_time);
            }
        }
        add_partial(states + kRowSkip, dskip, 1.f, true);
        add_partial(states + kRowBias, dbias, 1.f / Math<T>::kStepUnit, true);
    }
}

}  // namespace

cudaError_t launch_cross_scan_bwd(const CrossBwdArgs& args, DType dtype, cudaStream_t stream) {
    const int staged = args.shape.rank <= kMaxStagedRank ? args.shape.rank : 0;
    const size_t shared = args.sums_bytes + sizeof(float) * kCrossChannels * staged;
    const int64_t blocks = args.shape.batch * args.shape.groups * args.slices;
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(cross_scan_bwd_kernel<typename decltype(tag)::type>, blocks, args.shape.threads, shared,
                             stream, args);
    });
}

}  // namespace gm
