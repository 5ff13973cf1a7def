// SPDX-License-Identifier: Apache-2.0
// Backward of the grouped selective scan for sm_90, 16-bit storage, one state: the maths of ../bwd.cu, with tiles
// moved by TMA, from the last tile of the path to the first. ../README.md derives it. A block holds one tile (96 or
// 128 threads x 7 tokens x 4 channels) of u, z and dy in each of two stages; du takes the place of u and dz that of z
// in shared memory, and both are stored from there. Steps and their gradients are in units of ln 2.
#include "cuda/scan/sm90/channel_table.cuh"
#include "cuda/scan/sm90/chunk_scan.cuh"
#include "cuda/scan/sm90/launch.cuh"
#include "cuda/scan/sm90/look_back.cuh"
#include "cuda/scan/sm90/norm.cuh"
#include "cuda/scan/sm90/tile_pipeline.cuh"

namespace gm {
namespace {

constexpr int kResident = 2;  // blocks an SM, of up to 255 registers a thread

// Rows of each thread's parameter sums, in the order of ScanPartialRow; kSumWeight + r is dt_weight of step feature r.
enum SumRow { kSumA, kSumSkip, kSumBias, kSumProduct, kSumTotal, kSumWeight };
static_assert(kSumSkip == 1 + kRowSkip && kSumBias == 1 + kRowBias && kSumProduct == 1 + kRowProduct &&
              kSumTotal == 1 + kRowSum && kSumWeight == 1 + kFixedRows);

// Copies of the features' gradients in shared memory: one, or one for each octet where several warps share a token.
template <class Block>
constexpr int kPartials = Block::kInWarp ? 1 : Block::kOctets;

template <class BlockType>
struct Layout {
    using Block = BlockType;
    static constexpr int kInputs = 3, kBarriers = 1;
    int tile_bytes, features, feature_bytes, gradients, aggregates, table, norm, sums, barriers, total;

    Layout() = default;
    __host__ __device__ explicit Layout(const ScanShape& s) {
        tile_bytes = Block::tile_bytes(s);
        features = kSm90Stages * kInputs * tile_bytes;
        feature_bytes = (Block::kTokens + 1) * Block::width(s) * 4;
        gradients = features + 2 * feature_bytes;
        aggregates = gradients + kPartials<Block> * Block::kTokens * Block::width(s) * 4;
        table = aggregates + 3 * Block::kAggregates * 4;  // decays of chunks; states; adjoints
        norm = table + table_rows<Block>(s) * Block::kWidth * 4;
        sums = norm + TokenNorm<__half, Block>::kBytes + TokenNorm<__half, Block>::kSumBytes;
        barriers = sums + (kSumWeight + s.rank) * Block::kThreads * 16;
        total = barriers + kSm90Stages * kBarriers * 8;
    }
};

// Makes the compiler forget what it knows of these values, so that it computes what depends on them again: the decays
// exp(step A), kept in registers over all phases, would take 28 of them.
__device__ __forceinline__ void hide(float (&x)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) asm volatile("" : "+f"(x[j]));
}

template <class T, class Block>
__global__ void __launch_bounds__(Block::kThreads, kResident)
    grouped_scan_bwd_sm90_kernel(const __grid_constant__ ScanBwdSm90Args args) {
    pdl_launch_dependents();
#if __CUDA_ARCH__ == 900
    constexpr int kTokens = kFwdTokens;
    extern __shared__ __align__(128) unsigned char shared[];
    const ScanShape& s = args.scan.shape;
    const TilePlan& plan = args.plan;
    // What is the same for all threads and tiles is kept in shared memory, to spare registers.
    __shared__ TileScheduler<Block, true> scheduler;
    __shared__ Layout<Block> layout;
    __shared__ T* gradient_planes[3];  // of dB, dC, d(dt) in the current image
    if (threadIdx.x == 0) scheduler = TileScheduler<Block, true>(s, plan), layout = Layout<Block>(s);
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
        for (int tensor = 0; tensor < 3; ++tensor) pipeline.load(0, now, tensor);
    }
    TileCursor next = now;
    scheduler.advance(s, plan, next);
    const int total = scheduler.total(s, plan);
    float4* const sums = reinterpret_cast<float4*>(shared + layout.sums) + tid;  // this thread's sums, kThreads apart
    for (int i = 0; i < kSumWeight + s.rank; ++i) sums[i * Block::kThreads] = make_float4(0.f, 0.f, 0.f, 0.f);
    const auto add_sum = [&](int i, const float(&v)[kVec]) {
        float4& sum = sums[i * Block::kThreads];
        sum.x += v[0], sum.y += v[1], sum.z += v[2], sum.w += v[3];
    };
    const TileChunk<Block> chunk(s, plan, scheduler);
    const bool ragged = is_ragged<Block>(s, plan, scheduler);
    const FeatureImages images{args.scan.B, args.scan.C, args.scan.dt};
    StepFeatures<T, Block> fetcher(s, plan, scheduler);
    pipeline.fill(fetcher, images, table, now, next, total);
    float adjoint_carry = 0.f;  // of the channel that this thread scans
    int image = 0;
    __syncthreads();

    const auto table_row = [&](int i, float(&out)[kVec]) {
        const float4 v = *reinterpret_cast<const float4*>(table + i * Block::kWidth + chunk.c0);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    };
    const auto weight_row = [&](int r) {
        return *reinterpret_cast<const float4*>(table + (kWeight + r) * Block::kWidth + chunk.c0);
    };
    const int u_step = chunk.step(s), feature_step = chunk.slot_step * Block::width(s);
    const int scan_channel = tid / Block::kScanLanes;
    for (int n = 0; n < total; ++n) {
        const int stage = n % kSm90Stages;
        unsigned char* const box_u = shared + stage * 3 * layout.tile_bytes + chunk.offset(s);
        const float* const features = pipeline.features(n) + chunk.slot0 * Block::width(s);
        const int partial = kPartials<Block> == 1 ? 0 : tid % Block::kLanes / 8;
        float* const token_gradients = gradients + (partial * Block::kTokens + chunk.slot0) * Block::width(s);
        float saved = 0.f;
        if (scan_channel < Block::real_dim(s)) {
            const int64_t plane = static_cast<int64_t>(now.batch) * s.groups + scheduler.group;
            saved = args.scan.states[(plane * args.scan.num_chunks + scheduler.part(now, 0)) * Block::real_dim(s) +
                                     scan_channel];
        }
        float steps[kTokens][kVec], h[kTokens][kVec], dy[kTokens][kVec], entering[kVec], A[kVec];
        const int at = Block::aggregate(chunk.order) + chunk.c0;
        {
            float bias[kVec];
            table_row(kBias, bias);
            load_steps_sm90<T, Block>(features, feature_step, s, make_float4(bias[0], bias[1], bias[2], bias[3]),
                                      weight_row, steps);
        }
        if (ragged) mask_steps(chunk, chunk.count(s, plan, scheduler, now), steps);
        table_row(kA, A);
        pipeline.wait(n, 0);

        // Phase 1: states of the tile. Each chunk starts from 0, then from what the chunks before it leave.
        {
            float P[kVec], local[kVec];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float b = features[k * feature_step];
                float x[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(box_u + k * u_step), x);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float a = Math<T>::decay(steps[k][j], A[j]);
                    h[k][j] = steps[k][j] * (b * x[j]);
                    local[j] = k == 0 ? h[k][j] : fmaf(a, local[j], h[k][j]);
                    P[j] = k == 0 ? a : P[j] * a;
                }
            }
            *reinterpret_cast<float4*>(aggregates + at) = make_float4(P[0], P[1], P[2], P[3]);
            *reinterpret_cast<float4*>(aggregates + Block::kAggregates + at) =
                make_float4(local[0], local[1], local[2], local[3]);
        }
        __syncthreads();
        // u, z and dy are loaded by one thread each: the one that stored du (dz) from that place two tiles ago waits
        // for its store.
        if (n + 1 < total && tid % 32 == 0 && tid < 96) {
            tma_wait_read();
            pipeline.load(n + 1, next, tid / 32);
        }
        if (scheduler.enters(plan, now) && tid < 3) {
            const ImageArg& image = tid == 0 ? args.scan.dB : tid == 1 ? args.scan.dC : args.scan.ddt;
            gradient_planes[tid] = plane_of<T>(image, now.batch, scheduler.group);
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
            const float4 v = *reinterpret_cast<const float4*>(aggregates + Block::kAggregates + at);
            entering[0] = v.x, entering[1] = v.y, entering[2] = v.z, entering[3] = v.w;
        }
        hide(A);

        // Phase 2: y, its norm, and dy through gates and norm. dz takes the place of z. Tokens that do not exist have
        // u, z and dy of 0 and contribute nothing.
        {
            const float inverse_dim = Block::kWhole ? 1.f / Block::kWidth : 1.f / s.norm_dim;
            TokenNorm<T, Block> norm(s, shared + layout.norm);
            float moment[kTokens], skip[kVec];
            table_row(kSkip, skip);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float c = features[k * feature_step + 1];
                float x[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(box_u + k * u_step), x);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float before = k == 0 ? entering[j] : h[k == 0 ? 0 : k - 1][j];
                    h[k][j] = fmaf(Math<T>::decay(steps[k][j], A[j]), before, h[k][j]);
                    dy[k][j] = fmaf(c, h[k][j], skip[j] * x[j]);
                }
                moment[k] = (dy[k][0] + dy[k][1]) + (dy[k][2] + dy[k][3]);
            }
            float counted[kVec] = {1.f, 1.f, 1.f, 1.f};
            if (!Block::kWhole) table_row(kCounted, counted);
            norm.centre(counted, dy, moment);
            float scale[kVec], shift[kVec], product[kVec] = {}, gated_sum[kVec] = {};
            table_row(kScale + image, scale);
            table_row(kShift + image, shift);
            // A part of the tokens at a time: the gradients of all of them would not fit beside the states.
            constexpr int kPart = 4;
#pragma unroll
            for (int k0 = 0; k0 < kTokens; k0 += kPart) {
                float through[kPart][kVec], moments[2 * kPart] = {}, inverse_std[kPart];
#pragma unroll
                for (int i = 0; i < kPart && k0 + i < kTokens; ++i) {
                    const int k = k0 + i;
                    const auto normed = norm.scale(k);
                    inverse_std[i] = normed.inverse_std;
                    T* const z_slot = reinterpret_cast<T*>(box_u + layout.tile_bytes + k * u_step);
                    float x[kVec], g[kVec], dz[kVec];
                    to_floats(*reinterpret_cast<const Vec4<T>*>(z_slot), x);
                    to_floats(*reinterpret_cast<const Vec4<T>*>(box_u + 2 * layout.tile_bytes + k * u_step), g);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) {
                        dy[k][j] = normed(dy[k][j]);
                        // silu' = sigmoid + silu (1 - sigmoid), times g
                        const float sigmoid = Math<T>::sigmoid(x[j]), open = g[j] * sigmoid, gated = open * x[j];
                        dz[j] = fmaf(dy[k][j], scale[j], shift[j]) * fmaf(-gated, sigmoid, open + gated);
                        product[j] = fmaf(gated, dy[k][j], product[j]);
                        gated_sum[j] += gated;
                        through[i][j] = gated * scale[j];
                        moments[2 * i] += through[i][j];
                        moments[2 * i + 1] = fmaf(through[i][j], dy[k][j], moments[2 * i + 1]);
                    }
                    if (chunk.owns) store4<true>(z_slot, dz, kVec);
                }
                norm.sum(moments, k0 / kPart);
#pragma unroll
                for (int i = 0; i < kPart && k0 + i < kTokens; ++i) {
                    const int k = k0 + i;
                    // inverse_std (through - m1 - m2 normed), where m1 and m2 are means
                    const float unit = -inverse_std[i] * inverse_dim, m1 = unit * moments[2 * i],
                                m2 = unit * moments[2 * i + 1];
#pragma unroll
                    for (int j = 0; j < kVec; ++j) {
                        const float d = fmaf(through[i][j], inverse_std[i], fmaf(dy[k][j], m2, m1));
                        dy[k][j] = Block::kWhole ? d : d * counted[j];
                    }
                }
            }
            add_sum(kSumProduct, product);
            add_sum(kSumTotal, gated_sum);
        }

        // Phase 3: adjoints of the states. Each chunk starts from 0, then from what the chunks behind it send.
        const auto write_gradient = [&](const float(&v)[kTokens], float unit, int feature) {
            const auto write = [&](int k, float sum) {
                if (!chunk.idle) token_gradients[k * feature_step + feature] = unit * sum;
            };
            if constexpr (kPartials<Block> == 1) {
                scatter_token_sums<Block::kLanes>(v, write);
            } else {
                const float sum = octet_sums({v[0], v[1], v[2], v[3], v[4], v[5], v[6], 0.f});
                if (tid % 8 < kTokens) write(tid % 8, sum);
            }
        };
        float* const adjoint_aggregates = aggregates + 2 * Block::kAggregates;  // their P are those of the states
        const int behind = Block::aggregate(Block::kChunks - 1 - chunk.order) + chunk.c0;
        hide(A);
        {
            float local[kVec], dC[kTokens];
#pragma unroll
            for (int k = kTokens - 1; k >= 0; --k) {
                const float c = features[k * feature_step + 1];
                dC[k] = 0.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float a = Math<T>::decay(steps[k][j], A[j]);
                    local[j] = k == kTokens - 1 ? a * (c * dy[k][j]) : a * fmaf(c, dy[k][j], local[j]);
                    dC[k] = fmaf(dy[k][j], h[k][j], dC[k]);
                }
            }
            *reinterpret_cast<float4*>(adjoint_aggregates + behind) =
                make_float4(local[0], local[1], local[2], local[3]);
            write_gradient(dC, 1.f, 1);
        }
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

        // Phase 4: all other gradients, from the last token to the first. du takes the place of u, the gradient of the
        // steps that of the steps.
        {
            float adjoint[kVec], skip[kVec], dA[kVec] = {}, dskip[kVec] = {}, dbias[kVec] = {}, dB[kTokens];
            const float4 v = *reinterpret_cast<const float4*>(adjoint_aggregates + behind);
            adjoint[0] = v.x, adjoint[1] = v.y, adjoint[2] = v.z, adjoint[3] = v.w;
            table_row(kSkip, skip);
            hide(A);
#pragma unroll
            for (int k = kTokens - 1; k >= 0; --k) {
                const float b = features[k * feature_step], c = features[k * feature_step + 1];
                T* const u_slot = reinterpret_cast<T*>(box_u + k * u_step);
                float x[kVec], du[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(u_slot), x);
                dB[k] = 0.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float g = fmaf(c, dy[k][j], adjoint[j]), a = Math<T>::decay(steps[k][j], A[j]);
                    const float through = g * a * (k > 0 ? h[k > 0 ? k - 1 : 0][j] : entering[j]), gs = g * steps[k][j];
                    const float ds = fmaf(kLn2 * A[j], through, g * (b * x[j]));
                    dA[j] = fmaf(through, steps[k][j], dA[j]);
                    dskip[j] = fmaf(dy[k][j], x[j], dskip[j]);
                    du[j] = fmaf(gs, b, skip[j] * dy[k][j]);
                    dB[k] = fmaf(gs, x[j], dB[k]);
                    adjoint[j] = a * g;
                    steps[k][j] = Math<T>::through_softplus(ds, steps[k][j]);
                    dbias[j] += steps[k][j];
                }
                if (chunk.owns) store4<true>(u_slot, du, kVec);
            }
            write_gradient(dB, kLn2, 0);
            add_sum(kSumA, dA);
            add_sum(kSumSkip, dskip);
            add_sum(kSumBias, dbias);
        }
        for (int r = 0; r < s.rank; ++r) {
            const float4 w = weight_row(r);
            float dw[kVec] = {}, ddt[kTokens];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float d = features[k * feature_step + 2 + r];
                ddt[k] = fmaf(steps[k][0], w.x, fmaf(steps[k][1], w.y, fmaf(steps[k][2], w.z, steps[k][3] * w.w)));
#pragma unroll
                for (int j = 0; j < kVec; ++j) dw[j] = fmaf(steps[k][j], d, dw[j]);
            }
            write_gradient(ddt, 1.f, 2 + r);
            add_sum(kSumWeight + r, dw);
        }
        fence_proxy_async();
        __syncthreads();
        if (tid == 0 || tid == 32) {
            const int tensor = tid / 32;
            pipeline.store(n, now, tensor, tensor == 0 ? args.du : args.dz, args.kind[3 + tensor]);
        }
        fetcher.template send<kPartials<Block>>(s, plan, scheduler, now, gradients, gradient_planes,
                                                {args.scan.dB, args.scan.dC, args.scan.ddt});
        if (n + 1 == total || next.batch != now.batch) {
            // The threads' sums are added over the chunks and written to the row of partial sums that this block has
            // in this plane. The chunks begin at different ones for different rows, to spread over the banks.
            const int rows = kSumWeight + s.rank;
            const int64_t row =
                (static_cast<int64_t>(now.batch) * plan.blocks_per_plane + scheduler.block_in_plane) * s.groups +
                scheduler.group;
            float* const partials = args.scan.partials + row * rows * Block::real_dim(s);
            float4* const block_sums = reinterpret_cast<float4*>(shared + layout.sums);
#pragma unroll 1
            for (int i = tid; i < rows * Block::kLanes; i += Block::kThreads) {
                const int sum = i / Block::kLanes, lane = i % Block::kLanes, c0 = lane * kVec;
                float x[kVec] = {};
#pragma unroll 4
                for (int k = 0; k < Block::kChunks; ++k) {
                    float4& v = block_sums[sum * Block::kThreads + (k + sum) % Block::kChunks * Block::kLanes + lane];
                    x[0] += v.x, x[1] += v.y, x[2] += v.z, x[3] += v.w;
                    v = make_float4(0.f, 0.f, 0.f, 0.f);
                }
                const float unit = sum == kSumA ? kLn2 : sum == kSumBias || sum >= kSumWeight ? kLog2e : 1.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (Block::kWhole || c0 + j < s.param_dim)
                        partials[sum * Block::real_dim(s) + c0 + j] = unit * x[j];
            }
            image ^= 1;
        }
        now = next, next = after;
    }
    if (tid % 32 == 0) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

template <class T, class Block>
cudaError_t launch(const ScanBwdSm90Args& args, cudaStream_t stream) {
    const ScanShape& shape = args.scan.shape;
    if (std::min(args.plan.row_tiles, args.plan.column_tiles) < args.plan.blocks_per_plane) {
        // Planes with fewer tiles than `blocks_per_plane` leave some of their rows of partial sums unwritten.
        const int64_t floats =
            shape.batch * args.plan.blocks_per_plane * shape.groups * (kSumWeight + shape.rank) * shape.param_dim;
        const cudaError_t error = cudaMemsetAsync(args.scan.partials, 0, floats * sizeof(float), stream);
        if (error != cudaSuccess) return error;
    }
    return launch_sm90(grouped_scan_bwd_sm90_kernel<T, Block>, Block::kThreads, kResident, Layout<Block>(shape).total,
                       stream, args);
}

// f(type tag, type tag of the block)
template <class F>
cudaError_t dispatch(DType dtype, const ScanShape& shape, const TilePlan& plan, F&& f) {
    return dispatch_sm90(dtype, shape, plan, [&](auto tag, auto lanes, auto whole, auto runs) {
        return f(tag, TypeTag<Sm90Block<decltype(lanes)::value, decltype(whole)::value, 1, decltype(runs)::value>>{});
    });
}

}  // namespace

cudaError_t launch_grouped_scan_bwd_sm90(const ScanBwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dispatch(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        return launch<typename decltype(tag)::type, typename decltype(block)::type>(args, stream);
    });
}

cudaError_t share_grouped_scan_bwd_sm90(ScanBwdSm90Args& args, DType dtype) {
    return dispatch(dtype, args.scan.shape, args.plan, [&](auto tag, auto block) {
        using Block = typename decltype(block)::type;
        return share_sm90(grouped_scan_bwd_sm90_kernel<typename decltype(tag)::type, Block>, Block::kThreads,
                          Layout<Block>(args.scan.shape).total, std::size(args.kind), args);
    });
}

}  // namespace gm
