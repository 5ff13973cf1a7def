// SPDX-License-Identifier: Apache-2.0
// Kernel of the forward of the selective scan for sm_90, 16-bit storage, one state: the maths of ../fwd.cu, with tiles
// moved by TMA. ../README.md derives it. A block's tile is 96, 128 or 256 threads x 7 tokens x 4 channels, with 4 or 2
// blocks an SM, so that others compute while one waits at a barrier. The result takes the place of z in shared memory
// and is stored from there. u, which is free after the first half of a tile's work, is loaded one and a half tiles
// ahead.
#pragma once

#include "cuda/scan/sm90/launch.cuh"
#include "cuda/scan/sm90/look_back.cuh"
#include "cuda/scan/sm90/phases/chunk_scan.cuh"
#include "cuda/scan/sm90/phases/fwd_phases.cuh"
#include "cuda/scan/sm90/phases/step_products.cuh"
#include "cuda/scan/sm90/product_features.cuh"

namespace gm {

// 512 threads an SM of up to 128 registers; with blocks of three warps, of up to 168.
template <class Block>
constexpr int kFwdResident = 512 / (Block::kThreads == 96 ? 128 : Block::kThreads);

template <class T, class Block>
__global__ void __launch_bounds__(Block::kThreads, kFwdResident<Block>)
    grouped_scan_fwd_sm90_kernel(const __grid_constant__ ScanFwdSm90Args args) {
    pdl_launch_dependents();
#if __CUDA_ARCH__ == 900
    constexpr int kTokens = kFwdTokens;
    extern __shared__ __align__(128) unsigned char shared[];
    const ScanShape& s = args.scan.shape;
    const TilePlan& plan = args.plan;
    const ScanFwdLayout<Block> layout(s);
    float* const aggregate_P = reinterpret_cast<float*>(shared + layout.aggregates);
    float* const aggregate_h = aggregate_P + Block::kAggregates;
    float* const table = reinterpret_cast<float*>(shared + layout.table);
    const int tid = threadIdx.x;
    const TileScheduler<Block, false> scheduler(s, plan);
    const TilePipeline pipeline(args, scheduler, layout, shared);
    TileCursor now = scheduler.first(s, plan);
    if (now.batch >= s.batch) return;

    // One thread loads u. Another loads z; it also stores the result from z's place, and waits until that store has
    // read it.
    constexpr int kU = 0, kZ = 1, kLoadsU = 0, kLoadsZ = 32;
    if (tid == kLoadsU) tma_prefetch_map(&args.u[scheduler.columns]);
    if (tid == kLoadsZ) {
        if constexpr (!Block::kBare) tma_prefetch_map(&args.z[scheduler.columns]);
        tma_prefetch_map(&args.y[scheduler.columns]);
    }
    if (tid == 0) {
        pipeline.init_barriers();
        pdl_wait();
        pipeline.load(0, now, kU);
        if constexpr (!Block::kBare) pipeline.load(0, now, kZ);
    }
    TileCursor next = now;
    scheduler.advance(s, plan, next);
    const int total = scheduler.total(s, plan);
    if (tid == 0 && total > 1) pipeline.load(1, next, kU);
    const TileChunk<Block> chunk(s, plan, scheduler);
    const bool ragged = is_ragged<Block>(s, plan, scheduler);
    const FeatureImages images{args.scan.B, args.scan.C, args.scan.dt};
    auto fetcher = features_of<T, Block>(s, plan, scheduler, shared + layout.places());
    pipeline.clear();
    pdl_wait();
    pipeline.fill(fetcher, images, table, now, next, total);
    TokenNorm<T, Block> norm(s, shared + layout.norm);
    // Where registers allow it, each thread combines the chunks for its own channels; elsewhere scan lanes do.
    constexpr bool kRoom = Block::kLanes == kNarrowLanes;
    const bool gather = kRoom && plan.blocks_per_plane == 1;
    float carry[kVec] = {};  // of this thread's channels; or [0], of the channel that it scans
    int image = 0;
    __syncthreads();

    const ScanFwdThread<T, Block> thread{s, chunk, ChannelRows<Block>{table, chunk.c0}};
    for (int n = 0; n < total; ++n) {
        const int stage = n % kSm90Stages;
        unsigned char* const box_u = shared + stage * 2 * layout.tile_bytes + chunk.offset(s);
        const int u_step = chunk.step(s), feature_step = chunk.slot_step * Block::width(s);
        const float* const features = pipeline.features(n) + chunk.slot0 * Block::width(s);
        float y[kTokens][kVec], decayed_C[kTokens][kVec];

        // Phase 1: the steps, and the aggregate of each chunk from a state of 0.
        pipeline.wait(n, kU);
        if constexpr (Block::kProducts) {
            // The steps go through what is free until then: the place of the result, two rows a warp, and those of the
            // chunk's aggregates.
            constexpr int kUnits = 2 * kStageUnits;  // 32 lanes have 72 channels or more
            static_assert(Block::kThreads / 32 * kUnits * sizeof(float4) <= (Block::kTokens + 1) * 72 * sizeof(T));
            float4* const result =
                reinterpret_cast<float4*>(shared + (stage * 2 + 1) * layout.tile_bytes) + tid / 32 * kUnits;
            const int own = Block::aggregate(chunk.order);
            const auto row = [&](int i) {
                return i < 2 ? result + i * kStageUnits
                             : reinterpret_cast<float4*>((i == 2 ? aggregate_P : aggregate_h) + own);
            };
            multiply_steps<T, Block, 4>(features, feature_step, s, table + kProductWeight * Block::kWidth,
                                        thread.rows[kBias], row, decayed_C);
            __syncwarp();
        } else {
            load_steps_sm90<T, Block>(
                features, feature_step, s, thread.rows[kBias], [&](int r) { return thread.rows[kWeight + r]; },
                decayed_C);
        }
        if (ragged) mask_steps(chunk, chunk.count(s, plan, scheduler, now), decayed_C);
        thread.start_states(box_u, u_step, features, feature_step, y, decayed_C, aggregate_P, aggregate_h);
        __syncthreads();

        // Phase 2: the states that enter the chunks, from those of the chunks and tiles before. What tiles n + 1 and
        // n + 2 need is loaded meanwhile.
        TileCursor after = next;
        if (n + 1 < total) scheduler.advance(s, plan, after);
        if (tid == kLoadsU && n + 2 < total) pipeline.load(n + 2, after, kU);
        if (tid == kLoadsZ && n + 1 < total) {
            tma_wait_read();
            if constexpr (!Block::kBare) pipeline.load(n + 1, next, kZ);
        }
        if (scheduler.enters(plan, now)) carry[0] = carry[1] = carry[2] = carry[3] = 0.f;
        const auto plane = [&] { return now.batch * s.groups + scheduler.group; };
        const auto states = [&](int number) {
            return args.scan.states +
                   (static_cast<int64_t>(plane()) * args.scan.num_chunks + number) * Block::real_dim(s);
        };
        float entering[kVec];
        if (gather) {
            if (args.scan.states != nullptr && chunk.order == 0 && chunk.active) {
                float* const to = states(scheduler.part(now, 0)) + chunk.c0;
                if (Block::real_dim(s) == Block::dim(s)) {
                    *reinterpret_cast<float4*>(to) = make_float4(carry[0], carry[1], carry[2], carry[3]);
                } else {
                    for (int j = 0; j < kVec; ++j)
                        if (chunk.c0 + j < Block::real_dim(s)) to[j] = carry[j];
                }
            }
            if constexpr (kRoom) gather_chunks<Block>(aggregate_P, aggregate_h, chunk, carry, entering);
        } else {
            const auto arrive = [&](float P, float h) {
                if (plan.blocks_per_plane == 1) return false;
                carry[0] = look_back<Block>(
                    args.inter_block_state + plane() * inter_block_floats_per_plane(plan, Block::kWidth), plan.tiles,
                    plan.blocks_per_plane, now.step, carry[0], P, h);
                return true;
            };
            const auto save = [&](int part, int channel, float state) {
                if (args.scan.states == nullptr || channel >= Block::real_dim(s)) return;
                const int number = scheduler.part(now, part);
                if (Block::kParts == 1 || number < args.scan.num_chunks) states(number)[channel] = state;
            };
            scan_chunks<Block, false>(aggregate_P, aggregate_h, carry[0], arrive, save);
        }
        if (n + 1 < total) {
            pipeline.keep_next(fetcher, table, n, now, next, image);
            if (n + 2 < total) fetcher.fetch(s, plan, scheduler, after, images);
        }
        if (!gather) {
            __syncthreads();
            const float4 in = *reinterpret_cast<const float4*>(aggregate_h + Block::aggregate(chunk.order) + chunk.c0);
            entering[0] = in.x, entering[1] = in.y, entering[2] = in.z, entering[3] = in.w;
        }

        // Phase 3: y from the entering states, its norm and the gates. The result takes the place of z, where that of
        // two tiles ago has been read: its thread has waited for that in the tile before.
        if constexpr (Block::kBare) {
            thread.write_bare_result(entering, decayed_C, y, box_u + layout.tile_bytes, u_step);
        } else {
            thread.finish_outputs(entering, decayed_C, norm, y);
            const float4 scale = thread.rows[kScale + image], shift = thread.rows[kShift + image];
            pipeline.wait(n, kZ);
            thread.write_result(norm, scale, shift, y, box_u + layout.tile_bytes, u_step);
        }
        fence_proxy_async();
        __syncthreads();
        if (tid == kLoadsZ) pipeline.store(n, now, kZ, args.y, args.kind[2]);
        image ^= next.batch != now.batch;
        now = next, next = after;
    }
    if (tid == kLoadsZ) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

template <class T, class Block>
cudaError_t launch_fwd_sm90(const ScanFwdSm90Args& args, cudaStream_t stream) {
    return launch_sm90(grouped_scan_fwd_sm90_kernel<T, Block>, Block::kThreads, kFwdResident<Block>,
                       ScanFwdLayout<Block>(args.scan.shape).total, stream, args);
}
template <class T, class Block>
cudaError_t share_fwd_sm90(ScanFwdSm90Args& args) {
    return share_sm90(grouped_scan_fwd_sm90_kernel<T, Block>, Block::kThreads,
                      ScanFwdLayout<Block>(args.scan.shape).total, std::size(args.kind), args);
}

// f(type tag, type tag of the block)
template <bool kBare, class F>
cudaError_t dispatch_fwd_sm90(DType dtype, const ScanShape& shape, const TilePlan& plan, F&& f) {
    return dispatch_sm90<kBare>(dtype, shape, plan, [&](auto tag, auto lanes, auto whole, auto runs) {
        constexpr int kLanes = decltype(lanes)::value;
        constexpr bool kWhole = decltype(whole)::value, kRuns = decltype(runs)::value;
        constexpr int kParts = sm90_fwd_parts(kLanes);
        if constexpr (kBare && kLanes == 32)
            if (shape.rank + 2 > kSm90Features<kLanes>)
                return f(tag, TypeTag<Sm90Block<kLanes, kWhole, kParts, kRuns, kBare, true>>{});
        return f(tag, TypeTag<Sm90Block<kLanes, kWhole, kParts, kRuns, kBare>>{});
    });
}

}  // namespace gm
