// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan for sm_90, 16-bit storage, one state: the maths of ../fwd.cu, with tiles moved
// by TMA. ../README.md derives it. A block's tile is 96, 128 or 256 threads x 7 tokens x 4 channels, with 4 or 2
// blocks an SM, so that others compute while one waits at a barrier. The result takes the place of z in shared memory
// and is stored from there. u, which is free after the first half of a tile's work, is loaded one and a half tiles
// ahead.
#include "cuda/scan/sm90/channel_table.cuh"
#include "cuda/scan/sm90/chunk_scan.cuh"
#include "cuda/scan/sm90/features.cuh"
#include "cuda/scan/sm90/launch.cuh"
#include "cuda/scan/sm90/look_back.cuh"
#include "cuda/scan/sm90/norm.cuh"

namespace gm {
namespace {

// 512 threads an SM of up to 128 registers; with blocks of three warps, of up to 168.
template <class Block>
constexpr int kResident = 512 / (Block::kThreads == 96 ? 128 : Block::kThreads);

// Byte offsets in dynamic shared memory.
template <class Block>
struct Layout {
    int tile_bytes, features, feature_bytes, aggregates, table, norm, barriers, total;

    __host__ __device__ explicit Layout(const ScanShape& s) {
        tile_bytes = Block::tile_bytes(s);
        features = kSm90Stages * 2 * tile_bytes;
        feature_bytes = (Block::kTokens + 1) * Block::width(s) * 4;
        aggregates = features + 2 * feature_bytes;
        table = aggregates + 2 * Block::kAggregates * 4;
        norm = table + table_rows<Block>(s) * Block::kWidth * 4;
        barriers = norm + TokenNorm<__half, Block>::kBytes;
        total = barriers + kSm90Stages * 2 * 8;
    }
};

template <class T, class Block>
__global__ void __launch_bounds__(Block::kThreads, kResident<Block>)
    grouped_scan_fwd_sm90_kernel(const __grid_constant__ ScanFwdSm90Args args) {
    pdl_launch_dependents();
#if __CUDA_ARCH__ == 900
    constexpr int kTokens = kFwdTokens;
    extern __shared__ __align__(128) unsigned char shared[];
    const ScanShape& s = args.scan.shape;
    const TilePlan& plan = args.plan;
    const Layout<Block> layout(s);
    float* const aggregate_P = reinterpret_cast<float*>(shared + layout.aggregates);
    float* const aggregate_h = aggregate_P + Block::kAggregates;
    float* const table = reinterpret_cast<float*>(shared + layout.table);
    const uint32_t shared_base = shared_address(shared), barriers = shared_base + layout.barriers;
    const int tid = threadIdx.x;
    const TileScheduler<Block, false> scheduler(s, plan);
    TileCursor now = scheduler.first(s, plan);
    if (now.batch >= s.batch) return;

    // One thread loads u. Another loads z; it also stores the result from z's place, and waits until that store has
    // read it.
    constexpr int kU = 0, kZ = 1, kLoadsU = 0, kLoadsZ = 32;
    const auto barrier_of = [&](int n, int tensor) { return barriers + (n % kSm90Stages * 2 + tensor) * 8; };
    const auto place_of = [&](int n, int tensor) {
        return shared_base + (n % kSm90Stages * 2 + tensor) * layout.tile_bytes;
    };
    const auto load = [&](int n, const TileCursor& at, int tensor) {
        const uint32_t barrier = barrier_of(n, tensor);
        mbarrier_expect(barrier, scheduler.box_bytes(s));
        const CUtensorMap* const maps = tensor == kU ? args.u : args.z;
        scheduler.boxes(s, plan, at, args.kind[tensor], [&](const Coordinates& c, int offset) {
            tma_load(place_of(n, tensor) + offset, maps + static_cast<int>(scheduler.columns), c, barrier);
        });
    };
    if (tid == kLoadsU) tma_prefetch_map(&args.u[scheduler.columns]);
    if (tid == kLoadsZ) tma_prefetch_map(&args.z[scheduler.columns]), tma_prefetch_map(&args.y[scheduler.columns]);
    if (tid == 0) {
        for (int i = 0; i < kSm90Stages * 2; ++i) mbarrier_init(barriers + i * 8, 1);
        mbarrier_init_fence();
        pdl_wait();
        load(0, now, kU);
        load(0, now, kZ);
    }
    TileCursor next = now;
    scheduler.advance(s, plan, next);
    const int total = scheduler.total(s, plan);
    if (tid == 0 && total > 1) load(1, next, kU);
    const TileChunk<Block> chunk(s, plan, scheduler);
    const bool ragged = is_ragged<Block>(s, plan, scheduler);
    const FeatureImages features_in{args.scan.B, args.scan.C, args.scan.dt};
    StepFeatures<T, Block> fetcher(s, plan, scheduler);
    const auto features_at = [&](int n) {
        return reinterpret_cast<float*>(shared + layout.features + (n & 1) * layout.feature_bytes);
    };
    const auto fetch = [&](const TileCursor& at) { fetcher.fetch(s, plan, scheduler, at, features_in); };
    clear_tails<Block>(shared, kSm90Stages * 2, layout.tile_bytes, scheduler.box_bytes(s));
    clear_features<Block>(features_at(0), layout.feature_bytes);
    pdl_wait();
    fetch(now);
    put_rows<T, Block>(args.scan, table, now.batch, scheduler.group);
    __syncthreads();
    fetcher.keep(s, plan, scheduler, now, features_at(0));
    if (total > 1) fetch(next);
    TokenNorm<T, Block> norm(s, shared + layout.norm);
    // Where registers allow it, each thread combines the chunks for its own channels; elsewhere scan lanes do.
    constexpr bool kRoom = Block::kLanes == kNarrowLanes;
    const bool gather = kRoom && plan.blocks_per_plane == 1;
    float carry[kVec] = {};  // of this thread's channels; or [0], of the channel that it scans
    int image = 0;
    __syncthreads();

    const auto row = [&](int i) { return *reinterpret_cast<const float4*>(table + i * Block::kWidth + chunk.c0); };
    for (int n = 0; n < total; ++n) {
        const int stage = n % kSm90Stages;
        unsigned char* const box_u = shared + stage * 2 * layout.tile_bytes + chunk.offset(s);
        const int u_step = chunk.step(s), feature_step = chunk.slot_step * Block::width(s);
        const float* const features = features_at(n) + chunk.slot0 * Block::width(s);
        float y[kTokens][kVec], decayed_C[kTokens][kVec];
        mbarrier_wait(barrier_of(n, kU), n / kSm90Stages & 1);
        {
            float(&steps)[kTokens][kVec] = decayed_C;
            load_steps_sm90<T, Block>(
                features, feature_step, s, row(kBias), [&](int r) { return row(kWeight + r); }, steps);
            if (ragged) mask_steps(chunk, chunk.count(s, plan, scheduler, now), steps);
            const float4 A4 = row(kA), skip4 = row(kSkip);
            const float A[kVec] = {A4.x, A4.y, A4.z, A4.w}, skip[kVec] = {skip4.x, skip4.y, skip4.z, skip4.w};
            float P[kVec], h[kVec];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float2 bc = load_features<Block>(features + k * feature_step);
                float x[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(box_u + k * u_step), x);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float a = Math<T>::decay(steps[k][j], A[j]), in = steps[k][j] * (bc.x * x[j]);
                    h[j] = k == 0 ? in : fmaf(a, h[j], in);
                    P[j] = k == 0 ? a : P[j] * a;
                    y[k][j] = fmaf(bc.y, h[j], skip[j] * x[j]);
                    decayed_C[k][j] = bc.y * P[j];
                }
            }
            const int at = Block::aggregate(chunk.order) + chunk.c0;
            *reinterpret_cast<float4*>(aggregate_P + at) = make_float4(P[0], P[1], P[2], P[3]);
            *reinterpret_cast<float4*>(aggregate_h + at) = make_float4(h[0], h[1], h[2], h[3]);
        }
        __syncthreads();
        TileCursor after = next;
        if (n + 1 < total) scheduler.advance(s, plan, after);
        if (tid == kLoadsU && n + 2 < total) load(n + 2, after, kU);
        if (tid == kLoadsZ && n + 1 < total) {
            tma_wait_read();
            load(n + 1, next, kZ);
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
            fetcher.keep(s, plan, scheduler, next, features_at(n + 1));
            if (next.batch != now.batch)
                put_gated_rows<T, Block>(args.scan, table, image ^ 1, next.batch, scheduler.group);
            if (n + 2 < total) fetch(after);
        }
        if (!gather) {
            __syncthreads();
            const float4 in = *reinterpret_cast<const float4*>(aggregate_h + Block::aggregate(chunk.order) + chunk.c0);
            entering[0] = in.x, entering[1] = in.y, entering[2] = in.z, entering[3] = in.w;
        }
        {
            float moment[kTokens];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);
                moment[k] = (y[k][0] + y[k][1]) + (y[k][2] + y[k][3]);
            }
            float counted[kVec] = {1.f, 1.f, 1.f, 1.f};
            if (!Block::kWhole) {
                const float4 counted4 = row(kCounted);
                counted[0] = counted4.x, counted[1] = counted4.y, counted[2] = counted4.z, counted[3] = counted4.w;
            }
            norm.centre(counted, y, moment);
            const float4 scale4 = row(kScale + image), shift4 = row(kShift + image);
            const float scale[kVec] = {scale4.x, scale4.y, scale4.z, scale4.w};
            const float shift[kVec] = {shift4.x, shift4.y, shift4.z, shift4.w};
            unsigned char* const box_z = box_u + layout.tile_bytes;
            mbarrier_wait(barrier_of(n, kZ), n / kSm90Stages & 1);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const auto normed = norm.scale(k);
                float x[kVec], out[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(box_z + k * u_step), x);
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    out[j] = fmaf(normed(y[k][j]), scale[j], shift[j]) * (x[j] * Math<T>::sigmoid(x[j]));
                if (chunk.owns) store4<true>(reinterpret_cast<T*>(box_z + k * u_step), out, kVec);
            }
        }
        fence_proxy_async();
        __syncthreads();
        if (tid == kLoadsZ) {
            scheduler.boxes(s, plan, now, args.kind[2], [&](const Coordinates& c, int offset) {
                tma_store(place_of(n, kZ) + offset, &args.y[scheduler.columns], c);
            });
            tma_commit();
        }
        image ^= next.batch != now.batch;
        now = next, next = after;
    }
    if (tid == kLoadsZ) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

template <class T, class Block>
cudaError_t launch(const ScanFwdSm90Args& args, cudaStream_t stream) {
    return launch_sm90(grouped_scan_fwd_sm90_kernel<T, Block>, Block::kThreads, kResident<Block>,
                       Layout<Block>(args.scan.shape).total, stream, args);
}

// f(type tag, type tag of the block)
template <class F>
cudaError_t dispatch(DType dtype, const ScanShape& shape, const TilePlan& plan, F&& f) {
    return dispatch_sm90(dtype, shape, plan, [&](auto tag, auto lanes, auto whole, auto runs) {
        constexpr int kLanes = decltype(lanes)::value;
        constexpr bool kWhole = decltype(whole)::value, kRuns = decltype(runs)::value;
        return f(tag, TypeTag<Sm90Block<kLanes, kWhole, sm90_fwd_parts(kLanes), kRuns>>{});
    });
}

}  // namespace

bool grouped_scan_sm90_built() {
    using Block = Sm90Block<4, true, sm90_fwd_parts(4), false>;
    static const bool built =
        is_built_for(reinterpret_cast<const void*>(grouped_scan_fwd_sm90_kernel<__nv_bfloat16, Block>), 90);
    return built;
}

cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dispatch(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return launch<typename decltype(tag)::type, typename decltype(block)::type>(args, stream);
    });
}

cudaError_t share_grouped_scan_fwd_sm90(ScanFwdSm90Args& args, DType dtype) {
    return dispatch(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        using Block = typename decltype(block)::type;
        return share_sm90(grouped_scan_fwd_sm90_kernel<typename decltype(tag)::type, Block>, Block::kThreads,
                          Layout<Block>(args.scan.shape).total, std::size(args.kind), args);
    });
}

}  // namespace gm
