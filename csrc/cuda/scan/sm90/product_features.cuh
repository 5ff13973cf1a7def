// SPDX-License-Identifier: Apache-2.0
// The features of a tile's tokens where steps are matrix products: many of them, so that neighbouring threads take
// neighbouring ones of a token. The interface is that of StepFeatures (features.cuh).
#pragma once

#include "cuda/scan/sm90/features.cuh"

namespace gm {

template <class T, class Block>
struct ProductFeatures {
    using Value = T;
    static constexpr int kLoads = (Block::kTokens * (Block::kFeatures - 2) + Block::kThreads - 1) / Block::kThreads;
    T fetched[kLoads], own;  // step features; B in the first warp and C in the second
    int token, feature;      // of the first load; from one to the next they move by these:
    int token_step, feature_step;
    // For each token of a tile: its row-major distance from the first one, and the bound below which the cursor must be
    // for the token to exist. In tiles of runs: the run of the token, and its row there. The last entry is of a token
    // that never exists.
    int2* const places;
    const T *dt, *plane;

    template <class Scheduler>
    __device__ ProductFeatures(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler, int2* tokens)
        : token(threadIdx.x / s.rank),
          feature(threadIdx.x % s.rank),
          token_step(Block::kThreads / s.rank),
          feature_step(Block::kThreads % s.rank),
          places(tokens) {
        const int slot = threadIdx.x;
        if (slot == Block::kTokens) places[slot] = make_int2(0, scheduler.runs() ? INT32_MAX / 2 : INT32_MIN);
        if (slot >= Block::kTokens) return;
        if (scheduler.runs()) {
            const int run = slot / kFwdTokens >> plan.run_shift;
            places[slot] = make_int2(run, slot - run * plan.run_rows);
            return;
        }
        const int columns = scheduler.columns ? plan.columns : 1,
                  row = slot / (scheduler.columns ? plan.of_columns : Divisor{}), column = slot - row * columns;
        const int limit = !scheduler.columns ? s.height * s.width - slot : s.width - column;
        places[slot] = make_int2(scheduler.columns ? row * s.width + column : slot,
                                 slot < scheduler.box_tokens ? limit : INT32_MIN);
    }

    // Where a token of the tile lies in the plane, or -1.
    template <class Scheduler>
    __device__ __forceinline__ int place(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                         const TileCursor& at, int slot) const {
        const int2 p = places[slot];
        if (!scheduler.runs()) return at.first < p.y ? at.first + p.x : -1;
        const ColumnRun run = run_of(plan, at.first + p.x);
        const int row = run.row + p.y;
        return row < s.height && run.column < s.width ? row * s.width + run.column : -1;
    }
    // visit(i, token, feature) for each step feature of this thread. Behind the last one of the tile token is kTokens
    // or more.
    template <class F>
    __device__ __forceinline__ void visit(const ScanShape& s, F&& f) const {
        const int count = (Block::kTokens * s.rank + Block::kThreads - 1) / Block::kThreads;
        int t = token, r = feature;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if (i >= count) break;
            f(i, t, r);
            t += token_step, r += feature_step;
            const bool next = r >= s.rank;
            t += next, r -= next ? s.rank : 0;
        }
    }
    // Whether this thread has B or C of a token, and which.
    __device__ static bool has_own() { return threadIdx.x < 64 && threadIdx.x % 32 < Block::kTokens; }
    __device__ static int which() { return threadIdx.x / 32; }
    static_assert(Block::kTokens <= 32 && Block::kThreads >= 64);

    template <class Scheduler>
    __device__ __forceinline__ void fetch(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                          const TileCursor& at, const FeatureImages& images) {
        if (scheduler.enters(plan, at)) {
            dt = plane_of<const T>(images.dt, at.batch, scheduler.own_group());
            if (has_own()) plane = plane_of<const T>(images[which()], at.batch, scheduler.own_group());
        }
        const uint32_t stride = static_cast<uint32_t>(images.dt.token);
        visit(s, [&](int i, int t, int r) {
            const int from = place(s, plan, scheduler, at, min(t, Block::kTokens));
            fetched[i] = from_float<T>(0.f);
            if (from >= 0) fetched[i] = dt[static_cast<uint64_t>(from) * stride + r];
        });
        if (has_own()) {
            const int from = place(s, plan, scheduler, at, threadIdx.x % 32);
            own = from_float<T>(0.f);
            if (from >= 0) own = plane[static_cast<uint64_t>(from) * static_cast<uint32_t>(images[which()].token)];
        }
    }
    template <class Scheduler>
    __device__ __forceinline__ void keep(const ScanShape& s, const TilePlan&, const Scheduler&, const TileCursor&,
                                         float* to) const {
        visit(s, [&](int i, int t, int r) {
            if (t < Block::kTokens) to[t * Block::width(s) + 2 + r] = to_float(fetched[i]);
        });
        if (has_own()) to[threadIdx.x % 32 * Block::width(s) + which()] = to_float(own) * (which() == 0 ? kLn2 : 1.f);
    }
    template <int kPartials, class Scheduler>
    __device__ __forceinline__ void send(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                         const TileCursor& at, const float* from, T* const (&planes)[3],
                                         const FeatureImages& images) const {
        static_assert(kPartials == 1);
        const uint32_t stride = static_cast<uint32_t>(images.dt.token);
        visit(s, [&](int, int t, int r) {
            const int to = place(s, plan, scheduler, at, min(t, Block::kTokens));
            if (to >= 0)
                planes[2][static_cast<uint64_t>(to) * stride + r] = from_float<T>(from[t * Block::width(s) + 2 + r]);
        });
        if (!has_own()) return;
        const int t = threadIdx.x % 32, to = place(s, plan, scheduler, at, t);
        if (to >= 0)
            planes[which()][static_cast<uint64_t>(to) * static_cast<uint32_t>(images[which()].token)] =
                from_float<T>(from[t * Block::width(s) + which()]);
    }
};

// The features of a block's tiles. `places` is room for those of the tokens, where the block has it.
template <class T, class Block, class Scheduler>
__device__ __forceinline__ auto features_of(const ScanShape& s, const TilePlan& plan, const Scheduler& scheduler,
                                            unsigned char* places) {
    if constexpr (Block::kProducts)
        return ProductFeatures<T, Block>(s, plan, scheduler, reinterpret_cast<int2*>(places));
    else
        return StepFeatures<T, Block>(s, plan, scheduler);
}

}  // namespace gm
