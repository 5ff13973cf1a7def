// SPDX-License-Identifier: Apache-2.0
// What moves a block's tiles through shared memory, for the forward and the backward. TMA loads the inputs of a tile
// into one of kSm90Stages stages while an earlier tile is computed, and stores the results from where inputs were.
#pragma once

#include "cuda/scan/sm90/channel_table.cuh"
#include "cuda/scan/sm90/features.cuh"
#include "cuda/scan/sm90/tile_scheduler.cuh"

namespace gm {

// A stage holds a tile of each of Layout::kInputs images: u, z and, in the backward, dy; the backward of a bare scan
// has u and dy, its forward loads u alone, and the place of z is where its result goes. A stage has Layout::kBarriers
// mbarriers, which say when they have arrived: one for each of them, or one for all. Layout has the byte offsets in
// dynamic shared memory; the stages come first. A tile is given by its number n among those of the block, and by its
// cursor where its coordinates are needed.
template <class Layout, class Scheduler, class Args>
struct TilePipeline {
    using Block = typename Layout::Block;
    static constexpr int kInputs = Layout::kInputs, kBarriers = Layout::kBarriers;
    static_assert(kBarriers == 1 || kBarriers == kInputs);

    const Args& args;
    const Scheduler& scheduler;
    const Layout& layout;
    unsigned char* const shared;
    const uint32_t stages, barriers;  // addresses in shared memory

    __device__ __forceinline__ TilePipeline(const Args& kernel_args, const Scheduler& tile_scheduler,
                                            const Layout& shared_layout, unsigned char* dynamic_shared)
        : args(kernel_args),
          scheduler(tile_scheduler),
          layout(shared_layout),
          shared(dynamic_shared),
          stages(shared_address(dynamic_shared)),
          barriers(stages + layout.barriers) {}

    __device__ __forceinline__ uint32_t barrier(int stage, int i) const {
        return barriers + (stage * kBarriers + i) * 8;
    }
    __device__ __forceinline__ uint32_t place(int stage, int input) const {
        return stages + (stage * kInputs + input) * layout.tile_bytes;
    }
    // By the thread that issues the first loads.
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kSm90Stages * kBarriers; ++i) mbarrier_init(barriers + i * 8, 1);
        mbarrier_init_fence();
    }
    // By one thread. Where a stage has one barrier, the load of the first input announces the bytes of all.
    __device__ __forceinline__ void load(int n, const TileCursor& at, int input) const {
        const int stage = n % kSm90Stages;
        const uint32_t arrival = barrier(stage, kBarriers == 1 ? 0 : input), to = place(stage, input);
        if (kBarriers > 1 || input == 0)
            mbarrier_expect(arrival, kInputs / kBarriers * scheduler.box_bytes(args.scan.shape));
        const CUtensorMap* maps = args.u;
        int kind = 0;
        if constexpr (Layout::kBackward) {
            if (input + 1 == kInputs)
                maps = args.dy, kind = 2;
            else if (input == 1)
                maps = args.z, kind = 1;
        } else if (input == 1) {
            maps = args.z, kind = 1;
        }
        const int of = Block::kBare ? 0 : scheduler.group;
        scheduler.boxes(args.scan.shape, args.plan, at, of, args.kind[kind], [&](const Coordinates& c, int offset) {
            tma_load(to + offset, maps + static_cast<int>(scheduler.columns), c, arrival);
        });
    }
    __device__ __forceinline__ void wait(int n, int i) const {
        mbarrier_wait(barrier(n % kSm90Stages, i), n / kSm90Stages & 1);
    }
    // By one thread: stores a result that has taken the place of an input. `kind` belongs to `maps`.
    __device__ __forceinline__ void store(int n, const TileCursor& at, int input, const CUtensorMap* maps,
                                          const TileMapKind& kind) const {
        const uint32_t from = place(n % kSm90Stages, input);
        scheduler.boxes(args.scan.shape, args.plan, at, scheduler.own_group(), kind,
                        [&](const Coordinates& c, int offset) {
                            tma_store(from + offset, maps + static_cast<int>(scheduler.columns), c);
                        });
        tma_commit();
    }

    // The features of the tiles n and n + 1; those of tile n + 2 are on their way, in the registers of `fetcher`.
    __device__ __forceinline__ float* features(int n) const {
        return reinterpret_cast<float*>(shared + layout.features + (n & 1) * layout.feature_bytes);
    }
    // Zeros in shared memory where nothing is written later.
    __device__ __forceinline__ void clear() const {
        clear_tails<Block>(shared, kSm90Stages * kInputs, layout.tile_bytes, scheduler.box_bytes(args.scan.shape));
        clear_features<Block>(features(0), layout.feature_bytes);
    }
    // Fills shared memory for the first tile, but for what TMA loads: the table of channels and the features. Requests
    // the features of the second tile. pdl_wait comes before; a barrier must follow.
    template <class Features>
    __device__ __forceinline__ void fill(Features& fetcher, const FeatureImages& images, float* table,
                                         const TileCursor& now, const TileCursor& next, int total) const {
        const ScanShape& s = args.scan.shape;
        if constexpr (Block::kProducts) __syncthreads();  // the fetcher has written the places of the tokens
        fetcher.fetch(s, args.plan, scheduler, now, images);
        put_rows<typename Features::Value, Block>(args.scan, table, now.batch, scheduler.group);
        __syncthreads();
        fetcher.keep(s, args.plan, scheduler, now, features(0));
        if (total > 1) fetcher.fetch(s, args.plan, scheduler, next, images);
    }
    // Writes what the threads know of tile n + 1: its features and, where a new image begins, the rows of the table
    // that hold its gate. `image` is the parity of the current image.
    template <class Features>
    __device__ __forceinline__ void keep_next(const Features& fetcher, float* table, int n, const TileCursor& now,
                                              const TileCursor& next, int image) const {
        fetcher.keep(args.scan.shape, args.plan, scheduler, next, features(n + 1));
        if (!Block::kBare && next.batch != now.batch)
            put_gated_rows<typename Features::Value, Block>(args.scan, table, image ^ 1, next.batch, scheduler.group);
    }
};

}  // namespace gm
