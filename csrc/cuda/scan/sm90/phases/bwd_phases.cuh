// SPDX-License-Identifier: Apache-2.0
// What a thread of the sm_90 backward (bwd.cu) computes of its chunk in each phase of a tile, between the scans over
// the chunks. ../README.md derives it.
#pragma once

#include "cuda/scan/sm90/channel_table.cuh"
#include "cuda/scan/sm90/phases/norm.cuh"
#include "cuda/scan/sm90/phases/step_products.cuh"
#include "cuda/scan/sm90/tile_pipeline.cuh"

namespace gm {

// Rows of each thread's parameter sums, in the order of ScanPartialRow; kSumWeight + r is dt_weight of step feature r.
enum SumRow { kSumA, kSumSkip, kSumBias, kSumProduct, kSumTotal, kSumWeight };
static_assert(kSumSkip == 1 + kRowSkip && kSumBias == 1 + kRowBias && kSumProduct == 1 + kRowProduct &&
              kSumTotal == 1 + kRowSum && kSumWeight == 1 + kFixedRows);

// The first of the weights' rows in shared memory: a bare scan has no norm, so no rows for one.
template <class Block>
constexpr int kWeightRow = Block::kBare ? kSumBias + 1 : kSumWeight;

// Copies of the features' gradients in shared memory: one, or one for each octet where several warps share a token.
template <class Block>
constexpr int kGradientCopies = Block::kInWarp ? 1 : Block::kOctets;

// Byte offsets in dynamic shared memory.
template <class BlockType>
struct ScanBwdLayout {
    using Block = BlockType;
    static constexpr bool kBackward = true;
    static constexpr int kInputs = Block::kBare ? 2 : 3, kBarriers = 1;
    int tile_bytes, features, feature_bytes, gradients, aggregates, table, norm, sums, barriers, total;

    ScanBwdLayout() = default;
    __host__ __device__ explicit ScanBwdLayout(const ScanShape& s) {
        tile_bytes = Block::tile_bytes(s);
        features = kSm90Stages * kInputs * tile_bytes;
        feature_bytes = (Block::kTokens + 1) * Block::width(s) * 4;
        gradients = features + 2 * feature_bytes;
        aggregates = gradients + kGradientCopies<Block> * Block::kTokens * Block::width(s) * 4;
        table = aggregates + 3 * Block::kAggregates * 4;  // decays of chunks; states; adjoints
        norm = table + table_rows<Block>(s) * Block::kWidth * 4;
        sums = norm + (Block::kBare ? 0 : TokenNorm<__half, Block>::kBytes + TokenNorm<__half, Block>::kSumBytes);
        barriers = Block::kProducts ? places() + Block::kPlaces * static_cast<int>(sizeof(int2))
                                    : sums + sum_rows(s) * Block::kThreads * 16;
        total = barriers + kSm90Stages * kBarriers * 8;
        if (Block::kProducts) total += 2 * Block::rank_tiles(s) * Block::kThreads * 16;
    }
    // Sums that each thread has of its own channels. Those of matrix products are not among them.
    __host__ __device__ static int sum_rows(const ScanShape& s) {
        return kWeightRow<Block> + (Block::kProducts ? 0 : s.rank);
    }
    // What matrix products use.
    __host__ __device__ int stage() const { return sums + kWeightRow<Block> * Block::kThreads * 16; }
    __host__ __device__ int chunks() const { return stage() + StepGradientProducts<Block>::kStageBytes; }
    __host__ __device__ int places() const { return chunks() + Block::kChunks * static_cast<int>(sizeof(int2)); }
    __host__ __device__ int weight_sums() const { return barriers + kSm90Stages * kBarriers * 8; }
};

// Where a thread's chunk of the current tile is in shared memory, from its first token on the path on.
struct BwdChunkPlace {
    unsigned char* box;     // u, in whose place du will be; z (dz), if there is one, and dy lie tile_bytes further each
    const float* features;  // B, C and the step features of a token
    float* gradients;       // of the features, this thread's copy
};

template <class T, class Block>
struct ScanBwdThread {
    static constexpr int kTokens = kFwdTokens;
    using Values = float[kTokens][kVec];

    const ScanShape& s;
    const ScanBwdLayout<Block>& layout;
    const TileChunk<Block>& chunk;
    const ChannelRows<Block> rows;
    float4* const sums;            // of the parameters, kThreads apart
    const int step, feature_step;  // from one token of the chunk to the next: bytes of a box, floats of features

    __device__ __forceinline__ void add_sum(int row, const float (&v)[kVec]) const {
        float4& sum = sums[row * Block::kThreads];
        sum.x += v[0], sum.y += v[1], sum.z += v[2], sum.w += v[3];
    }
    // Writes the gradient of a feature of the chunk's tokens: `unit` times the sum of v over the channels of a token.
    __device__ __forceinline__ void write_gradient(const BwdChunkPlace& at, const float (&v)[kTokens], float unit,
                                                   int feature) const {
        const auto write = [&](int k, float sum) {
            if (!chunk.idle) at.gradients[k * feature_step + feature] = unit * sum;
        };
        if constexpr (kGradientCopies<Block> == 1) {
            scatter_token_sums<Block::kLanes>(v, write);
        } else {
            const int tid = threadIdx.x;
            const float sum = octet_sums({v[0], v[1], v[2], v[3], v[4], v[5], v[6], 0.f});
            if (tid % 8 < kTokens) write(tid % 8, sum);
        }
    }

    // Phase 1: the aggregate (P, local) of the chunk. h becomes what each token adds to the state.
    __device__ __forceinline__ void start_states(const BwdChunkPlace& at, const float (&A)[kVec], const Values& steps,
                                                 Values& h, float* aggregates, int own) const {
        float P[kVec], local[kVec];
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const float b = at.features[k * feature_step];
            float x[kVec];
            to_floats(*reinterpret_cast<const Vec4<T>*>(at.box + k * step), x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float a = Math<T>::decay(steps[k][j], A[j]);
                h[k][j] = steps[k][j] * (b * x[j]);
                local[j] = k == 0 ? h[k][j] : fmaf(a, local[j], h[k][j]);
                P[j] = k == 0 ? a : P[j] * a;
            }
        }
        *reinterpret_cast<float4*>(aggregates + own) = make_float4(P[0], P[1], P[2], P[3]);
        *reinterpret_cast<float4*>(aggregates + Block::kAggregates + own) =
            make_float4(local[0], local[1], local[2], local[3]);
    }

    // Phase 2, before the norm: states and y from the state that enters the chunk. `moment` becomes the sum of y over
    // the thread's channels.
    __device__ __forceinline__ void outputs(const BwdChunkPlace& at, const float (&A)[kVec], const Values& steps,
                                            const float (&entering)[kVec], Values& h, Values& y,
                                            float (&moment)[kTokens]) const {
        float skip[kVec];
        rows.get(kSkip, skip);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const float c = at.features[k * feature_step + 1];
            float x[kVec];
            to_floats(*reinterpret_cast<const Vec4<T>*>(at.box + k * step), x);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float before = k == 0 ? entering[j] : h[k == 0 ? 0 : k - 1][j];
                h[k][j] = fmaf(Math<T>::decay(steps[k][j], A[j]), before, h[k][j]);
                y[k][j] = fmaf(c, h[k][j], skip[j] * x[j]);
            }
            moment[k] = (y[k][0] + y[k][1]) + (y[k][2] + y[k][3]);
        }
    }

    // Phase 2 of a bare scan: states from the state that enters the chunk, and dy.
    __device__ __forceinline__ void bare_outputs(const BwdChunkPlace& at, const float (&A)[kVec], const Values& steps,
                                                 const float (&entering)[kVec], Values& h, Values& dy) const {
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            to_floats(*reinterpret_cast<const Vec4<T>*>(at.box + layout.tile_bytes + k * step), dy[k]);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float before = k == 0 ? entering[j] : h[k == 0 ? 0 : k - 1][j];
                h[k][j] = fmaf(Math<T>::decay(steps[k][j], A[j]), before, h[k][j]);
            }
        }
    }

    // Phase 2: dy comes in as y less its mean and becomes the gradient of y, that of the result taken through gates and
    // norm. dz takes the place of z. Tokens that do not exist have u, z and dy of 0 and contribute nothing.
    __device__ __forceinline__ void through_norm(const BwdChunkPlace& at, const TokenNorm<T, Block>& norm,
                                                 const float (&counted)[kVec], int image, Values& dy) const {
        const float inverse_dim = Block::kWhole ? 1.f / Block::kWidth : 1.f / s.norm_dim;
        float scale[kVec], shift[kVec], product[kVec] = {}, gated_sum[kVec] = {};
        rows.get(kScale + image, scale);
        rows.get(kShift + image, shift);
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
                T* const z_slot = reinterpret_cast<T*>(at.box + layout.tile_bytes + k * step);
                float x[kVec], g[kVec], dz[kVec];
                to_floats(*reinterpret_cast<const Vec4<T>*>(z_slot), x);
                to_floats(*reinterpret_cast<const Vec4<T>*>(at.box + 2 * layout.tile_bytes + k * step), g);
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

    // Phase 3: the chunk's adjoint from 0, and dC.
    __device__ __forceinline__ void start_adjoints(const BwdChunkPlace& at, const float (&A)[kVec], const Values& steps,
                                                   const Values& h, const Values& dy, float* aggregates,
                                                   int own) const {
        float local[kVec], dC[kTokens];
#pragma unroll
        for (int k = kTokens - 1; k >= 0; --k) {
            const float c = at.features[k * feature_step + 1];
            dC[k] = 0.f;
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float a = Math<T>::decay(steps[k][j], A[j]);
                local[j] = k == kTokens - 1 ? a * (c * dy[k][j]) : a * fmaf(c, dy[k][j], local[j]);
                dC[k] = fmaf(dy[k][j], h[k][j], dC[k]);
            }
        }
        *reinterpret_cast<float4*>(aggregates + own) = make_float4(local[0], local[1], local[2], local[3]);
        write_gradient(at, dC, 1.f, 1);
    }

    // Phase 4: du, which takes the place of u, dB, and the gradients of the steps, which take the place of the steps.
    // From the last token to the first: `adjoint` comes in as what reaches the last one from behind.
    __device__ __forceinline__ void gradients(const BwdChunkPlace& at, const float (&A)[kVec], const Values& h,
                                              const float (&entering)[kVec], const Values& dy, float (&adjoint)[kVec],
                                              Values& steps) const {
        float skip[kVec], dA[kVec] = {}, dskip[kVec] = {}, dbias[kVec] = {}, dB[kTokens];
        rows.get(kSkip, skip);
#pragma unroll
        for (int k = kTokens - 1; k >= 0; --k) {
            const float b = at.features[k * feature_step], c = at.features[k * feature_step + 1];
            T* const u_slot = reinterpret_cast<T*>(at.box + k * step);
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
        write_gradient(at, dB, kLn2, 0);
        add_sum(kSumA, dA);
        add_sum(kSumSkip, dskip);
        add_sum(kSumBias, dbias);
    }

    // Phase 4: the gradients of the step features and of their weights, from those of the steps.
    __device__ __forceinline__ void step_gradients(const BwdChunkPlace& at, const Values& dsteps) const {
        for (int r = 0; r < s.rank; ++r) {
            const float4 w = rows[kWeight + r];
            float dw[kVec] = {}, ddt[kTokens];
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const float d = at.features[k * feature_step + 2 + r];
                ddt[k] = fmaf(dsteps[k][0], w.x, fmaf(dsteps[k][1], w.y, fmaf(dsteps[k][2], w.z, dsteps[k][3] * w.w)));
#pragma unroll
                for (int j = 0; j < kVec; ++j) dw[j] = fmaf(dsteps[k][j], d, dw[j]);
            }
            write_gradient(at, ddt, 1.f, 2 + r);
            add_sum(kWeightRow<Block> + r, dw);
        }
    }
};

// At the end of a plane: the threads' sums, added over the chunks, to the row of partial sums that this block has in
// this plane, and 0 in their places. The chunks begin at different ones for different rows, to spread over the banks.
template <class Block>
__device__ __forceinline__ void write_partials(const ScanBwdArgs& args, const TilePlan& plan,
                                               const TileScheduler<Block, true>& scheduler, int batch,
                                               float4* block_sums, const StepGradientProducts<Block>& products,
                                               float4* weight_sums) {
    const ScanShape& s = args.shape;
    const int rows = kSumWeight + s.rank;
    const int64_t row =
        (static_cast<int64_t>(batch) * plan.blocks_per_plane + scheduler.block_in_plane) * s.groups + scheduler.group;
    float* const partials = args.partials + row * rows * Block::real_dim(s);
    if constexpr (Block::kProducts) {
        const auto write = [&](int channel, int feature, float sum) {
            if (channel < Block::real_dim(s) && feature < s.rank)
                partials[(kSumWeight + feature) * Block::real_dim(s) + channel] = kLog2e * sum;
        };
        products.write_weights(s, weight_sums, write);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (kWeightRow<Block> + (Block::kProducts ? 0 : s.rank)) * Block::kLanes;
         i += Block::kThreads) {
        const int sum = i / Block::kLanes, lane = i % Block::kLanes, c0 = lane * kVec;
        float x[kVec] = {};
#pragma unroll 4
        for (int k = 0; k < Block::kChunks; ++k) {
            float4& v = block_sums[sum * Block::kThreads + (k + sum) % Block::kChunks * Block::kLanes + lane];
            x[0] += v.x, x[1] += v.y, x[2] += v.z, x[3] += v.w;
            v = make_float4(0.f, 0.f, 0.f, 0.f);
        }
        const float unit = sum == kSumA ? kLn2 : sum == kSumBias || sum >= kWeightRow<Block> ? kLog2e : 1.f;
        const int into = sum < kWeightRow<Block> ? sum : sum - kWeightRow<Block> + kSumWeight;
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (Block::kWhole || c0 + j < Block::real_dim(s))
                partials[into * Block::real_dim(s) + c0 + j] = unit * x[j];
    }
}

}  // namespace gm
