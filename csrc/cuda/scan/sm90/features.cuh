// SPDX-License-Identifier: Apache-2.0
// The features of the tokens (B, C and the low-rank step features) in shared memory, and the steps computed from them.
#pragma once

#include <type_traits>

#include "cuda/scan/sm90/tile_scheduler.cuh"

namespace gm {

// The features of a token are numbered B, C, dt_0, dt_1, ...; their images are given in the order B, C, dt.
struct FeatureImages {
    const ImageArg &B, &C, &dt;
    __device__ const ImageArg& operator[](int i) const { return i == 0 ? B : i == 1 ? C : dt; }
};

// First element of an image for a batch and group.
template <class T>
__device__ __forceinline__ T* plane_of(const ImageArg& image, int batch, int group) {
    return static_cast<T*>(image.ptr) + (batch * image.batch + group * image.group);
}

// B (times ln 2), C and step features of a tile in shared memory, [token][width] floats. They are fetched from device
// memory one tile ahead. A thread has kFetchTokens tokens, and of each of them every kSharers-th feature.
template <class T, class Block>
struct StepFeatures {
    using Value = T;
    // Where threads share the features of a token, a thread has the image of its own first feature, and dt.
    static constexpr int kImages = Block::kSharers == 1 ? 3 : 2;
    T fetched[Block::kFetchTokens][Block::kFetch];
    // For each token of this thread: its row-major distance from the first token of the tile, and the bound below
    // which the cursor must be for the token to exist. In tiles of runs: the run of the token, and its row there.
    int distance[Block::kFetchTokens], limit[Block::kFetchTokens];
    const T* plane[kImages];

    template <class Scheduler>
    __device__ StepFeatures(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler) {
        const int columns = scheduler.columns && !scheduler.runs() ? plan.columns : 1;
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            const int slot = token(i);
            if (scheduler.runs()) {
                distance[i] = slot / kFwdTokens >> plan.run_shift;
                limit[i] = slot - distance[i] * plan.run_rows;
                continue;
            }
            const int row = slot / (scheduler.columns ? plan.of_columns : Divisor{}), column = slot - row * columns;
            distance[i] = scheduler.columns ? row * s.width + column : slot;
            limit[i] = !scheduler.columns ? s.height * s.width - slot : s.width - column;
            if (slot >= scheduler.box_tokens) limit[i] = INT32_MIN;
        }
    }
    __device__ static int token(int i) {
        return threadIdx.x % (Block::kThreads / Block::kSharers) + i * Block::kThreads;
    }
    __device__ static int sharer() {
        return Block::kSharers == 1 ? 0 : threadIdx.x / (Block::kThreads / Block::kSharers);
    }
    // The number of this thread's j-th feature.
    __device__ static int feature(int j) { return sharer() + j * Block::kSharers; }
    __device__ static bool has(const ScanShape& s, int j) {
        return Block::kFeatures == 3 ? j < 3 : feature(j) < s.rank + 2;
    }
    __device__ static bool in_tile(int i) {
        return Block::kFetchTokens * Block::kThreads == Block::kTokens || token(i) < Block::kTokens;
    }
    // Where this thread's i-th token of a tile lies in the plane; `exists` says whether it does.
    template <class Scheduler>
    __device__ __forceinline__ uint32_t place(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                              const TileCursor& at, int i, bool& exists) const {
        if (!scheduler.runs()) {
            exists = at.first < limit[i];
            return at.first + distance[i];
        }
        const ColumnRun run = run_of(plan, at.first + distance[i]);
        const int row = run.row + limit[i];
        exists = row < s.height && run.column < s.width && in_tile(i);
        return row * s.width + run.column;
    }

    template <class Scheduler>
    __device__ __forceinline__ void fetch(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                          const TileCursor& at, const FeatureImages& images) {
        const int first = Block::kSharers == 1 ? 0 : min(sharer(), 2);
        const uint32_t own_stride = static_cast<uint32_t>(images[first].token);
        if (scheduler.enters(plan, at)) {
            plane[0] =
                plane_of<const T>(images[first], at.batch, scheduler.own_group()) + (first == 2 ? sharer() - 2 : 0);
            if (Block::kSharers == 1) plane[1] = plane_of<const T>(images.C, at.batch, scheduler.own_group());
            plane[kImages - 1] = plane_of<const T>(images.dt, at.batch, scheduler.own_group()) + sharer() - 2;
        }
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            bool exists;
            uint32_t from = place(s, plan, scheduler, at, i, exists);
            if (!exists) from = 0;  // a valid address in any case
#pragma unroll
            for (int j = 0; j < Block::kFetch; ++j) {
                if (!has(s, j)) continue;
                const int image = min(j, kImages - 1);
                const uint32_t stride = image == kImages - 1 ? static_cast<uint32_t>(images.dt.token)
                                        : image == 1         ? static_cast<uint32_t>(images.C.token)
                                                             : own_stride;
                const int ahead = image == kImages - 1 ? j * Block::kSharers : 0;
                fetched[i][j] = plane[image][static_cast<uint64_t>(from) * stride + ahead];
            }
        }
    }
    // Writes what was fetched for the tile `at` to shared memory. The loads are waited for here and not before.
    template <class Scheduler>
    __device__ __forceinline__ void keep(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                         const TileCursor& at, float* to) const {
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            bool real;
            place(s, plan, scheduler, at, i, real);
            const auto value = [&](int j) {
                return real ? to_float(fetched[i][j]) * (feature(j) == 0 ? kLn2 : 1.f) : 0.f;
            };
            if constexpr (Block::kFeatures <= 4) {
                float v[4] = {};
#pragma unroll
                for (int j = 0; j < Block::kFeatures; ++j)
                    if (has(s, j)) v[j] = value(j);
                if (in_tile(i)) *reinterpret_cast<float4*>(to + token(i) * 4) = make_float4(v[0], v[1], v[2], v[3]);
            } else {
#pragma unroll
                for (int j = 0; j < Block::kFetch; ++j)
                    if (has(s, j) && in_tile(i)) to[token(i) * Block::width(s) + feature(j)] = value(j);
            }
        }
    }
    // The gradients of this thread's features, from shared memory to their images: the sums of kPartials copies there.
    template <int kPartials, class Scheduler>
    __device__ __forceinline__ void send(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                         const TileCursor& at, const float* from, T* const (&planes)[3],
                                         const FeatureImages& images) const {
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            bool exists;
            const uint32_t to = place(s, plan, scheduler, at, i, exists);
            if (!exists) continue;
#pragma unroll
            for (int j = 0; j < Block::kFetch; ++j) {
                if (!has(s, j)) continue;
                const int f = feature(j), image = min(f, 2);
                const uint32_t stride = static_cast<uint32_t>(images[image].token);
                float sum = from[token(i) * Block::width(s) + f];
#pragma unroll
                for (int p = 1; p < kPartials; ++p) sum += from[(p * Block::kTokens + token(i)) * Block::width(s) + f];
                planes[image][static_cast<uint64_t>(to) * stride + f - image] = from_float<T>(sum);
            }
        }
    }
};

// Zeros in the slots that TMA does not fill in any of `count` tiles: those behind the box, and the one that threads
// without tokens or channels read.
template <class Block>
__device__ __forceinline__ void clear_tails(unsigned char* tiles, int count, int tile_bytes, int box_bytes) {
    constexpr int kWarps = Block::kThreads / 32;
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < count; tile += kWarps)
#pragma unroll 1
        for (int at = box_bytes + threadIdx.x % 32 * 16; at < tile_bytes; at += 32 * 16)
            *reinterpret_cast<uint4*>(tiles + tile * tile_bytes + at) = make_uint4(0, 0, 0, 0);
}

// Zeros where no thread writes features, in both tiles: for threads without tokens, and in the unused ends of rows.
template <class Block>
__device__ __forceinline__ void clear_features(float* features, int feature_bytes) {
    const auto clear = [&](int at) {
        *reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(features) + at) = make_float4(0.f, 0.f, 0.f, 0.f);
    };
    if constexpr (Block::kFeatures <= 4) {
        if (threadIdx.x < 2) clear(threadIdx.x * feature_bytes + Block::kTokens * 16);
    } else {
#pragma unroll 1
        for (int at = threadIdx.x * 16; at < 2 * feature_bytes; at += Block::kThreads * 16) clear(at);
    }
}

// B (times ln 2) and C of a token. With few step features, the same access as for these.
template <class Block>
__device__ __forceinline__ float2 load_features(const float* p) {
    if constexpr (Block::kFeatures > 4) return *reinterpret_cast<const float2*>(p);
    const float4 v = *reinterpret_cast<const float4*>(p);
    return make_float2(v.x, v.y);
}

// steps[k][j] = softplus(bias + dt_weight dt) of a thread's tokens, in units of ln 2. `weight(r)` gives 4 channels.
template <class T, class Block, class F>
__device__ __forceinline__ void load_steps_sm90(const float* features, int feature_step, const ScanShape& s,
                                                const float4& bias, F&& weight, float (&steps)[kFwdTokens][kVec]) {
    const auto set = [&](int k, const float4& w, float d, const float(&from)[kVec]) {
        steps[k][0] = fmaf(w.x, d, from[0]), steps[k][1] = fmaf(w.y, d, from[1]);
        steps[k][2] = fmaf(w.z, d, from[2]), steps[k][3] = fmaf(w.w, d, from[3]);
    };
    const auto add = [&](int k, const float4& w, float d) { set(k, w, d, steps[k]); };
    float start[kVec] = {bias.x, bias.y, bias.z, bias.w};
    if constexpr (Block::kFeatures > 4) {
        // Two features at a time, by one 8-byte read; where the rank is odd, the second weight of the last pair is 0.
        const auto add_pair = [&](int r, auto first) {
            const float4 w0 = weight(r), w1 = weight(r + 1);
#pragma unroll
            for (int k = 0; k < kFwdTokens; ++k) {
                const float2 d = *reinterpret_cast<const float2*>(features + k * feature_step + 2 + r);
                set(k, w0, d.x, decltype(first)::value ? start : steps[k]);
                add(k, w1, d.y);
            }
        };
        add_pair(0, std::true_type{});
        if constexpr (Block::kConstantRank > 0) {
#pragma unroll
            for (int r = 2; r < Block::kConstantRank; r += 2) add_pair(r, std::false_type{});
        } else {
#pragma unroll 1
            for (int r = 2; r < s.rank; r += 2) add_pair(r, std::false_type{});
        }
    } else {  // rank 1, or up to 2
        const float4 w0 = weight(0);
        float4 w1 = {};
        if (Block::kFeatures == 4) w1 = weight(1);
#pragma unroll
        for (int k = 0; k < kFwdTokens; ++k) {
            const float4 d = *reinterpret_cast<const float4*>(features + k * feature_step);
            set(k, w0, d.z, start);
            if (Block::kFeatures == 4) add(k, w1, d.w);
        }
    }
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j) steps[k][j] = Math<T>::softplus(steps[k][j]);
}

template <class Block>
__device__ __forceinline__ void mask_steps(const TileChunk<Block>& chunk, int count, float (&steps)[kFwdTokens][kVec]) {
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (!chunk.is_real(k, count)) steps[k][j] = 0.f;
}

}  // namespace gm
