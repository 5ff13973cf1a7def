// SPDX-License-Identifier: Apache-2.0
// Kernel of the backward of the selective scan for sm_90, 16-bit storage, one state: the maths of ../bwd.cu, with tiles
// moved by TMA, from the last tile of the path to the first. ../README.md derives it. A block holds one tile (96 or
// 128 threads x 7 tokens x 4 channels) of u, z and dy in each of two stages; du takes the place of u and dz that of z
// in shared memory, and both are stored from there. A bare scan has u, dy and du alone. Steps and their gradients are
// in units of ln 2.
#pragma once

#include "cuda/scan/sm90/launch.cuh"
#include "cuda/scan/sm90/look_back.cuh"
#include "cuda/scan/sm90/phases/bwd_phases.cuh"
#include "cuda/scan/sm90/phases/chunk_scan.cuh"
#include "cuda/scan/sm90/product_features.cuh"

namespace gm {

// Blocks an SM. Two leave 255 registers a thread. Three leave 168: a bare scan of 16 lanes takes 7% less time so, and
// in bfloat16 it does not spill. With 32 lanes they do not fit beside the products for many step features, which then
// take a fifth longer, and gain 4% beside few.
template <class T, class Block>
constexpr int kBwdResident = Block::kBare && std::is_same_v<T, __nv_bfloat16> && Block::kLanes == 16 ? 3 : 2;

template <class T, class Block>
__global__ void __launch_bounds__(Block::kThreads, kBwdResident<T, Block>)
    grouped_scan_bwd_sm90_kernel(const __grid_constant__ ScanBwdSm90Args args) {
    pdl_launch_dependents();
#if __CUDA_ARCH__ == 900
    constexpr int kTokens = kFwdTokens, kInputs = ScanBwdLayout<Block>::kInputs;
    extern __shared__ __align__(128) unsigned char shared[];
    const ScanShape& s = args.scan.shape;
    const TilePlan& plan = args.plan;
    // What is the same for all threads and tiles is kept in shared memory, to spare registers.
    __shared__ TileScheduler<Block, true> scheduler;
    __shared__ ScanBwdLayout<Block> layout;
    __shared__ T* gradient_planes[3];  // of dB, dC, d(dt) in the current image
    if (threadIdx.x == 0) scheduler = TileScheduler<Block, true>(s, plan), layout = ScanBwdLayout<Block>(s);
    __syncthreads();
    float* const gradients = reinterpret_cast<float*>(shared + layout.gradients);
    float* const aggregates = reinterpret_cast<float*>(shared + layout.aggregates);
    float* const table = reinterpret_cast<float*>(shared + layout.table);
    const TilePipeline pipeline(args, scheduler, layout, shared);
    const int tid = threadIdx.x;
    TileCursor now = scheduler.first(s, plan);
    if (now.batch >= s.batch) return;

    if (tid == 0) {
        pipeline.init_barriers();
        pdl_wait();
        for (int tensor = 0; tensor < kInputs; ++tensor) pipeline.load(0, now, tensor);
    }
    TileCursor next = now;
    scheduler.advance(s, plan, next);
    const int total = scheduler.total(s, plan);
    float4* const sums = reinterpret_cast<float4*>(shared + layout.sums) + tid;  // this thread's sums, kThreads apart
    for (int i = 0; i < layout.sum_rows(s); ++i) sums[i * Block::kThreads] = make_float4(0.f, 0.f, 0.f, 0.f);
    const TileChunk<Block> chunk(s, plan, scheduler);
    // Where steps are matrix products: their stage, this thread's sums, and where each chunk has its features.
    const StepGradientProducts<Block> products{reinterpret_cast<float4*>(shared + layout.stage()), {}};
    float4* const weight_sums = reinterpret_cast<float4*>(shared + layout.weight_sums()) + tid;
    int2* const chunks = reinterpret_cast<int2*>(shared + layout.chunks());
    if constexpr (Block::kProducts) {
        for (int i = 0; i < 2 * Block::rank_tiles(s); ++i) weight_sums[i * Block::kThreads] = float4{};
        if (tid % 32 == 0) chunks[tid / 32] = make_int2(chunk.slot0, chunk.slot_step);
    }
    const bool ragged = is_ragged<Block>(s, plan, scheduler);
    const FeatureImages images{args.scan.B, args.scan.C, args.scan.dt};
    auto fetcher = features_of<T, Block>(s, plan, scheduler, shared + layout.places());
    pipeline.clear();
    pdl_wait();
    pipeline.fill(fetcher, images, table, now, next, total);
    float adjoint_carry = 0.f;  // of the channel that this thread scans
    int image = 0;
    __syncthreads();

    const ScanBwdThread<T, Block> thread{
        s, layout, chunk, ChannelRows<Block>{table, chunk.c0}, sums, chunk.step(s), chunk.slot_step * Block::width(s)};
    const int scan_channel = tid / Block::kScanLanes;
    for (int n = 0; n < total; ++n) {
        const int stage = n % kSm90Stages;
        const int copy = kGradientCopies<Block> == 1 ? 0 : tid % Block::kLanes / 8;
        const BwdChunkPlace place{shared + stage * kInputs * layout.tile_bytes + chunk.offset(s),
                                  pipeline.features(n) + chunk.slot0 * Block::width(s),
                                  gradients + (copy * Block::kTokens + chunk.slot0) * Block::width(s)};
        float saved = 0.f;
        if (scan_channel < Block::real_dim(s)) {
            const int64_t plane = static_cast<int64_t>(now.batch) * s.groups + scheduler.group;
            saved = args.scan.states[(plane * args.scan.num_chunks + scheduler.part(now, 0)) * Block::real_dim(s) +
                                     scan_channel];
        }
        float steps[kTokens][kVec], h[kTokens][kVec], dy[kTokens][kVec], entering[kVec], A[kVec];
        const int own = Block::aggregate(chunk.order) + chunk.c0;
        {
            float bias[kVec];
            thread.rows.get(kBias, bias);
            const float4 bias4 = make_float4(bias[0], bias[1], bias[2], bias[3]);
            if constexpr (Block::kProducts) {
                multiply_steps<T, Block, StepGradientProducts<Block>::kStageRows>(
                    place.features, thread.feature_step, s, table + kProductWeight * Block::kWidth, bias4,
                    [&](int i) { return products.row(tid / 32, i); }, steps);
            } else {
                load_steps_sm90<T, Block>(
                    place.features, thread.feature_step, s, bias4, [&](int r) { return thread.rows[kWeight + r]; },
                    steps);
            }
        }
        if (ragged) mask_steps(chunk, chunk.count(s, plan, scheduler, now), steps);
        thread.rows.get(kA, A);
        pipeline.wait(n, 0);

        // Phase 1: states of the tile. Each chunk starts from 0, then from what the chunks before it leave.
        thread.start_states(place, A, steps, h, aggregates, own);
        __syncthreads();
        // u, z and dy are loaded by one thread each: the one that stored du (dz) from that place two tiles ago waits
        // for its store.
        if (n + 1 < total && tid % 32 == 0 && tid < 32 * kInputs) {
            tma_wait_read();
            pipeline.load(n + 1, next, tid / 32);
        }
        if (scheduler.enters(plan, now) && tid < 3) {
            const ImageArg& image = tid == 0 ? args.scan.dB : tid == 1 ? args.scan.dC : args.scan.ddt;
            gradient_planes[tid] = plane_of<T>(image, now.batch, scheduler.own_group());
            if constexpr (Block::kBare) gradient_planes[tid] += scheduler.slice * image.scan;
        }
        scan_chunks<Block, false>(
            aggregates, aggregates + Block::kAggregates, saved, [](float, float) { return false; },
            [](int, int, float) {});
        TileCursor after = next;
        if (n + 1 < total) {
            pipeline.keep_next(fetcher, table, n, now, next, image);
            scheduler.advance(s, plan, after);
            if (n + 2 < total) fetcher.fetch(s, plan, scheduler, after, images);
        }
        __syncthreads();
        {
            const float4 v = *reinterpret_cast<const float4*>(aggregates + Block::kAggregates + own);
            entering[0] = v.x, entering[1] = v.y, entering[2] = v.z, entering[3] = v.w;
        }
        hide(A);

        // Phase 2: y, its norm, and dy through gates and norm.
        if constexpr (Block::kBare) {
            thread.bare_outputs(place, A, steps, entering, h, dy);
        } else {
            TokenNorm<T, Block> norm(s, shared + layout.norm);
            float moment[kTokens];
            thread.outputs(place, A, steps, entering, h, dy, moment);
            float counted[kVec] = {1.f, 1.f, 1.f, 1.f};
            if (!Block::kWhole) thread.rows.get(kCounted, counted);
            norm.centre(counted, dy, moment);
            thread.through_norm(place, norm, counted, image, dy);
        }

        // Phase 3: adjoints of the states. Each chunk starts from 0, then from what the chunks behind it send.
        float* const adjoint_aggregates = aggregates + 2 * Block::kAggregates;  // their P are those of the states
        const int behind = Block::aggregate(Block::kChunks - 1 - chunk.order) + chunk.c0;
        hide(A);
        thread.start_adjoints(place, A, steps, h, dy, adjoint_aggregates, behind);
        __syncthreads();
        if (scheduler.enters(plan, now)) adjoint_carry = 0.f;
        const auto arrive = [&](float P, float local) {
            if (plan.blocks_per_plane == 1) return false;
            const int plane = now.batch * s.groups + scheduler.group;
            adjoint_carry =
                look_back<Block>(args.inter_block_state + plane * inter_block_floats_per_plane(plan, Block::kWidth),
                                 plan.tiles, plan.blocks_per_plane, now.step, adjoint_carry, P, local);
            return true;
        };
        scan_chunks<Block, true>(aggregates, adjoint_aggregates, adjoint_carry, arrive, [](int, int, float) {});
        __syncthreads();

        // Phase 4: all other gradients.
        {
            float adjoint[kVec];
            const float4 v = *reinterpret_cast<const float4*>(adjoint_aggregates + behind);
            adjoint[0] = v.x, adjoint[1] = v.y, adjoint[2] = v.z, adjoint[3] = v.w;
            hide(A);
            thread.gradients(place, A, h, entering, dy, adjoint, steps);
        }
        if constexpr (Block::kProducts) {
            const auto write = [&](int k, int feature, float sum) {
                if (!chunk.idle) place.gradients[k * thread.feature_step + 2 + feature] = sum;
            };
            products.of_features(s, steps, table + kProductWeight * Block::kWidth, write);
        } else {
            thread.step_gradients(place, steps);
        }
        fence_proxy_async();
        __syncthreads();
        if (tid == 0 || (!Block::kBare && tid == 32)) {
            const int tensor = tid / 32;
            pipeline.store(n, now, tensor, tensor == 0 ? args.du : args.dz, args.kind[3 + tensor]);
        }
        fetcher.template send<kGradientCopies<Block>>(s, plan, scheduler, now, gradients, gradient_planes,
                                                      {args.scan.dB, args.scan.dC, args.scan.ddt});
        if constexpr (Block::kProducts) {
            __syncwarp();
            products.of_weights(s, pipeline.features(n), chunks, weight_sums);
        }
        if (n + 1 == total || next.batch != now.batch) {
            write_partials<Block>(args.scan, plan, scheduler, now.batch,
                                  reinterpret_cast<float4*>(shared + layout.sums), products, weight_sums);
            image ^= 1;
        }
        if constexpr (Block::kProducts) __syncthreads();  // the stage has been read
        now = next, next = after;
    }
    if (tid % 32 == 0) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

template <class T, class Block>
cudaError_t launch_bwd_sm90(const ScanBwdSm90Args& args, cudaStream_t stream) {
    const ScanShape& shape = args.scan.shape;
    if (std::min(args.plan.row_tiles, args.plan.column_tiles) < args.plan.blocks_per_plane) {
        // Planes with fewer tiles than `blocks_per_plane` leave some of their rows of partial sums unwritten.
        const int64_t floats = shape.batch * args.plan.blocks_per_plane * shape.groups * (kSumWeight + shape.rank) *
                               Block::real_dim(shape);
        const cudaError_t error = cudaMemsetAsync(args.scan.partials, 0, floats * sizeof(float), stream);
        if (error != cudaSuccess) return error;
    }
    return launch_sm90(grouped_scan_bwd_sm90_kernel<T, Block>, Block::kThreads, kBwdResident<T, Block>,
                       ScanBwdLayout<Block>(shape).total, stream, args);
}
template <class T, class Block>
cudaError_t share_bwd_sm90(ScanBwdSm90Args& args) {
    return share_sm90(grouped_scan_bwd_sm90_kernel<T, Block>, Block::kThreads,
                      ScanBwdLayout<Block>(args.scan.shape).total, std::size(args.kind), args);
}

// f(type tag, type tag of the block)
template <bool kBare, class F>
cudaError_t dispatch_bwd_sm90(DType dtype, const ScanShape& shape, const TilePlan& plan, F&& f) {
    return dispatch_sm90<kBare>(dtype, shape, plan, [&](auto tag, auto lanes, auto whole, auto runs) {
        constexpr int kLanes = decltype(lanes)::value;
        constexpr bool kWhole = decltype(whole)::value, kRuns = decltype(runs)::value;
        return f(tag, TypeTag<Sm90Block<kLanes, kWhole, 1, kRuns, kBare, kBare && kLanes == 32>>{});
    });
}

}  // namespace gm
