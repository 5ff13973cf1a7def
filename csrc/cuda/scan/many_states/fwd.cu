// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan with several states. tile.cuh says how a block works.
#include "cuda/common/launch_kernel.cuh"
#include "cuda/scan/fwd_phases.cuh"
#include "cuda/scan/many_states/dispatch.h"
#include "cuda/scan/many_states/launch.h"
#include "cuda/scan/many_states/tile.cuh"

namespace gm {
namespace {

static_assert(kFwdStateTile % 4 == 0 && kManyStatesChunk % kFwdStretch<float> == 0 &&
              kManyStatesChunk % kFwdStretch<__half> == 0);

// Writes the states of a thread into those of its plane, (N, D).
template <int kStates>
__device__ __forceinline__ void save_states(float* plane, const ScanShape& s, const StateCoord<kStates>& at,
                                            const float (&h)[kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
        if (at.exists && at.first_state + i < s.states)
            plane[static_cast<int64_t>(at.first_state + i) * s.dim + at.channel] = h[i];
}

template <class T, bool kAligned, int kStates>
__global__ void __launch_bounds__(max_state_threads(kStates), kStates == 8 && sizeof(T) == 2 ? 2 : 1)
    many_states_fwd_kernel(const __grid_constant__ ScanFwdArgs args, const __grid_constant__ ManyStatesLayout layout) {
    begin_kernel();
    extern __shared__ float4 dynamic_shared[];
    __shared__ ChannelTable<kFwdTableRows> table;
    const ScanShape& s = args.shape;
    const ThreadCoord coord(s);
    const StateCoord<kStates> at(layout.lanes, s.dim);
    const StateTile tile{layout, reinterpret_cast<float*>(dynamic_shared)};
    const Plane<const T> u(args.u, coord, 0), B(args.B, coord, 0), C(args.C, coord, 0), dt(args.dt, coord, 0);
    const Plane<const T> z(args.z, coord, 0);
    const Plane<T> y_out(args.y, coord, 0);
    const bool has_norm = args.norm_weight.ptr != nullptr, has_z = args.z.ptr != nullptr;
    const StepWeight<T> weight(s, args.dt_weight, coord, tile.shared + layout.weights);
    fill_table<T, false>(args, coord, table);
    clear_tile(tile);
    float A[kStates], h[kStates] = {};
    load_A<T>(s, args.A, coord.group, at, A);

    const int tokens = s.height * s.width, c0 = coord.channel;
    const int64_t plane_states = static_cast<int64_t>(s.states) * s.dim;
    float* const saved = args.states == nullptr
                             ? nullptr
                             : args.states + static_cast<int64_t>(blockIdx.x) * args.num_chunks * plane_states;
    for (int first = 0; first < tokens; first += layout.tile) {
        {
            float bias[kVec];
            __syncthreads();  // the table and the tile are written, the tile before is read
            table.get(kFwdBias, c0, bias);
            fill_tile<kFwdStaged<T>, kAligned>(s, coord, tile, weight, bias, u, dt, B, C, first);
        }
        if (has_z)
            touch_tile<kFwdStaged<T>, T>(s, coord, tile, first + layout.tile, dt, B, C, u, z);
        else
            touch_tile<kFwdStaged<T>, T>(s, coord, tile, first + layout.tile, dt, B, C, u);
        for (int t0 = 0; t0 < layout.tile; t0 += kFwdStretch<T>) {
            if (saved != nullptr && t0 % kManyStatesChunk == 0 && first + t0 < tokens)
                save_states(saved + (first + t0) / kManyStatesChunk * plane_states, s, at, h);
            walk<T, kFwdStretch<T>>(tile, at, t0, A, h);
        }
        __syncthreads();
        float skip[kVec];
        table.get(kFwdSkip, c0, skip);
        for_staged_tokens<kFwdStaged<T>>(coord, tile, [&](int t0, bool there) {
            const Path<kFwdStaged<T>> path(s, coord.direction, there ? first + t0 : tokens);
            float y[kFwdStaged<T>][kVec];
            load_outputs<true>(tile, t0, there, c0, skip, y);
            finish_outputs<T, kAligned>(s, coord, has_norm, has_z, table, z, y_out, path, y);
        });
    }
}

template <class T, int kStates>
cudaError_t launch(const ScanFwdArgs& args, ManyStatesLayout layout, cudaStream_t stream) {
    const ScanShape& s = args.shape;
    layout.feature_vectors = has_feature_vectors<T>(args.B) && has_feature_vectors<T>(args.C);
    const auto kernel =
        s.aligned ? many_states_fwd_kernel<T, true, kStates> : many_states_fwd_kernel<T, false, kStates>;
    return launch_kernel(kernel, s.batch * s.groups, s.threads, sizeof(float) * static_cast<size_t>(layout.floats),
                         stream, args, layout);
}

}  // namespace

cudaError_t launch_many_states_fwd(const ScanFwdArgs& args, const ManyStatesLayout& layout, DType dtype,
                                   cudaStream_t stream) {
    return dispatch_many_states(dtype, layout, [&](auto tag, auto each) {
        return launch<typename decltype(tag)::type, decltype(each)::value>(args, layout, stream);
    });
}

}  // namespace gm
