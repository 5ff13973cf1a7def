// SPDX-License-Identifier: Apache-2.0
// Backward of the grouped selective scan. It goes through the tiles from the last to the first. Each tile is first
// recomputed forward from the state saved at its start, then differentiated:
//
//   g_t = C_t dy_t + a_{t+1} g_{t+1}                   (the adjoint of h_t: the same scan, reversed and shifted)
//   dstep = g (A a h_{t-1} + B u),  dA = sum g step a h_{t-1},  du = sum_n g step B + D dy
//   dB = sum_d g step u,  dC = sum_d dy h
//
// The step and its gradient are in units of Math<T>::kStepUnit throughout.
//
// Parameter gradients: each warp adds up its own part in a fixed order, in registers over all tiles or in its own row
// of `partials`; reduce.cu adds the rows.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/scan/bwd_phases.cuh"
#include "cuda/scan/launch.h"

namespace gm {
namespace {

template <class T, bool kSingle, bool kAligned>
__global__ void __launch_bounds__(kBwdTile / kBwdTokens<T, kSingle>, kSingle&& kAligned && sizeof(T) == 2 ? 2 : 1)
    grouped_scan_bwd_kernel(const __grid_constant__ ScanBwdArgs args) {
    begin_kernel();
    constexpr int kTokens = kBwdTokens<T, kSingle>, kThreads = kBwdTile / kTokens;
    __shared__ ScanExchange exchange;
    __shared__ ChannelTable<kBwdTableRows> table;
    extern __shared__ float4 dynamic_shared[];

    const ScanShape& s = args.shape;
    const ThreadCoord coord(s);
    const int c0 = coord.channel, valid = coord.valid, lanes = coord.lanes;
    const int64_t param = static_cast<int64_t>(coord.group) * s.param_dim + c0;
    const bool has_norm = args.norm_weight.ptr != nullptr, has_z = args.z.ptr != nullptr;
    const Plane<const T> u(args.u, coord, c0);
    // What a phase needs once or twice is kept in shared memory, from the group's first channel on: 3 registers each.
    __shared__ Plane<const T> dout, z, dt, B, C;
    __shared__ Plane<T> du_out, dz_out, dB_out, dC_out, ddt_out;
    if (threadIdx.x == 0) {
        dt = Plane<const T>(args.dt, coord, 0), B = Plane<const T>(args.B, coord, 0),
        C = Plane<const T>(args.C, coord, 0);
        dout = Plane<const T>(args.dy, coord, 0), z = Plane<const T>(args.z, coord, 0);
        du_out = Plane<T>(args.du, coord, 0), dz_out = Plane<T>(args.dz, coord, 0),
        ddt_out = Plane<T>(args.ddt, coord, 0);
        dB_out = Plane<T>(args.dB, coord, 0), dC_out = Plane<T>(args.dC, coord, 0);
    }
    const StepWeight<T> weight(s, args.dt_weight, coord, reinterpret_cast<float*>(dynamic_shared));
    fill_table<T>(args, coord, table);
    __syncthreads();

    const int tokens = s.height * s.width, tile_tokens = coord.num_chunks() * kTokens;
    const int states = kSingle ? 1 : s.states;
    const int64_t plane_states = static_cast<int64_t>(states) * s.dim;
    const float* saved_plane = args.states + static_cast<int64_t>(blockIdx.x) * args.num_chunks * plane_states + c0;
    float* scratch =
        args.carry == nullptr ? nullptr : args.carry + static_cast<int64_t>(blockIdx.x) * 2 * plane_states + c0;
    const int64_t rows = states + kFixedRows + s.rank;
    float* partials =
        args.partials +
        ((static_cast<int64_t>(coord.batch) * coord.num_warps() + coord.warp()) * s.groups + coord.group) * rows *
            s.dim +
        c0;
    const PartialRows partial{partials, valid, s.dim, coord.chunk_in_warp == 0};
    const TokenSums<T, kTokens> write_token_sums{coord, lanes};
    int buffer = 0;
    __shared__ float4 parked_sums[kParkedRows][kThreads];
    const ParkedSums<kThreads> parked{parked_sums};
    for (int row = 0; row < kParkedRows; ++row) parked_sums[row][threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    float A[kVec], adjoint_carry[kVec] = {};
#pragma unroll
    for (int j = 0; j < kVec; ++j) A[j] = kSingle && j < valid ? load_param<T>(args.A, param + j) : 0.f;

    const int64_t chunks_per_tile = kSingle ? 1 : tile_tokens / args.chunk;
    const int num_tiles = (tokens + tile_tokens - 1) / tile_tokens;
    for (int tile = num_tiles - 1; tile >= 0; --tile) {
        const bool first_time = tile == num_tiles - 1;
        const Path<kTokens> path(s, coord.direction, tile * tile_tokens + coord.chunk * kTokens);
        const float* saved = saved_plane + tile * chunks_per_tile * plane_states;
        float step[kTokens][kVec], h[kTokens][kVec], dy[kTokens][kVec], entering[kVec];
        {
            float bias[kVec];
            table.get(kBias, c0, bias);
            load_steps<kAligned>(s, dt, weight, bias, path, c0, valid, step);
        }

        // y = C . h + D u, kept in dy until its derivative takes its place
        for (int n = 0; n < states; ++n) {
            if (!kSingle) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) A[j] = j < valid ? load_param<T>(args.A, (param + j) * states + n) : 0.f;
            }
            states_of_tile<kAligned>(coord, exchange, buffer, u, B, path, n, A, step,
                                     saved + static_cast<int64_t>(n) * s.dim, h, entering);
            add_outputs<T, kSingle>(C, path, n, h, dy);
        }
        through_gates_and_norm<T, kAligned>(s, coord, has_norm, has_z, table, dout, z, dz_out, path, parked, u, dy);

        float du[kTokens][kVec], dstep[kTokens][kVec], dA[kVec], skip[kVec], dskip[kVec];
        table.get(kSkip, c0, skip);
        parked.get(kRowSkip, dskip);
        if (kSingle) parked.get(kParkedA, dA);
        for (int n = 0; n < states; ++n) {
            if (!kSingle) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    A[j] = j < valid ? load_param<T>(args.A, (param + j) * states + n) : 0.f;
                    adjoint_carry[j] = !first_time && j < valid
                                           ? scratch[(tile & 1) * plane_states + static_cast<int64_t>(n) * s.dim + j]
                                           : 0.f;
                    dA[j] = 0.f;
                }
                states_of_tile<kAligned>(coord, exchange, buffer, u, B, path, n, A, step,
                                         saved + static_cast<int64_t>(n) * s.dim, h, entering);
            }
            float P[kVec], local[kVec], adjoint[kVec], dC[kTokens], dB[kTokens];
            hide(A);
            start_adjoints(C, path, n, A, step, h, dy, P, local, dC);
            write_token_sums(dC, 1.f, dC_out, path, n);
            block_scan<true>(coord, exchange, buffer, P, local, adjoint_carry, adjoint);
            if (!kSingle && tile > 0 && coord.chunk == 0) {
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (j < valid)
                        scratch[((tile - 1) & 1) * plane_states + static_cast<int64_t>(n) * s.dim + j] =
                            adjoint_carry[j];
            }
            hide(A);
            state_gradients<T, kSingle, kAligned>(coord, u, B, C, du_out, path, n, A, step, h, entering, dy, skip,
                                                  adjoint, du, dstep, dA, dskip, dB);
            write_token_sums(dB, Math<T>::kStepUnit, dB_out, path, n);
            if (!kSingle) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) dA[j] = Math<T>::kStepUnit * chunk_sum(dA[j], lanes);
                partial.add(n, dA, first_time);
            }
        }

        parked.put(kRowSkip, dskip);
        if (kSingle) parked.put(kParkedA, dA);
        float dbias[kVec];
        parked.get(kRowBias, dbias);
        finish_steps<T, kSingle, kAligned>(s, coord, du_out, ddt_out, path, step, du, dstep, dbias);
        parked.put(kRowBias, dbias);
        all_feature_gradients(weight, dt, ddt_out, path, s.rank, dstep, write_token_sums, partial, states + kFixedRows,
                              lanes, first_time);
    }

    if (kSingle) partial.finish(parked, lanes, kParkedA, 0, Math<T>::kStepUnit);
    partial.finish(parked, lanes, kRowSkip, states + kRowSkip, 1.f);
    partial.finish(parked, lanes, kRowBias, states + kRowBias, 1.f / Math<T>::kStepUnit);
    partial.finish(parked, lanes, kRowProduct, states + kRowProduct, 1.f);
    partial.finish(parked, lanes, kRowSum, states + kRowSum, 1.f);
}

template <class T, bool kSingle>
cudaError_t launch(const ScanBwdArgs& args, cudaStream_t stream) {
    const size_t shared = args.shape.rank <= kMaxStagedRank ? sizeof(float) * 32 * kVec * args.shape.rank : 0;
    const auto kernel =
        args.shape.aligned ? grouped_scan_bwd_kernel<T, kSingle, true> : grouped_scan_bwd_kernel<T, kSingle, false>;
    return launch_kernel(kernel, args.shape.batch * args.shape.groups, args.shape.threads, shared, stream, args);
}

}  // namespace

cudaError_t launch_grouped_scan_bwd(const ScanBwdArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return args.shape.states == 1 ? launch<T, true>(args, stream) : launch<T, false>(args, stream);
    });
}

}  // namespace gm
