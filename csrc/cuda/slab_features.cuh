// SPDX-License-Identifier: Apache-2.0
// What the sm_90 scan kernels keep in shared memory beside the slabs: each token's B, C and step features, and the
// table of channel parameters; and the steps that follow from both.
#pragma once

#include "cuda/slab_walk.cuh"

namespace gm {

// The features of a token are numbered B, C, dt_0, dt_1, ...; images of them are given in the order B, C, dt.
struct FeatureImages {
    const ImageArg &B, &C, &dt;
    __device__ const ImageArg& operator[](int i) const { return i == 0 ? B : i == 1 ? C : dt; }
};

// First element of an image for a batch and group.
template <class T>
__device__ __forceinline__ T* plane_of(const ImageArg& image, int batch, int group) {
    return static_cast<T*>(image.ptr) + (batch * image.batch + group * image.group);
}

// B (times ln 2), C and step features of a slab in shared memory, [token][width] floats, fetched from device memory one
// step of the walk ahead. A thread has kFetchTokens tokens and of those every kSharers-th feature.
template <class T, class Block>
struct StepFeatures {
    // Where threads share the features of a token, one keeps the image of its own first feature, and dt.
    static constexpr int kImages = Block::kSharers == 1 ? 3 : 2;
    T fetched[Block::kFetchTokens][Block::kFetch];
    // Of this thread's tokens: the row-major distance to the slab's first, and what the cursor must be below for it to
    // exist.
    int distance[Block::kFetchTokens], limit[Block::kFetchTokens];
    const T* plane[kImages];
    uint32_t own_stride;

    template <class Walk>
    __device__ StepFeatures(const ScanShape& s, const SlabPlan& plan, const Walk& walk, const FeatureImages& images) {
        const int columns = walk.columns && !walk.pieces ? plan.columns : 1;
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            const int slot = token(i), row = slot / columns, column = slot - row * columns;
            distance[i] = walk.columns ? row * s.width + column : slot;
            limit[i] = !walk.columns ? s.height * s.width - slot : walk.pieces ? s.height - row : s.width - column;
            if (slot >= walk.box_tokens) limit[i] = INT32_MIN;
        }
        own_stride = static_cast<uint32_t>(images[min(sharer(), 2)].token);
    }
    __device__ static int token(int i) {
        return threadIdx.x % (Block::kThreads / Block::kSharers) + i * Block::kThreads;
    }
    __device__ static int sharer() {
        return Block::kSharers == 1 ? 0 : threadIdx.x / (Block::kThreads / Block::kSharers);
    }
    // Of this thread's j-th feature.
    __device__ static int feature(int j) { return sharer() + j * Block::kSharers; }
    __device__ static bool has(const ScanShape& s, int j) {
        return Block::kFeatures == 3 ? j < 3 : feature(j) < s.rank + 2;
    }
    __device__ static bool in_slab(int i) {
        return Block::kFetchTokens * Block::kThreads == Block::kTokens || token(i) < Block::kTokens;
    }
    template <class Walk>
    __device__ __forceinline__ bool exists(const Walk& walk, const SlabCursor& at, int i) const {
        return (walk.pieces ? at.row : at.column) < limit[i];
    }
    __device__ __forceinline__ uint32_t place(const SlabCursor& at, int i) const { return at.origin + distance[i]; }

    template <class Walk>
    __device__ __forceinline__ void fetch(const ScanShape& s, const SlabPlan& plan, const Walk& walk,
                                          const SlabCursor& at, const FeatureImages& images) {
        if (walk.enters(plan, at)) {
            const int first = Block::kSharers == 1 ? 0 : min(sharer(), 2);
            plane[0] = plane_of<const T>(images[first], at.batch, walk.group) + (first == 2 ? sharer() - 2 : 0);
            if (Block::kSharers == 1) plane[1] = plane_of<const T>(images.C, at.batch, walk.group);
            plane[kImages - 1] = plane_of<const T>(images.dt, at.batch, walk.group) + sharer() - 2;
        }
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            const uint32_t from = exists(walk, at, i) ? place(at, i) : 0;  // a valid address either way
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
    // What was fetched for the slab `at`; only now are its values waited for.
    template <class Walk>
    __device__ __forceinline__ void keep(const ScanShape& s, const Walk& walk, const SlabCursor& at, float* to) const {
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            const bool real = exists(walk, at, i);
            const auto value = [&](int j) {
                return real ? to_float(fetched[i][j]) * (feature(j) == 0 ? kLn2 : 1.f) : 0.f;
            };
            if constexpr (Block::kFeatures <= 4) {
                float v[4] = {};
#pragma unroll
                for (int j = 0; j < Block::kFeatures; ++j)
                    if (has(s, j)) v[j] = value(j);
                if (in_slab(i)) *reinterpret_cast<float4*>(to + token(i) * 4) = make_float4(v[0], v[1], v[2], v[3]);
            } else {
#pragma unroll
                for (int j = 0; j < Block::kFetch; ++j)
                    if (has(s, j) && in_slab(i)) to[token(i) * Block::width(s) + feature(j)] = value(j);
            }
        }
    }
    // Gradients of this thread's features from shared memory to their images.
    template <class Walk>
    __device__ __forceinline__ void send(const ScanShape& s, const Walk& walk, const SlabCursor& at, const float* from,
                                         T* const (&planes)[3], const FeatureImages& images) const {
#pragma unroll
        for (int i = 0; i < Block::kFetchTokens; ++i) {
            if (!exists(walk, at, i)) continue;
#pragma unroll
            for (int j = 0; j < Block::kFetch; ++j) {
                if (!has(s, j)) continue;
                const int f = feature(j), image = min(f, 2);
                const uint32_t stride = static_cast<uint32_t>(images[image].token);
                planes[image][static_cast<uint64_t>(place(at, i)) * stride + f - image] =
                    from_float<T>(from[token(i) * Block::width(s) + f]);
            }
        }
    }
};

// Rows of the table of channel parameters in shared memory, kWidth floats each; the gate is folded into the norm's
// scale and shift, which are kept for two images. kWeight + r: dt_weight, an even number of rows.
enum TableRow { kBias, kSkip, kA, kCounted, kScale, kShift = kScale + 2, kWeight = kShift + 2 };

__host__ __device__ inline int table_rows(const ScanShape& s) { return kWeight + (s.rank + 1) / 2 * 2; }

template <class T, class Block, class Args>
__device__ __forceinline__ void put_gated_rows(const Args& args, float* table, int image, int batch, int group) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * Block::kWidth; i += Block::kThreads) {
        const int row = i / Block::kWidth, c = i % Block::kWidth, dim = Block::dim(args.shape);
        const int64_t channel = static_cast<int64_t>(group) * dim + c;
        float value = 0.f;
        if (c < dim) {
            const float gate =
                load_param_or<T>(args.gate, static_cast<int64_t>(batch) * args.shape.groups * dim + channel, 1.f);
            value = gate * load_param_or<T>(row == 0 ? args.norm_weight : args.norm_bias, channel, 0.f);
        }
        table[(row == 0 ? kScale : kShift) * Block::kWidth + image * Block::kWidth + c] = value;
    }
}

// All rows but the gated ones. Lanes without channels: a step of 0 and no skip keep them at 0 and out of all sums.
template <class T, class Block, class Args>
__device__ __forceinline__ void put_rows(const Args& args, float* table, int group) {
    const ScanShape& s = args.shape;
    const int dim = Block::dim(s);
#pragma unroll 1
    for (int i = threadIdx.x; i < table_rows(s) * Block::kWidth; i += Block::kThreads) {
        const int row = i / Block::kWidth, c = i % Block::kWidth, r = row - kWeight;
        const int64_t channel = static_cast<int64_t>(group) * dim + c;
        const bool in = c < dim;
        if (row >= kScale && row < kWeight) continue;
        float value = 0.f;
        if (row == kBias) {
            value = in ? load_param_or<T>(args.dt_bias, channel, 0.f) * kLog2e : -1e30f;
        } else if (row == kCounted) {
            value = c < s.norm_dim ? 1.f : 0.f;
        } else if (in && r < s.rank) {
            const ParamArg& parameter = row == kSkip ? args.D : row == kA ? args.A : args.dt_weight;
            value = load_param_or<T>(parameter, r < 0 ? channel : channel * s.rank + r, 0.f) * (r < 0 ? 1.f : kLog2e);
        }
        table[i] = value;
    }
}

// Zeros where `count` slabs have no box: the slots behind it, and that of threads without tokens or channels.
template <class Block>
__device__ __forceinline__ void clear_tails(unsigned char* slabs, int count, int slab_bytes, int box_bytes) {
    const int tail = (slab_bytes - box_bytes) / 16;
    for (int i = threadIdx.x; i < count * tail; i += Block::kThreads)
        *reinterpret_cast<uint4*>(slabs + i / tail * slab_bytes + box_bytes + i % tail * 16) = make_uint4(0, 0, 0, 0);
}

// Zeros where no thread puts features: that of threads without tokens, and the ends of rows that are not full.
template <class Block>
__device__ __forceinline__ void clear_features(float* features, int count, int feature_bytes) {
    const int first = Block::kFeatures <= 4 ? Block::kTokens * 4 : 0, floats = feature_bytes / 4 - first;
    for (int i = threadIdx.x; i < count * floats; i += Block::kThreads)
        features[i / floats * (feature_bytes / 4) + first + i % floats] = 0.f;
}

// B (times ln 2) and C of a token; with few step features by the access that reads them as well.
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
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
        steps[k][0] = bias.x, steps[k][1] = bias.y, steps[k][2] = bias.z, steps[k][3] = bias.w;
    const auto add = [&](int k, const float4& w, float d) {
        steps[k][0] = fmaf(w.x, d, steps[k][0]), steps[k][1] = fmaf(w.y, d, steps[k][1]);
        steps[k][2] = fmaf(w.z, d, steps[k][2]), steps[k][3] = fmaf(w.w, d, steps[k][3]);
    };
    if constexpr (Block::kFeatures > 4) {
        // In pairs, one 8-byte read each; the second weight of an odd last pair is 0.
        for (int r = 0; r < s.rank; r += 2) {
            const float4 w0 = weight(r), w1 = weight(r + 1);
#pragma unroll
            for (int k = 0; k < kFwdTokens; ++k) {
                const float2 d = *reinterpret_cast<const float2*>(features + k * feature_step + 2 + r);
                add(k, w0, d.x);
                add(k, w1, d.y);
            }
        }
    } else {  // rank 1, or up to 2
        const float4 w0 = weight(0);
        float4 w1 = {};
        if (Block::kFeatures == 4) w1 = weight(1);
#pragma unroll
        for (int k = 0; k < kFwdTokens; ++k) {
            const float4 d = *reinterpret_cast<const float4*>(features + k * feature_step);
            add(k, w0, d.z);
            if (Block::kFeatures == 4) add(k, w1, d.w);
        }
    }
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j) steps[k][j] = Math<T>::softplus(steps[k][j]);
}

template <class Block>
__device__ __forceinline__ void mask_steps(const SlabChunk<Block>& chunk, int count, float (&steps)[kFwdTokens][kVec]) {
#pragma unroll
    for (int k = 0; k < kFwdTokens; ++k)
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (!chunk.is_real(k, count)) steps[k][j] = 0.f;
}

}  // namespace gm
