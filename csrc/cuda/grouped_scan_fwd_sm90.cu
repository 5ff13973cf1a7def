// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan for sm_90 and newer, 16-bit storage, one state: the maths of
// grouped_scan_fwd.cu with slabs moved by the tensor copy engine. A block holds two slabs (256 threads x 7 tokens x 4
// channels) in each of two stages; the result overwrites u in shared memory and leaves from there.
#include "cuda/scan_sm90.cuh"

namespace gm {
namespace {

constexpr int kTokens = kFwdTokens;

// Rows of the table of channel parameters in shared memory; the gate is folded into the norm's scale and shift.
enum TableRow { kBias, kSkip, kScale, kShift, kA, kWeight };

// Byte offsets in dynamic shared memory.
template <class Block>
struct Layout {
    int slab_bytes;  // one tensor's slab, a multiple of 128
    int width;       // floats of a token's step features, B and C, a multiple of 4
    int features, aggregates, table, barriers, total;

    __host__ __device__ Layout(int dim, int rank) {
        slab_bytes = (Block::kSlabTokens * dim * 2 + 127) / 128 * 128;
        width = (rank + 2 + 3) / 4 * 4;
        features = kSm90Stages * 2 * Block::kSlabs * slab_bytes;
        aggregates = features + 2 * Block::kSlabs * Block::kSlabTokens * width * 4;
        table = aggregates + 2 * Block::kAggregates * 4;
        barriers = table + (kWeight + rank) * Block::kWidth * 4;
        total = barriers + kSm90Stages * 8;
    }
    __device__ int box(int stage, int half) const { return (stage * Block::kSlabs + half) * 2 * slab_bytes; }
};

template <class T, class Block>
__global__ void __launch_bounds__(Block::kThreads, 2)
    grouped_scan_fwd_sm90_kernel(const __grid_constant__ ScanFwdSm90Args args) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char shared[];
    const ScanShape& s = args.scan.shape;
    const SlabPlan& plan = args.plan;
    const Layout<Block> layout(s.dim, s.rank);
    float* const all_features = reinterpret_cast<float*>(shared + layout.features);
    float* const aggregate_P = reinterpret_cast<float*>(shared + layout.aggregates);
    float* const aggregate_h = aggregate_P + Block::kAggregates;
    float* const table = reinterpret_cast<float*>(shared + layout.table);
    const uint32_t shared_base = shared_address(shared), barriers = shared_base + layout.barriers;
    const int tid = threadIdx.x;
    const SlabWalk walk(s, plan);
    const int num_steps = (walk.count + Block::kSlabs - 1) / Block::kSlabs;

    const auto load = [&](int step) {  // by one thread
        const int stage = step % kSm90Stages;
        const uint32_t barrier = barriers + stage * 8;
        const int slabs = min(Block::kSlabs, walk.count - step * Block::kSlabs);
        barrier_expect(barrier, slabs * 2 * walk.box_tokens * s.dim * 2);
        for (int half = 0; half < slabs; ++half) {
            const int slab = walk.slab(step * Block::kSlabs + half);
            const uint32_t to = shared_base + layout.box(stage, half);
            tma_load(to, &args.u[walk.columns], walk.box(s, plan, slab, args.kind[0]), barrier);
            tma_load(to + layout.slab_bytes, &args.z[walk.columns], walk.box(s, plan, slab, args.kind[1]), barrier);
        }
    };
    if (walk.leaves_slots(plan)) {
        for (int i = tid * 16; i < layout.features; i += Block::kThreads * 16)
            *reinterpret_cast<uint4*>(shared + i) = make_uint4(0, 0, 0, 0);
        proxy_fence();
        __syncthreads();
    }
    if (tid == 0) {
        for (int i = 0; i < kSm90Stages; ++i) barrier_init(barriers + i * 8, 1);
        barrier_init_fence();
        proxy_fence();
        load(0);
    }
    for (int c = tid; c < Block::kWidth; c += Block::kThreads) {
        const int64_t i = static_cast<int64_t>(walk.group) * s.dim + c;
        const int64_t gate_index = static_cast<int64_t>(walk.batch) * s.groups * s.dim + i;
        const bool in = c < s.dim;
        const float gate = in ? load_param_or<T>(args.scan.gate, gate_index, 1.f) : 0.f;
        const auto put = [&](int row, float value) { table[row * Block::kWidth + c] = value; };
        // Lanes without channels read those of the first lane: a step of 0 and no skip keep their y at 0.
        put(kBias, in ? load_param_or<T>(args.scan.dt_bias, i, 0.f) * kLog2e : -1e30f);
        put(kSkip, in ? load_param_or<T>(args.scan.D, i, 0.f) : 0.f);
        put(kScale, in ? gate * load_param<T>(args.scan.norm_weight, i) : 0.f);
        put(kShift, in ? gate * load_param_or<T>(args.scan.norm_bias, i, 0.f) : 0.f);
        put(kA, in ? load_param<T>(args.scan.A, i) : 0.f);
        for (int r = 0; r < s.rank; ++r)
            put(kWeight + r, in ? load_param<T>(args.scan.dt_weight, i * s.rank + r) * kLog2e : 0.f);
    }

    const SlabChunk<Block> chunk(s, plan, walk);
    StepFeatures<T, Block> fetcher(plan, walk);
    const auto features_at = [&](int step) {
        return all_features + (step & 1) * Block::kSlabs * Block::kSlabTokens * layout.width;
    };
    const auto fetch = [&](int step) { fetcher.fetch(s, plan, walk, args.scan.dt, args.scan.B, args.scan.C, step); };
    fetch(0);
    fetcher.keep(s, features_at(0), layout.width);
    if (num_steps > 1) fetch(1);
    float carry = 0.f;  // of the channel that this thread scans
    __syncthreads();

    const auto row = [&](int i) { return *reinterpret_cast<const float4*>(table + i * Block::kWidth + chunk.c0); };
    const int u_step = chunk.slot_step * s.dim * 2, feature_step = chunk.slot_step * layout.width;
    for (int step = 0; step < num_steps; ++step) {
        const int stage = step % kSm90Stages;
        unsigned char* const box_u =
            shared + layout.box(stage, chunk.half) + chunk.slot0 * s.dim * 2 + (chunk.active ? chunk.c0 : 0) * 2;
        const float* const features =
            features_at(step) + (chunk.half * Block::kSlabTokens + chunk.slot0) * layout.width;
        const int end = chunk.end(s, plan, walk, walk.slab(step * Block::kSlabs + chunk.half));
        const bool ragged = chunk.ragged(plan, walk, end);
        float y[kTokens][kVec], decayed_C[kTokens][kVec];
        {
            float(&steps)[kTokens][kVec] = decayed_C;
            load_steps_sm90<T, Block>(
                features, feature_step, s, row(kBias), [&](int r) { return row(kWeight + r); }, steps);
            if (ragged) mask_steps(chunk, end, steps);
            const float4 A4 = row(kA), skip4 = row(kSkip);
            const float A[kVec] = {A4.x, A4.y, A4.z, A4.w}, skip[kVec] = {skip4.x, skip4.y, skip4.z, skip4.w};
            float P[kVec], h[kVec];
            barrier_wait(barriers + stage * 8, step / kSm90Stages & 1);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float b = features[k * feature_step + s.rank], c = features[k * feature_step + s.rank + 1];
                float x[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(box_u + k * u_step), x);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float a = Math<T>::decay(steps[k][j], A[j]), in = steps[k][j] * (b * x[j]);
                    h[j] = k == 0 ? in : fmaf(a, h[j], in);
                    P[j] = k == 0 ? a : P[j] * a;
                    y[k][j] = fmaf(c, h[j], skip[j] * x[j]);
                    decayed_C[k][j] = c * P[j];
                }
            }
            const int at = Block::aggregate(chunk.order) + chunk.c0;
            *reinterpret_cast<float4*>(aggregate_P + at) = make_float4(P[0], P[1], P[2], P[3]);
            *reinterpret_cast<float4*>(aggregate_h + at) = make_float4(h[0], h[1], h[2], h[3]);
        }
        __syncthreads();
        if (tid == 0 && step + 1 < num_steps) {
            tma_wait_read();  // the result of the step before has left the stage that is loaded next
            load(step + 1);
        }
        scan_chunks<Block>(aggregate_P, aggregate_h, carry, [&](int half, int channel, float state) {
            const int slab = step * Block::kSlabs + half;
            if (args.scan.states == nullptr || slab >= walk.count || channel >= s.dim) return;
            args.scan.states[(static_cast<int64_t>(blockIdx.x) * args.scan.num_chunks + slab) * s.dim + channel] =
                state;
        });
        if (step + 1 < num_steps) {
            fetcher.keep(s, features_at(step + 1), layout.width);
            if (step + 2 < num_steps) fetch(step + 2);
        }
        __syncthreads();
        {
            const float4 in = *reinterpret_cast<const float4*>(aggregate_h + Block::aggregate(chunk.order) + chunk.c0);
            const float entering[kVec] = {in.x, in.y, in.z, in.w};
            const float inverse_dim = 1.f / s.dim;
            float moment[kTokens];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(decayed_C[k][j], entering[j], y[k][j]);
                moment[k] = (y[k][0] + y[k][1]) + (y[k][2] + y[k][3]);
            }
            token_sums<Block::kLanes>(moment);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float mean = chunk.active ? mean_of(moment[k], s.dim, inverse_dim) : 0.f;
                moment[k] = 0.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    y[k][j] -= mean;
                    moment[k] = fmaf(y[k][j], y[k][j], moment[k]);
                }
            }
            token_sums<Block::kLanes>(moment);
            const float4 scale4 = row(kScale), shift4 = row(kShift);
            const float scale[kVec] = {scale4.x, scale4.y, scale4.z, scale4.w};
            const float shift[kVec] = {shift4.x, shift4.y, shift4.z, shift4.w};
            const unsigned char* const box_z = box_u + layout.slab_bytes;
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float inverse_std = Math<T>::rsqrt(fmaf(moment[k], inverse_dim, s.norm_eps));
                float x[kVec], out[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(box_z + k * u_step), x);
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    out[j] = fmaf(y[k][j] * inverse_std, scale[j], shift[j]) * (x[j] * Math<T>::sigmoid(x[j]));
                if (chunk.active && (!ragged || chunk.is_real(k, end)))
                    store4<true>(reinterpret_cast<T*>(box_u + k * u_step), out, kVec);
            }
        }
        proxy_fence();
        __syncthreads();
        if (tid == 0) {
            for (int half = 0; half < Block::kSlabs; ++half) {
                const int slab = walk.slab(step * Block::kSlabs + half);
                if (slab < 0) break;
                tma_store(shared_base + layout.box(stage, half), &args.y[walk.columns],
                          walk.box(s, plan, slab, args.kind[2]));
            }
            tma_commit();
        }
    }
    if (tid == 0) tma_wait_all();
#endif
}

template <class T, int kLanes>
cudaError_t launch(const ScanFwdSm90Args& args, cudaStream_t stream) {
    using Block = Sm90Block<kLanes, kFwdThreads>;
    const Layout<Block> layout(args.scan.shape.dim, args.scan.shape.rank);
    return launch_sm90(grouped_scan_fwd_sm90_kernel<T, Block>, args.scan.shape, Block::kThreads, layout.total, stream,
                       args);
}

}  // namespace

bool grouped_scan_sm90_built() {
    // An older build's code, run here through PTX, has empty bodies.
    static const bool built = [] {
        cudaFuncAttributes attributes{};
        const auto kernel = grouped_scan_fwd_sm90_kernel<__nv_bfloat16, Sm90Block<4, kFwdThreads>>;
        return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
               attributes.ptxVersion >= 90;
    }();
    return built;
}

cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dispatch_sm90(dtype, args.scan.shape.lanes, [&](auto tag, auto lanes) {
        return launch<typename decltype(tag)::type, decltype(lanes)::value>(args, stream);
    });
}

}  // namespace gm
