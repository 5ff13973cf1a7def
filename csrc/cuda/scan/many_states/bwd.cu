// SPDX-License-Identifier: Apache-2.0
// Backward of the grouped selective scan with several states. It goes through the tiles from the last to the first;
// before each the forward has saved a state. In a tile it goes through stretches of 4 tokens: the states that enter the
// stretches are computed with y, those within a stretch again when the adjoint walks it. tile.cuh says how a block
// works, ../README.md derives the gradients.
#include "cuda/common/launch_kernel.cuh"
#include "cuda/scan/bwd_phases.cuh"
#include "cuda/scan/many_states/dispatch.h"
#include "cuda/scan/many_states/launch.h"
#include "cuda/scan/many_states/tile.cuh"

namespace gm {
namespace {

// A thread's sums for the parameters of its channels, by ScanPartialRow. They lie in shared memory: the walks need the
// registers.
struct SharedSums {
    float4* sums;
    int threads;

    __device__ __forceinline__ void get(int row, float (&sum)[kVec]) const {
        const float4 v = sums[row * threads + threadIdx.x];
        sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
    }
    __device__ __forceinline__ void put(int row, const float (&sum)[kVec]) const {
        sums[row * threads + threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
};

static_assert(kBwdStateTile % kBwdStretch == 0 && kBwdStateTile % kBwdStaged == 0);

// Sums over the channels of a warp, for dB and dC. Its threads put what they add for a token into shared memory, and
// after kAdded tokens each reads four states of a token in turn from all channels: a third of the instructions of sums
// by shuffles, and the order of the sum is fixed.
template <int kStates>
struct ChannelSums {
    static constexpr int kAdded = added_tokens(kStates);
    const StateTile& tile;
    const StateCoord<kStates>& at;
    float* products;  // of the warp, (kAdded, dB or dC, channels of the warp, row)

    __device__ ChannelSums(const StateTile& tile, const StateCoord<kStates>& at)
        : tile(tile),
          at(at),
          products(tile.shared + tile.at.products + static_cast<int>(threadIdx.x >> 5) * kAdded * 2 * kOfWarp) {}

    // What the thread adds to dB (kind 0) or dC (kind 1) of the k-th token.
    __device__ __forceinline__ void put(int k, int kind, const float (&v)[kStates]) const {
        put_states(products + (2 * k + kind) * kOfWarp + (threadIdx.x & 31) * kStates, v);
    }
    // Adds them up for the kAdded tokens from t0 on. The warp calls it together.
    __device__ __forceinline__ void add_up(int t0) const {
        __syncwarp();
        const int quads = tile.at.row / kVec, lane = threadIdx.x & 31, channels = 32 / at.lanes;
        const int items = kAdded * 2 * quads, splits = max(32 / items, 1), own = channels / splits;
        for (int item = lane & (items - 1); item < items; item += 32) {
            const int part = item / quads, split = splits > 1 ? lane / items : 0;  // part: token and kind
            const float* const from = products + part * kOfWarp + (item & (quads - 1)) * kVec;
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
            for (int i = 0; i < own; ++i) {
                // Each part begins with another channel, so that fewer threads read one bank.
                const int c = split * own + ((i + part) & (own - 1));
                const float4 v = *reinterpret_cast<const float4*>(from + c * tile.at.row);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            for (int d = items; d < 32; d <<= 1) {
                sum.x += __shfl_xor_sync(kFullWarp, sum.x, d), sum.y += __shfl_xor_sync(kFullWarp, sum.y, d);
                sum.z += __shfl_xor_sync(kFullWarp, sum.z, d), sum.w += __shfl_xor_sync(kFullWarp, sum.w, d);
            }
            const int token = t0 + (part >> 1), kind = part & 1;
            float* const to = tile.shared + tile.at.token_sums +
                              ((static_cast<int>(threadIdx.x >> 5) * tile.at.tile + token) * 2 + kind) * tile.at.row;
            if (split == 0) *reinterpret_cast<float4*>(to + (item & (quads - 1)) * kVec) = sum;
        }
        __syncwarp();
    }

private:
    static constexpr int kOfWarp = 32 * kStates;
};

// Walks the stretch from t0 on back, with the states `before` it. `adjoint` comes in as what reaches the states of its
// last token from behind. Leaves the sum of g B and the gradient of the step of each token and channel, and dB and dC
// by warp.
template <class T, int kStates>
__device__ __forceinline__ void walk_back(const StateTile& tile, const StateCoord<kStates>& at, int t0,
                                          const ChannelSums<kStates>& channel_sums, const float (&A)[kStates],
                                          const float (&before)[kStates], float (&adjoint)[kStates],
                                          float (&dA)[kStates]) {
    float decay[kBwdStretch][kStates], h[kBwdStretch][kStates];
#pragma unroll
    for (int k = 0; k < kBwdStretch; ++k) {
        const float2 step_u = tile.step(t0 + k, at.channel);
        const float x = step_u.x * step_u.y;
        float b[kStates];
        tile.feature(tile.at.B, t0 + k, at.first_state, b);
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
            decay[k][i] = Math<T>::decay(step_u.x, A[i]);
            h[k][i] = fmaf(decay[k][i], k > 0 ? h[k > 0 ? k - 1 : 0][i] : before[i], x * b[i]);
        }
    }
#pragma unroll
    for (int k = kBwdStretch - 1; k >= 0; --k) {
        const float2 step_u = tile.step(t0 + k, at.channel);
        const float dy = tile.y(t0 + k, at.channel), x = step_u.x * step_u.y;
        float b[kStates], c[kStates], of_B[kStates], of_C[kStates], gb = 0.f, through_A = 0.f;
        tile.feature(tile.at.B, t0 + k, at.first_state, b);
        tile.feature(tile.at.C, t0 + k, at.first_state, c);
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
            const float g = fmaf(c[i], dy, adjoint[i]);
            adjoint[i] = decay[k][i] * g;
            const float through = adjoint[i] * (k > 0 ? h[k > 0 ? k - 1 : 0][i] : before[i]);
            dA[i] = fmaf(through, step_u.x, dA[i]);
            through_A = fmaf(A[i], through, through_A);
            gb = fmaf(g, b[i], gb);
            of_B[i] = g * x;
            of_C[i] = dy * h[k][i];
        }
        channel_sums.put(k % ChannelSums<kStates>::kAdded, 0, of_B);
        channel_sums.put(k % ChannelSums<kStates>::kAdded, 1, of_C);
        const float dstep = fmaf(gb, step_u.y, Math<T>::kStepUnit * through_A);
        // Even threads of a channel add up gb, odd ones the gradient of the step.
        const bool odd = at.lane & 1;
        float sum = (odd ? dstep : gb) + __shfl_xor_sync(kFullWarp, odd ? gb : dstep, 1);
        for (int d = 2; d < at.lanes; d <<= 1) sum += __shfl_xor_sync(kFullWarp, sum, d);
        if (at.exists && at.lane < 2)
            tile.shared[tile.at.gradients + 2 * ((t0 + k) * tile.at.width + at.channel) + at.lane] = sum;
        if (k % ChannelSums<kStates>::kAdded == 0) channel_sums.add_up(t0 + k);
    }
}

// Adds up what the warps left of dB and dC of a tile, and stores it.
template <class T>
__device__ __forceinline__ void store_feature_gradients(const ScanShape& s, const StateTile& tile, int first,
                                                        const Plane<T>& dB, const Plane<T>& dC) {
    const int quads = tile.at.row / kVec, shift = 31 - __clz(2 * quads), warp_sums = tile.at.tile * 2 * tile.at.row;
    const int end = min(tile.at.tile, s.height * s.width - first) << shift;
    const int* const numbers = reinterpret_cast<const int*>(tile.shared + tile.at.tokens);
    for (int i = threadIdx.x; i < end; i += blockDim.x) {
        const int token = numbers[i >> shift], n = (i & (quads - 1)) * kVec;
        const bool of_B = (i & quads) == 0;
        float sum[kVec] = {};
        for (int warp = 0; warp < static_cast<int>(blockDim.x >> 5); ++warp) {
            const float4 v =
                *reinterpret_cast<const float4*>(tile.shared + tile.at.token_sums + warp * warp_sums + i * kVec);
            sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
        const float unit = of_B ? Math<T>::kStepUnit : 1.f;
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] *= unit;
        T* const to = (of_B ? dB : dC).at(token) + n;
        const int valid = s.states - n;
        if (tile.at.feature_vectors && valid >= kVec)
            store4<true>(to, sum, kVec);
        else
            store4<false>(to, sum, valid);
    }
}

template <class T, bool kAligned, int kStates>
__global__ void __launch_bounds__(max_state_threads(kStates))
    many_states_bwd_kernel(const __grid_constant__ ScanBwdArgs args, const __grid_constant__ ManyStatesLayout layout) {
    begin_kernel();
    extern __shared__ float4 dynamic_shared[];
    __shared__ ChannelTable<kBwdTableRows> table;
    __shared__ Plane<const T> dout, z, dt, B, C;
    __shared__ Plane<T> du_out, dz_out, dB_out, dC_out, ddt_out;
    const ScanShape& s = args.shape;
    const ThreadCoord coord(s);
    const StateCoord<kStates> at(layout.lanes, s.dim);
    const StateTile tile{layout, reinterpret_cast<float*>(dynamic_shared)};
    const int c0 = coord.channel, valid = coord.valid, lanes = coord.lanes, tokens = s.height * s.width;
    const bool has_norm = args.norm_weight.ptr != nullptr, has_z = args.z.ptr != nullptr;
    const Plane<const T> u(args.u, coord, 0), own_u(args.u, coord, c0);
    if (threadIdx.x == 0) {
        dt = Plane<const T>(args.dt, coord, 0), B = Plane<const T>(args.B, coord, 0),
        C = Plane<const T>(args.C, coord, 0);
        dout = Plane<const T>(args.dy, coord, 0), z = Plane<const T>(args.z, coord, 0);
        du_out = Plane<T>(args.du, coord, 0), dz_out = Plane<T>(args.dz, coord, 0),
        ddt_out = Plane<T>(args.ddt, coord, 0);
        dB_out = Plane<T>(args.dB, coord, 0), dC_out = Plane<T>(args.dC, coord, 0);
    }
    const StepWeight<T> weight(s, args.dt_weight, coord, tile.shared + layout.weights);
    fill_table<T>(args, coord, table);
    clear_tile(tile);
    float A[kStates], dA[kStates] = {}, adjoint[kStates] = {};
    load_A<T>(s, args.A, coord.group, at, A);
    const SharedSums sums{reinterpret_cast<float4*>(tile.shared + layout.sums), 32 * layout.parts};
    if (coord.warp() < layout.parts) {
        constexpr float kNone[kVec] = {};
        for (int row = 0; row < kFixedRows; ++row) sums.put(row, kNone);
    }

    const int64_t plane_states = static_cast<int64_t>(s.states) * s.dim;
    const int64_t rows = s.states + kFixedRows + s.rank, part_rows = static_cast<int64_t>(s.groups) * rows * s.dim;
    float* const plane_partials =
        args.partials + static_cast<int64_t>(coord.batch) * layout.parts * part_rows + coord.group * rows * s.dim;
    const PartialRows partial{plane_partials + coord.warp() * part_rows + c0, valid, s.dim, coord.chunk_in_warp == 0};
    const TokenSums<T, kBwdStaged> write_token_sums{coord, lanes};
    bool first_time = true;
    const ChannelSums<kStates> channel_sums(tile, at);
    // A thread's own states before the stretches of a tile.
    float* const stretches = tile.shared + layout.stretches + threadIdx.x * kStates;
    const int block_states = blockDim.x * kStates;

    const int last = (tokens - 1) / layout.tile * layout.tile;
    for (int first = last; first >= 0; first -= layout.tile) {
        {
            float bias[kVec];
            __syncthreads();  // what was in the tile is used
            table.get(kBias, c0, bias);
            fill_tile<kBwdStaged, kAligned>(s, coord, tile, weight, bias, u, dt, B, C, first);
        }
        touch_tile<kBwdStaged, T>(s, coord, tile, first - layout.tile, dt, B, C, u, dout);
        if (has_z) touch_tile<kBwdStaged, T>(s, coord, tile, first - layout.tile, dt, B, C, z);
        float h[kStates];
        const float* const saved =
            args.states + (static_cast<int64_t>(blockIdx.x) * args.num_chunks + first / layout.tile) * plane_states;
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            h[i] = at.exists && at.first_state + i < s.states
                       ? saved[static_cast<int64_t>(at.first_state + i) * s.dim + at.channel]
                       : 0.f;
        for (int n = 0; n < layout.tile / kBwdStretch; ++n) {
            put_states(stretches + n * block_states, h);
            walk<T, kBwdStretch>(tile, at, n * kBwdStretch, A, h);
        }
        __syncthreads();

        for_staged_tokens<kBwdStaged>(coord, tile, [&](int t0, bool there) {
            const Path<kBwdStaged> path(s, coord.direction, there ? first + t0 : tokens);
            float dy[kBwdStaged][kVec];
            constexpr float kNone[kVec] = {};
            load_outputs<false>(tile, t0, there, c0, kNone, dy);
            through_gates_and_norm<T, kAligned>(s, coord, has_norm, has_z, table, dout, z, dz_out, path, sums, own_u,
                                                dy);
            if (!there || c0 >= layout.width) return;
#pragma unroll
            for (int k = 0; k < kBwdStaged; ++k)
                *reinterpret_cast<float4*>(&tile.y(t0 + k, c0)) = make_float4(dy[k][0], dy[k][1], dy[k][2], dy[k][3]);
        });
        __syncthreads();

        for (int n = layout.tile / kBwdStretch - 1; n >= 0; --n) {
            get_states(stretches + n * block_states, h);
            walk_back<T>(tile, at, n * kBwdStretch, channel_sums, A, h, adjoint, dA);
        }
        __syncthreads();
        store_feature_gradients<T>(s, tile, first, dB_out, dC_out);

        for_staged_tokens<kBwdStaged>(coord, tile, [&](int t0, bool there) {
            const Path<kBwdStaged> path(s, coord.direction, there ? first + t0 : tokens);
            float step[kBwdStaged][kVec], dstep[kBwdStaged][kVec], du[kBwdStaged][kVec];
            float dskip[kVec], dbias[kVec], skip[kVec];
            table.get(kSkip, c0, skip);
            sums.get(kRowSkip, dskip);
            sums.get(kRowBias, dbias);
#pragma unroll
            for (int k = 0; k < kBwdStaged; ++k) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) step[k][j] = dstep[k][j] = du[k][j] = 0.f;
                if (c0 >= layout.width) continue;
                const float4 dy4 = *reinterpret_cast<const float4*>(&tile.y(t0 + k, c0));
                const float dy[kVec] = {dy4.x, dy4.y, dy4.z, dy4.w};
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float2 step_u = tile.step(t0 + k, c0 + j), gradient = tile.gradient(t0 + k, c0 + j);
                    step[k][j] = step_u.x;
                    dstep[k][j] = j < valid ? gradient.y : 0.f;
                    du[k][j] = fmaf(step_u.x, gradient.x, skip[j] * dy[j]);
                    if (k < path.count) dskip[j] = fmaf(dy[j], step_u.y, dskip[j]);
                }
            }
            finish_steps<T, false, kAligned>(s, coord, du_out, ddt_out, path, step, du, dstep, dbias);
            sums.put(kRowSkip, dskip);
            sums.put(kRowBias, dbias);
            all_feature_gradients(weight, dt, ddt_out, path, s.rank, dstep, write_token_sums, partial,
                                  s.states + kFixedRows, lanes, first_time);
            first_time = false;
        });
    }

    if (coord.warp() < layout.parts) {
        partial.finish(sums, lanes, kRowSkip, s.states + kRowSkip, 1.f);
        partial.finish(sums, lanes, kRowBias, s.states + kRowBias, 1.f / Math<T>::kStepUnit);
        partial.finish(sums, lanes, kRowProduct, s.states + kRowProduct, 1.f);
        partial.finish(sums, lanes, kRowSum, s.states + kRowSum, 1.f);
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i)
        if (at.exists && at.first_state + i < s.states)
            plane_partials[static_cast<int64_t>(at.first_state + i) * s.dim + at.channel] = Math<T>::kStepUnit * dA[i];
}

template <class T, int kStates>
cudaError_t launch(const ScanBwdArgs& args, ManyStatesLayout layout, cudaStream_t stream) {
    const ScanShape& s = args.shape;
    layout.feature_vectors = has_feature_vectors<T>(args.B) && has_feature_vectors<T>(args.C) &&
                             has_feature_vectors<T>(args.dB) && has_feature_vectors<T>(args.dC);
    const auto kernel =
        s.aligned ? many_states_bwd_kernel<T, true, kStates> : many_states_bwd_kernel<T, false, kStates>;
    return launch_kernel(kernel, s.batch * s.groups, s.threads, sizeof(float) * static_cast<size_t>(layout.floats),
                         stream, args, layout);
}

}  // namespace

cudaError_t launch_many_states_bwd(const ScanBwdArgs& args, const ManyStatesLayout& layout, DType dtype,
                                   cudaStream_t stream) {
    return dispatch_many_states(dtype, layout, [&](auto tag, auto each) {
        return launch<typename decltype(tag)::type, decltype(each)::value>(args, layout, stream);
    });
}

}  // namespace gm
