// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped selective scan for sm_90 and newer, 16-bit storage, one state: the maths of grouped_scan_fwd.cu
// with slabs moved by the tensor copy engine. A block holds two slabs (256 threads x 7 tokens x 4 channels) in each of two
// stages; the result overwrites u in shared memory and leaves from there.
//
// A flip costs nothing: a reversed path takes slabs, chunks and tokens in reverse. Along columns neighbouring chunks of
// threads take neighbouring columns, so that their shared-memory rows are adjacent (no bank conflicts); `order` is then
// a chunk's place on the path.
//
// Tokens beyond the plane are zeros: along rows and whole columns they follow (or, reversed, precede) every real token of
// the path and touch nothing; in pieces of columns they lie inside it, and their steps are set to 0.
#include "cuda/dispatch.h"
#include "cuda/grouped_scan_sm90.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/math.cuh"
#include "cuda/tma.cuh"

namespace gm {
namespace {

constexpr int kStages = 2;
constexpr int kThreads = kFwdThreads;
constexpr int kTokens = kFwdTokens;

// Byte offsets in dynamic shared memory for one lane count and width.
template <int kLanes>
struct Layout {
    static constexpr int kChunks = kThreads / kLanes;        // of the block: two slabs
    static constexpr int kSlabChunks = kChunks / 2;
    static constexpr int kSlabTokens = kSlabChunks * kTokens;
    static constexpr int kScanLanes = kChunks / 4;           // lanes of a channel in the chunk scan, 4 chunks each
    static constexpr int kFetchTokens = kSlabTokens * 2 > kThreads ? 2 : 1;  // of a thread, see fetch
    static constexpr int kParts = kLanes > 8 ? kLanes / 8 : 1;
    static constexpr int kFeatures = kSm90Features<kLanes>;
    static constexpr int kPad = kScanLanes > 1 ? 4 : 0;      // floats after every 4 chunks: their readers hit other banks
    static constexpr int kAggregates = kChunks * kLanes * kVec + kChunks / 4 * kPad;

    int slab_bytes;  // one tensor's slab, a multiple of 128
    int step_width;  // floats of a token's step features, B and C, a multiple of 4
    int params, aggregates, tables, barriers, total;

    __host__ __device__ Layout(int dim, int rank) {
        slab_bytes = (kSlabTokens * dim * 2 + 127) / 128 * 128;
        step_width = (rank + 2 + 3) / 4 * 4;
        params = kStages * 4 * slab_bytes;
        aggregates = params + 2 * 2 * kSlabTokens * step_width * 4;
        tables = aggregates + 2 * kAggregates * 4;
        barriers = tables + (5 + rank) * kLanes * kVec * 4;
        total = barriers + kStages * 8;
    }
    __host__ __device__ static int row(int chunk) { return chunk * kLanes * kVec + chunk / 4 * kPad; }
};

enum { kBias, kSkip, kScale, kShift, kA, kWeight };

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2) grouped_scan_fwd_sm90_kernel(const __grid_constant__ ScanFwdSm90Args args) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char shared[];
    using L = Layout<kLanes>;
    const ScanShape& s = args.scan.shape;
    const L layout(s.dim, s.rank);
    float* params = reinterpret_cast<float*>(shared + layout.params);
    float* agg_P = reinterpret_cast<float*>(shared + layout.aggregates);
    float* agg_h = agg_P + L::kAggregates;
    float* table = reinterpret_cast<float*>(shared + layout.tables);
    const uint32_t shared_base = shared_address(shared), barriers = shared_base + layout.barriers;

    const int tid = threadIdx.x, group = blockIdx.x % s.groups, batch = blockIdx.x / s.groups;
    const int direction = (s.directions[group >> 4] >> (2 * (group & 15))) & 3;
    const bool reverse = direction & 1, columns = direction & 2;
    const SlabPlan& plan = args.plan;
    const int num_slabs = columns ? plan.column_slabs : plan.row_slabs;
    const int num_pairs = (num_slabs + 1) / 2;

    // Slab `half` of pair `pair` on the path, -1 where there is none.
    const auto slab_of = [&](int pair, int half) {
        const int i = 2 * pair + half;
        return i >= num_slabs ? -1 : (reverse ? num_slabs - 1 - i : i);
    };
    // First column and row of a slab along columns.
    const auto corner = [&](int slab, int& column, int& row) {
        column = plan.columns > 0 ? slab * plan.columns : slab / plan.pieces;
        row = plan.columns > 0 ? 0 : (slab - column * plan.pieces) * plan.tokens;
    };
    const auto coordinates = [&](int slab, const SlabMapKind& kind) {
        if (!columns) return Coordinates{0, slab * (plan.tokens / kind.row_fuse), 0, group, batch};
        int column, row;
        corner(slab, column, row);
        return kind.column_fuse ? Coordinates{column * s.dim, 0, row, group, batch} : Coordinates{0, column, row, group, batch};
    };
    const int box_tokens = columns && plan.columns > 0 ? plan.columns * s.height : plan.tokens;
    const auto issue = [&](int pair) {  // by one thread
        const int stage = pair % kStages;
        const uint32_t barrier = barriers + stage * 8;
        const bool two = slab_of(pair, 1) >= 0;
        barrier_expect(barrier, (two ? 4 : 2) * box_tokens * s.dim * 2);
        for (int half = 0; half < (two ? 2 : 1); ++half) {
            const uint32_t to = shared_base + (stage * 4 + half * 2) * layout.slab_bytes;
            const int slab = slab_of(pair, half);
            tma_load(to, &args.u[columns], coordinates(slab, args.kind[0]), barrier);
            tma_load(to + layout.slab_bytes, &args.z[columns], coordinates(slab, args.kind[1]), barrier);
        }
    };
    if (tid == 0) {
        for (int i = 0; i < kStages; ++i) barrier_init(barriers + i * 8, 1);
        barrier_init_fence();
        proxy_fence();
        issue(0);
    }
    for (int c = tid; c < kLanes * kVec; c += kThreads) {
        const int64_t i = static_cast<int64_t>(group) * s.dim + c;
        const bool in = c < s.dim;
        const float gate = in ? load_param_or<T>(args.scan.gate, static_cast<int64_t>(batch) * s.groups * s.dim + i, 1.f) : 0.f;
        float* column = table + c;
        constexpr int kStride = kLanes * kVec;
        column[kBias * kStride] = in ? load_param_or<T>(args.scan.dt_bias, i, 0.f) * kLog2e : 0.f;
        column[kSkip * kStride] = in ? load_param_or<T>(args.scan.D, i, 0.f) : 0.f;
        column[kScale * kStride] = in ? gate * load_param<T>(args.scan.norm_weight, i) : 0.f;
        column[kShift * kStride] = in ? gate * load_param_or<T>(args.scan.norm_bias, i, 0.f) : 0.f;
        column[kA * kStride] = in ? load_param<T>(args.scan.A, i) : 0.f;
        for (int r = 0; r < s.rank; ++r)
            column[(kWeight + r) * kStride] = in ? load_param<T>(args.scan.dt_weight, i * s.rank + r) * kLog2e : 0.f;
    }

    // This thread's tokens: slot[k] is the place of its k-th path token in a slab's box.
    const int lane = tid % kLanes, chunk = tid / kLanes, half = chunk / L::kSlabChunks, in_slab = chunk % L::kSlabChunks;
    const int c0 = lane * kVec;
    const bool active = c0 < s.dim;
    int base_chunk = in_slab;  // in row-major or column-major order
    const int blocks = s.height / kTokens;
    if (columns && plan.columns > 0 && s.height % kTokens == 0 && plan.columns * blocks == L::kSlabChunks)
        base_chunk = in_slab % plan.columns * blocks + in_slab / plan.columns;
    const int order = half * L::kSlabChunks + (reverse ? L::kSlabChunks - 1 - base_chunk : base_chunk);
    // index[k] counts the slab's tokens in row-major or column-major order.
    const int index0 = base_chunk * kTokens + (reverse ? kTokens - 1 : 0), index_step = reverse ? -1 : 1;
    int slot[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const int i = index0 + k * index_step;
        const int place = columns && plan.columns > 0 ? i % s.height * plan.columns + i / s.height : i;
        slot[k] = min(place, box_tokens - 1);  // columns that do not fill the slab: bounds alone matter beyond them
    }

    // Step features, B and C, fetched a pair of slabs ahead: each thread has a token (or two) and every kParts-th feature.
    constexpr int kParts = L::kParts, kFetchTokens = L::kFetchTokens, kFetch = L::kFeatures / kParts;
    const int features = s.rank + 2, part = tid / (kThreads / kParts);
    T fetched[kFetchTokens][kFetch];
    short across[kFetchTokens], down[kFetchTokens];  // the token's column and row in its box
#pragma unroll
    for (int i = 0; i < kFetchTokens; ++i) {
        const int place = (tid % (kThreads / kParts) + i * kThreads) % L::kSlabTokens;
        across[i] = columns ? (plan.columns > 0 ? place % plan.columns : 0) : place;
        down[i] = columns ? (plan.columns > 0 ? place / plan.columns : place) : 0;
        if (place >= box_tokens) down[i] = -1;
    }
    const auto fetch = [&](int pair) {
#pragma unroll
        for (int i = 0; i < kFetchTokens; ++i) {
            const int token = tid % (kThreads / kParts) + i * kThreads;
            const int slab = slab_of(pair, token >= L::kSlabTokens);
            int column = slab * plan.tokens, row = 0;
            if (columns) corner(slab, column, row);
            column += across[i], row += down[i];
            const int at = columns ? row * s.width + column : column;
            const bool inside = columns ? column < s.width && row < s.height : at < s.height * s.width;
            const bool real = token < 2 * L::kSlabTokens && slab >= 0 && down[i] >= 0 && inside;
#pragma unroll
            for (int j = 0; j < kFetch; ++j) {
                const int f = part + j * kParts;
                fetched[i][j] = from_float<T>(0.f);
                if (!real || f >= features) continue;
                const ImageArg& image = f < s.rank ? args.scan.dt : f == s.rank ? args.scan.B : args.scan.C;
                const int64_t plane = batch * image.batch + group * image.group + (f < s.rank ? f : 0);
                fetched[i][j] = static_cast<const T*>(image.ptr)[plane + static_cast<int64_t>(at) * image.token];
            }
        }
    };
    const auto keep = [&](int pair) {
        float* to = params + (pair & 1) * 2 * L::kSlabTokens * layout.step_width;
#pragma unroll
        for (int i = 0; i < kFetchTokens; ++i) {
            const int token = tid % (kThreads / kParts) + i * kThreads;
#pragma unroll
            for (int j = 0; j < kFetch; ++j) {
                const int f = part + j * kParts;
                if (token < 2 * L::kSlabTokens && f < features)
                    to[token * layout.step_width + f] = to_float(fetched[i][j]) * (f == s.rank ? kLn2 : 1.f);
            }
        }
    };
    fetch(0);
    keep(0);
    if (num_pairs > 1) fetch(1);
    float carry = 0.f;  // of the channel that this thread scans
    __syncthreads();

    for (int pair = 0; pair < num_pairs; ++pair) {
        const int stage = pair % kStages;
        barrier_wait(barriers + stage * 8, pair / kStages & 1);
        unsigned char* box_u = shared + (stage * 4 + half * 2) * layout.slab_bytes + c0 * 2;
        const unsigned char* box_z = box_u + layout.slab_bytes;
        const float* features_of = params + ((pair & 1) * 2 + half) * L::kSlabTokens * layout.step_width;
        // Tokens beyond the columns of a slab, or beyond a column's last piece, lie inside the path.
        int real = box_tokens;
        if (columns && plan.columns == 0) {
            int column, row_of;
            corner(max(slab_of(pair, half), 0), column, row_of);
            real = min(real, s.height - row_of);
        }
        const bool beyond = real < L::kSlabTokens;
        float y[kTokens][kVec], decayed_C[kTokens][kVec];
        {
            float P[kVec], h[kVec];
            const auto row = [&](int i) { return *reinterpret_cast<const float4*>(table + i * kLanes * kVec + c0); };
            const float4 A4 = row(kA), bias4 = row(kBias), skip4 = row(kSkip);
            const float A[kVec] = {A4.x, A4.y, A4.z, A4.w}, skip[kVec] = {skip4.x, skip4.y, skip4.z, skip4.w};
            float(&step)[kTokens][kVec] = decayed_C;
#pragma unroll
            for (int k = 0; k < kTokens; ++k) step[k][0] = bias4.x, step[k][1] = bias4.y, step[k][2] = bias4.z, step[k][3] = bias4.w;
            for (int r = 0; r < s.rank; ++r) {
                const float4 w = row(kWeight + r);
#pragma unroll
                for (int k = 0; k < kTokens; ++k) {
                    const float d = features_of[slot[k] * layout.step_width + r];
                    step[k][0] = fmaf(w.x, d, step[k][0]), step[k][1] = fmaf(w.y, d, step[k][1]);
                    step[k][2] = fmaf(w.z, d, step[k][2]), step[k][3] = fmaf(w.w, d, step[k][3]);
                }
            }
#pragma unroll
            for (int j = 0; j < kVec; ++j) P[j] = 1.f, h[j] = 0.f;
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float b = features_of[slot[k] * layout.step_width + s.rank];
                const float c = features_of[slot[k] * layout.step_width + s.rank + 1];
                Vec4<T> uv = {};
                if (active) uv = *reinterpret_cast<const Vec4<T>*>(box_u + slot[k] * s.dim * 2);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float x = to_float(uv.v[j]);
                    float step_k = Math<T>::softplus(step[k][j]);
                    if (beyond && index0 + k * index_step >= real) step_k = 0.f;
                    const float a = Math<T>::decay(step_k, A[j]);
                    h[j] = fmaf(a, h[j], step_k * (b * x));
                    P[j] *= a;
                    y[k][j] = fmaf(c, h[j], skip[j] * x);
                    decayed_C[k][j] = c * P[j];
                }
            }
            float* to_P = agg_P + L::row(order) + c0;
            float* to_h = agg_h + L::row(order) + c0;
            *reinterpret_cast<float4*>(to_P) = make_float4(P[0], P[1], P[2], P[3]);
            *reinterpret_cast<float4*>(to_h) = make_float4(h[0], h[1], h[2], h[3]);
        }
        __syncthreads();
        if (tid == 0 && pair + 1 < num_pairs) {
            tma_wait_read();  // the result of the pair before has left the stage that is loaded next
            issue(pair + 1);
        }
        {  // chunk scan: kScanLanes neighbouring threads a channel, 4 chunks each
            const int channel = tid / L::kScanLanes, q = tid % L::kScanLanes;
            float P4[4], h4[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                P4[i] = agg_P[L::row(q * 4 + i) + channel];
                h4[i] = agg_h[L::row(q * 4 + i) + channel];
            }
            float P = P4[0], h = h4[0];
#pragma unroll
            for (int i = 1; i < 4; ++i) h = fmaf(P4[i], h, h4[i]), P *= P4[i];
#pragma unroll
            for (int d = 1; d < L::kScanLanes; d *= 2) {
                const float h_before = __shfl_up_sync(kFullWarp, h, d, L::kScanLanes);
                const float P_before = __shfl_up_sync(kFullWarp, P, d, L::kScanLanes);
                if (q >= d) h = fmaf(P, h_before, h), P *= P_before;
            }
            const float P_before = __shfl_up_sync(kFullWarp, P, 1, L::kScanLanes);
            const float h_before = __shfl_up_sync(kFullWarp, h, 1, L::kScanLanes);
            float state = q == 0 ? carry : fmaf(P_before, carry, h_before);
            if (args.scan.states != nullptr && q % (L::kScanLanes / 2) == 0 && channel < s.dim) {
                const int slab = 2 * pair + q / (L::kScanLanes / 2);
                if (slab < num_slabs)
                    args.scan.states[(static_cast<int64_t>(blockIdx.x) * args.scan.num_chunks + slab) * s.dim + channel] = state;
            }
            carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), L::kScanLanes - 1, L::kScanLanes);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                agg_h[L::row(q * 4 + i) + channel] = state;
                state = fmaf(P4[i], state, h4[i]);
            }
        }
        if (pair + 1 < num_pairs) {
            keep(pair + 1);
            if (pair + 2 < num_pairs) fetch(pair + 2);
        }
        __syncthreads();
        {
            const float4 entering = *reinterpret_cast<const float4*>(agg_h + L::row(order) + c0);
            const float4 scale4 = *reinterpret_cast<const float4*>(table + kScale * kLanes * kVec + c0);
            const float4 shift4 = *reinterpret_cast<const float4*>(table + kShift * kLanes * kVec + c0);
            const float in[kVec] = {entering.x, entering.y, entering.z, entering.w};
            const float scale[kVec] = {scale4.x, scale4.y, scale4.z, scale4.w};
            const float shift[kVec] = {shift4.x, shift4.y, shift4.z, shift4.w};
            const float inverse_dim = 1.f / s.dim;
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                float mean = 0.f, squares = 0.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    y[k][j] = fmaf(decayed_C[k][j], in[j], y[k][j]);
                    mean += y[k][j];
                }
#pragma unroll
                for (int d = kLanes / 2; d > 0; d /= 2) mean += __shfl_xor_sync(kFullWarp, mean, d);
                mean = mean_of(mean, s.dim, inverse_dim);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    y[k][j] = active ? y[k][j] - mean : 0.f;
                    squares = fmaf(y[k][j], y[k][j], squares);
                }
#pragma unroll
                for (int d = kLanes / 2; d > 0; d /= 2) squares += __shfl_xor_sync(kFullWarp, squares, d);
                const float inverse_std = rsqrtf(fmaf(squares, inverse_dim, s.norm_eps));
                Vec4<T> zv = {}, out;
                if (active) zv = *reinterpret_cast<const Vec4<T>*>(box_z + slot[k] * s.dim * 2);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float x = to_float(zv.v[j]);
                    out.v[j] = from_float<T>(fmaf(y[k][j] * inverse_std, scale[j], shift[j]) * (x * Math<T>::sigmoid(x)));
                }
                if (active && index0 + k * index_step < box_tokens) *reinterpret_cast<Vec4<T>*>(box_u + slot[k] * s.dim * 2) = out;
            }
        }
        proxy_fence();
        __syncthreads();
        if (tid == 0) {
            for (int i = 0; i < 2 && slab_of(pair, i) >= 0; ++i)
                tma_store(shared_base + (stage * 4 + i * 2) * layout.slab_bytes, &args.y[columns],
                          coordinates(slab_of(pair, i), args.kind[2]));
            tma_commit();
        }
    }
    if (tid == 0) tma_wait_all();
#endif
}

template <class T, int kLanes>
cudaError_t launch(const ScanFwdSm90Args& args, cudaStream_t stream) {
    const Layout<kLanes> layout(args.scan.shape.dim, args.scan.shape.rank);
    const auto kernel = grouped_scan_fwd_sm90_kernel<T, kLanes>;
    // Two blocks an SM need nearly all of its memory as shared memory.
    static const cudaError_t carveout = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (carveout != cudaSuccess) return carveout;
    return launch_kernel(kernel, args.scan.shape.batch * args.scan.shape.groups, kThreads, layout.total, stream, args);
}

template <class T>
cudaError_t launch_lanes(const ScanFwdSm90Args& args, cudaStream_t stream) {
    switch (args.scan.shape.lanes) {
        case 4: return launch<T, 4>(args, stream);
        case 8: return launch<T, 8>(args, stream);
        case 16: return launch<T, 16>(args, stream);
        default: return launch<T, 32>(args, stream);
    }
}

}  // namespace

bool grouped_scan_fwd_sm90_built() {
    // An older build's code, run here through PTX, has an empty body.
    static const bool built = [] {
        cudaFuncAttributes attributes{};
        const auto kernel = grouped_scan_fwd_sm90_kernel<__nv_bfloat16, 4>;
        return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
               attributes.ptxVersion >= 90;
    }();
    return built;
}

cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream) {
    return dtype == DType::kHalf ? launch_lanes<__half>(args, stream) : launch_lanes<__nv_bfloat16>(args, stream);
}

}  // namespace gm
