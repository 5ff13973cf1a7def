// SPDX-License-Identifier: Apache-2.0
// Forward of the cross selective scan: one image along K directions, each with its own parameters, summed.
//
//   step = softplus(dt_weight_k dt_k + dt_bias_k);  h_t = exp(step A_k) h_{t-1} + step B_k u;  y = sum_k C_k . h + D_k
//   u
//
// A block walks its slice of the image along one direction after the other and adds up y in shared memory, where it
// fits, or in device memory that only this block uses; the last direction writes y.
#include "cuda/cross_tile.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"

namespace gm {
namespace {

template <class T>
__global__ void __launch_bounds__(kCrossFwdThreads) cross_scan_fwd_kernel(const __grid_constant__ CrossFwdArgs args) {
    constexpr int kTokens = kCrossTokens;
    __shared__ CrossExchange exchange;
    __shared__ ChannelTable<2, kCrossChannels> table;
    __shared__ Plane<const T> dt, B, C;  // of the direction; in shared memory, as y_out, to spare registers
    __shared__ Plane<T> y_out;
    extern __shared__ float4 dynamic_shared[];
    enum { kBias, kSkip };

    const ScanShape& s = args.shape;
    const CrossTile tile(args);
    const int c0 = tile.first + tile.channel, valid = tile.valid, lanes = tile.lanes;
    const int tokens = s.height * s.width, slab_tokens = tile.num_chunks() * kTokens, states = s.states;
    const Plane<const T> u(args.u, tile, c0);
    float* const weights = reinterpret_cast<float*>(dynamic_shared) + args.sums_bytes / sizeof(float);
    const int64_t carry_size = static_cast<int64_t>(states) * lanes * kVec;  // entering a slab, with N > 1
    float* const carried = args.carry + blockIdx.x * 2 * carry_size + tile.channel;
    int buffer = 0;

    for (int scan = 0; scan < args.scans; ++scan) {
        const int64_t row = tile.scan(args, scan) * s.dim + tile.first;  // of the slice's parameters
        const int direction = Tile::direction_of(s, scan);
        __syncthreads();  // the direction before is done with the tables, and its sums are there for other threads
        if (threadIdx.x == 0) {
            dt = Plane<const T>(args.dt, tile, scan * args.dt.scan);
            B = Plane<const T>(args.B, tile, scan * args.B.scan), C = Plane<const T>(args.C, tile, scan * args.C.scan);
            y_out = Plane<T>(args.y, tile, tile.first);
        }
        table.fill(s.dim - tile.first, [&](int c, float(&out)[2]) {
            out[kBias] = load_param_or<T>(args.dt_bias, row + c, 0.f) / Math<T>::kStepUnit;
            out[kSkip] = load_param_or<T>(args.D, row + c, 0.f);
        });
        const StepWeight<T, kCrossChannels> weight(s, args.dt_weight, tile, tile.scan(args, scan), tile.first, weights);
        __syncthreads();

        float carry[kVec] = {};
        for (int first = 0, slab = 0; first < tokens; first += slab_tokens, ++slab) {
            const int begin = first + tile.chunk * kTokens;
            const Path<kTokens> path(s, direction, begin);
            float step[kTokens][kVec], y[kTokens][kVec], skip[kVec], bias[kVec];
            table.get(kBias, tile.channel, bias);
            table.get(kSkip, tile.channel, skip);
            if (s.aligned) {
                load_steps<true>(s, dt, weight, bias, path, c0, valid, step);
            } else {
                load_steps<false>(s, dt, weight, bias, path, c0, valid, step);
            }
#pragma unroll 1
            for (int n = 0; n < states; ++n) {
                float A[kVec], P[kVec], h[kVec], decayed_C[kTokens][kVec], entering[kVec];
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    A[j] = j < valid ? load_param<T>(args.A, (row + tile.channel + j) * states + n) : 0.f;
                    P[j] = 1.f;
                    h[j] = 0.f;
                    // written by the slab before, at least one barrier ago
                    if (states > 1) carry[j] = slab > 0 ? carried[(slab & 1) * carry_size + n * lanes * kVec + j] : 0.f;
                }
#pragma unroll
                for (int k = 0; k < kTokens; ++k) {
                    const float b = Math<T>::kStepUnit * to_float(B.at(path.token[k])[n]);
                    const float c = to_float(C.at(path.token[k])[n]);
                    const Vec4<T> uv = load4(u.at(path.token[k]), valid, s.aligned);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) {
                        const float x = to_float(uv.v[j]), a = Math<T>::decay(step[k][j], A[j]);
                        h[j] = fmaf(a, h[j], step[k][j] * (b * x));
                        P[j] *= a;
                        y[k][j] = fmaf(c, h[j], n == 0 ? skip[j] * x : y[k][j]);
                        decayed_C[k][j] = c * P[j];
                    }
                }
                block_scan<false>(tile, exchange, buffer, P, h, carry, entering);
#pragma unroll
                for (int k = 0; k < kTokens; ++k)
#pragma unroll
                    for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);

                if (args.states != nullptr && begin % kCrossChunk == 0 && begin < tokens) {
                    float* out =
                        args.states + tile.state(args, scan, begin / kCrossChunk) + static_cast<int64_t>(n) * s.dim;
#pragma unroll
                    for (int j = 0; j < kVec; ++j)
                        if (j < valid) out[j] = entering[j];
                }
                if (states > 1 && tile.chunk == 0) {
#pragma unroll
                    for (int j = 0; j < kVec; ++j)
                        carried[((slab + 1) & 1) * carry_size + n * lanes * kVec + j] = carry[j];
                }
            }
            float4* const sums = cross_sums(args, tile, dynamic_shared);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                if (k >= path.count) continue;
                add_scan(sums + static_cast<int64_t>(path.token[k]) * lanes, scan, args.scans, y[k]);
                if (scan + 1 == args.scans) store4(y_out.at(path.token[k]) + tile.channel, y[k], valid, s.aligned);
            }
        }
    }
}

}  // namespace

cudaError_t launch_cross_scan_fwd(const CrossFwdArgs& args, DType dtype, cudaStream_t stream) {
    const int staged = args.shape.rank <= kMaxStagedRank ? args.shape.rank : 0;
    const size_t shared = args.sums_bytes + sizeof(float) * kCrossChannels * staged;
    const int64_t blocks = args.shape.batch * args.shape.groups * args.slices;
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(cross_scan_fwd_kernel<typename decltype(tag)::type>, blocks, args.shape.threads, shared,
                             stream, args);
    });
}

}  // namespace gm
