// SPDX-License-Identifier: Apache-2.0
// What the sm_90 scan kernels share: how a block walks the slabs of its planes, a thread's chunk in a slab, the step
// features in shared memory, sums over lanes, and the chunk scan.
//
// A flip costs nothing: a reversed path takes slabs, chunks and tokens in reverse. A chunk is 7 tokens of one row-major
// run or of one column; along columns neighbouring chunks of threads take neighbouring columns, so that their rows of
// shared memory are adjacent (no bank conflicts), and `order` is a chunk's place on the path.
//
// Tokens beyond the plane's last row or column come as zeros and lie at the end (reversed: the start) of the path,
// where they touch nothing. Those beyond the end of a column lie inside it: their steps are set to 0.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/grouped_scan_sm90.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/math.cuh"
#include "cuda/tma.cuh"

namespace gm {

constexpr int kSm90Stages = 2;

// Constants of a block whose slab has kParts parts of 128 threads, kLanes of them to a token. kWhole: every lane has 4
// channels, and LayerNorm counts them all.
template <int kLanesOfToken, bool kWholeWidth, int kPartsOfSlab>
struct Sm90Block {
    static constexpr int kLanes = kLanesOfToken, kParts = kPartsOfSlab, kThreads = kParts * kSlabThreads;
    static constexpr bool kWhole = kWholeWidth;
    static constexpr int kWidth = kLanes * kVec;  // channels that the lanes could hold
    static constexpr int kChunks = kThreads / kLanes, kTokens = kChunks * kFwdTokens;
    static constexpr int kScanLanes = kChunks / 4;       // lanes of a channel in the chunk scan, 4 chunks each
    static constexpr int kPad = kScanLanes > 1 ? 4 : 0;  // floats after every 4 chunks: their readers hit other banks
    static constexpr int kAggregates = kChunks * kWidth + kChunks / 4 * kPad;
    // Fetching step features: each thread has kFetchTokens tokens and every kSharers-th of their features.
    static constexpr int kFetchTokens = kTokens > kThreads ? 2 : 1;
    static constexpr int kSharers = kLanes > 8 ? kLanes / 8 / kParts : 1;
    static_assert(kParts == 1 || kLanes <= 8);
    static constexpr int kFeatures = kSm90Features<kLanes>;
    static constexpr int kFetch = (kFeatures + kSharers - 1) / kSharers;

    __device__ static int aggregate(int chunk) { return chunk * kWidth + chunk / 4 * kPad; }
    __host__ __device__ static int dim(const ScanShape& s) { return kWhole ? kWidth : s.dim; }
    // Floats of a token's features in shared memory: B, C, dt_0, ...; a multiple of 4.
    __host__ __device__ static int width(const ScanShape& s) { return kFeatures <= 4 ? 4 : (s.rank + 5) / 4 * 4; }
    // Bytes of one tensor's slab, a multiple of 128. The slot after the last is zeros, for threads without tokens or
    // channels of their own: what they read, nobody writes.
    __host__ __device__ static int slab_bytes(const ScanShape& s) {
        return ((kTokens + 1) * dim(s) * 2 + 127) / 128 * 128;
    }
};

// A slab of a plane: (column, row) of its first token, and its row-major number, the origin; along rows, that as
// column.
struct SlabCursor {
    int batch, step, column, row, origin;
};

// The slabs of a block's planes, all of one group: batch by batch, each along its path or, kFromEnd, against it.
template <class Block, bool kFromEnd>
struct SlabWalk {
    int group, batch_step, steps;
    bool reverse, columns, pieces, descending;
    int box_tokens, stride;

    SlabWalk() = default;
    __device__ SlabWalk(const ScanShape& s, const SlabPlan& plan) {
        group = blockIdx.x % s.groups;
        batch_step = gridDim.x / s.groups;
        const int direction = (s.directions[group >> 4] >> (2 * (group & 15))) & 3;
        reverse = direction & 1;
        columns = direction & 2;
        descending = reverse != kFromEnd;
        pieces = columns && plan.columns == 0;
        steps = columns ? plan.column_slabs : plan.row_slabs;
        box_tokens = columns && !pieces ? plan.columns * s.height : Block::kTokens;
        stride = columns ? plan.columns : Block::kTokens;
        if (descending) stride = -stride;
    }
    __device__ __forceinline__ int64_t total(const ScanShape& s) const {
        const int first = blockIdx.x / s.groups;
        return (s.batch - first + batch_step - 1) / batch_step * steps;
    }
    __device__ __forceinline__ void restart(const ScanShape& s, const SlabPlan& plan, SlabCursor& at) const {
        at.step = 0;
        at.row = pieces && descending ? (plan.pieces - 1) * Block::kTokens : 0;
        at.column = !descending ? 0 : pieces ? s.width - 1 : (steps - 1) * (columns ? plan.columns : Block::kTokens);
        at.origin = at.row * s.width + at.column;
    }
    __device__ __forceinline__ SlabCursor first(const ScanShape& s, const SlabPlan& plan) const {
        SlabCursor at;
        at.batch = blockIdx.x / s.groups;
        restart(s, plan, at);
        return at;
    }
    __device__ __forceinline__ void advance(const ScanShape& s, const SlabPlan& plan, SlabCursor& at) const {
        if (++at.step == steps) {
            at.batch += batch_step;
            restart(s, plan, at);
        } else if (!pieces) {
            at.column += stride;
            at.origin = at.column;
        } else {
            at.row += descending ? -Block::kTokens : Block::kTokens;
            if (at.row < 0 || at.row >= s.height) {
                at.row = descending ? (plan.pieces - 1) * Block::kTokens : 0;
                at.column += descending ? -1 : 1;
            }
            at.origin = at.row * s.width + at.column;
        }
    }
    // Number of a slab's part, the part-th along the path; beyond all others where it has no tokens.
    __device__ __forceinline__ int part(const SlabPlan& plan, const SlabCursor& at, int part) const {
        const int place = Block::kParts == 1 ? 0 : reverse ? 1 - part : part;
        if (Block::kParts > 1 && pieces) {
            const int piece = at.row / (Block::kTokens / 2) + place;
            return piece < plan.part_pieces ? at.column * plan.part_pieces + piece : INT32_MAX;
        }
        return (descending ? steps - 1 - at.step : at.step) * Block::kParts + place;
    }
    // Visits the boxes of a slab: visit(coordinates, byte offset in shared memory).
    template <class F>
    __device__ __forceinline__ void boxes(const ScanShape& s, const SlabCursor& at, const SlabMapKind& kind,
                                          F&& visit) const {
        const int count = Block::kTokens > kBoxLimit ? kind.boxes[columns] : 1;
        const bool fused = columns && kind.column_fuse;
#pragma unroll 1
        for (int box = 0; box < count; ++box) {
            const int tokens = box * (Block::kTokens / 2);
            visit(Coordinates{fused ? at.column * Block::dim(s) : 0,
                              fused     ? 0
                              : columns ? at.column
                                        : (at.column + tokens) >> kind.row_shift,
                              columns ? at.row + tokens : 0, group, at.batch},
                  tokens * Block::dim(s) * 2);
        }
    }
    __device__ __forceinline__ int box_bytes(const ScanShape& s) const { return box_tokens * Block::dim(s) * 2; }
};

// This thread's chunk: tokens first..first + 6 of one column of a slab (of its one run along rows).
template <class Block>
struct SlabChunk {
    int c0, first, order;
    int slot0, slot_step;  // path token k is in slot slot0 + k * slot_step
    bool active, idle, owns, reverse;

    template <class Walk>
    __device__ SlabChunk(const ScanShape& s, const SlabPlan& plan, const Walk& walk) {
        const int chunk = threadIdx.x / Block::kLanes;
        c0 = threadIdx.x % Block::kLanes * kVec;
        active = Block::kWhole || c0 < s.dim;
        reverse = walk.reverse;
        const bool whole_columns = walk.columns && !walk.pieces;
        const int across = whole_columns ? plan.columns : 1, blocks = whole_columns ? plan.blocks : Block::kChunks;
        idle = chunk >= across * blocks;  // columns need not fill the slab
        int place = idle ? chunk : chunk % across * blocks + chunk / across;
        if (Block::kParts > 1 && whole_columns) {
            // The chunks of a part are adjacent on the path, those without tokens behind them.
            constexpr int kPartChunks = Block::kChunks / Block::kParts;
            const int part_across = across / Block::kParts, used = part_across * blocks;
            const int spare = chunk - across * blocks, spares = max(kPartChunks - used, 1), column = chunk % across;
            const int part = idle ? spare / spares : column / part_across;
            place =
                part * kPartChunks + (idle ? used + spare % spares : column % part_across * blocks + chunk / across);
        }
        first = idle ? 0 : chunk / across * kFwdTokens;
        order = reverse ? Block::kChunks - 1 - place : place;
        owns = active && !idle;
        slot_step = idle ? 0 : reverse ? -across : across;
        slot0 = idle ? Block::kTokens : first * across + chunk % across + (reverse ? (kFwdTokens - 1) * across : 0);
    }
    // Byte offset of this thread's channels in a slab at path token 0, and from one path token to the next.
    __device__ __forceinline__ int offset(const ScanShape& s) const {
        return ((active ? slot0 : Block::kTokens) * Block::dim(s) + (active ? c0 : 0)) * 2;
    }
    __device__ __forceinline__ int step(const ScanShape& s) const { return active ? slot_step * Block::dim(s) * 2 : 0; }
    // How many of the chunk's tokens exist; they are the first of a column, so the last of a reversed path. The slots
    // of the others hold zeros, and are nobody else's.
    template <class Walk>
    __device__ __forceinline__ int count(const ScanShape& s, const Walk& walk, const SlabCursor& at) const {
        return idle ? 0 : walk.columns ? min(max(s.height - at.row - first, 0), kFwdTokens) : kFwdTokens;
    }
    __device__ __forceinline__ bool is_real(int k, int count) const {
        return (reverse ? kFwdTokens - 1 - k : k) < count;
    }
};

// True where some chunk of the block has tokens that do not exist.
template <class Block, class Walk>
__device__ __forceinline__ bool is_ragged(const ScanShape& s, const SlabPlan& plan, const Walk& walk) {
    return walk.columns && (walk.pieces ? s.height % Block::kTokens != 0
                                        : s.height % kFwdTokens != 0 || plan.columns * plan.blocks < Block::kChunks);
}

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
    __device__ __forceinline__ void fetch(const ScanShape& s, const Walk& walk, const SlabCursor& at,
                                          const FeatureImages& images) {
        if (at.step == 0) {
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

// Sums over the lanes of a token, several at once; every lane gets all of them.
template <int kLanes, int kCount>
__device__ __forceinline__ void token_sums(float (&v)[kCount]) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2)
#pragma unroll
        for (int k = 0; k < kCount; ++k) v[k] += __shfl_xor_sync(kFullWarp, v[k], d);
}

// The same sums, each left with some lanes only: at every step a lane passes on half of its values and keeps the
// others, 9 shuffles in place of 35 for 32 lanes. Calls write(k, sum) on one lane a token.
template <int kLanes, class F>
__device__ __forceinline__ void scatter_token_sums(const float (&v)[kFwdTokens], F&& write) {
    const int lane = threadIdx.x % kLanes;
    float w[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) w[k] = k < kFwdTokens ? v[k] : 0.f;
    int d = kLanes / 2, kept = 0;
#pragma unroll
    for (int held = 8; held > 1 && d > 0; held /= 2, d /= 2) {
        const bool upper = lane & d;
#pragma unroll
        for (int k = 0; k < held / 2; ++k) {
            const float give = upper ? w[k] : w[k + held / 2];
            w[k] = (upper ? w[k + held / 2] : w[k]) + __shfl_xor_sync(kFullWarp, give, d);
        }
        kept = kept * 2 + upper;
    }
    constexpr int kLeft = kLanes >= 8 ? 1 : 8 / kLanes;  // sums that a lane ends up with
#pragma unroll
    for (; d > 0; d /= 2) w[0] += __shfl_xor_sync(kFullWarp, w[0], d);
    constexpr int kSharing = kLanes > 8 ? kLanes / 8 : 1;  // lanes with the same sum
    const bool writes = lane % kSharing == 0;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const int k = kept * kLeft + i;
        if (writes && k < kFwdTokens) write(k, w[i]);
    }
}

// Chunk aggregates (P, h) in shared memory, by order, to the states entering the chunks (in place of h). kScanLanes
// neighbouring threads serve a channel. `carry` is the state of the thread's channel before the first chunk and becomes
// the one after the last. enters(part, channel, state) sees the state entering each part of the slab.
template <class Block, class F>
__device__ __forceinline__ void scan_chunks(const float* P_in, float* h_in, float& carry, F&& enters) {
    constexpr int kLanes = Block::kScanLanes;
    const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes;
    const int first = q * (4 * Block::kWidth + Block::kPad) + channel;  // aggregate(4 q), the others kWidth apart
    float P4[4], h4[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        P4[i] = P_in[first + i * Block::kWidth];
        h4[i] = h_in[first + i * Block::kWidth];
    }
    float P = P4[0], h = h4[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) h = fmaf(P4[i], h, h4[i]), P *= P4[i];
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
        const float h_before = __shfl_up_sync(kFullWarp, h, d, kLanes),
                    P_before = __shfl_up_sync(kFullWarp, P, d, kLanes);
        if (q >= d) h = fmaf(P, h_before, h), P *= P_before;
    }
    const float P_before = __shfl_up_sync(kFullWarp, P, 1, kLanes), h_before = __shfl_up_sync(kFullWarp, h, 1, kLanes);
    float state = q == 0 ? carry : fmaf(P_before, carry, h_before);
    if (q % (kLanes / Block::kParts) == 0) enters(q / (kLanes / Block::kParts), channel, state);
    carry = __shfl_sync(kFullWarp, fmaf(P, carry, h), kLanes - 1, kLanes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        h_in[first + i * Block::kWidth] = state;
        state = fmaf(P4[i], state, h4[i]);
    }
}

// Two blocks an SM need nearly all of its memory as shared memory. Asked of the driver once for each kernel and device.
inline cudaError_t prefer_shared(const void* kernel, int device) {
    thread_local std::vector<std::pair<const void*, int>> known;
    const std::pair<const void*, int> key{kernel, device};
    if (std::find(known.begin(), known.end(), key) != known.end()) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) known.push_back(key);
    return error;
}

// As many blocks as run at once, `resident` an SM, each with several planes of one group: it loads the next plane while
// it computes, and reads its parameters once (2% at 64 x 56 against a block a plane).
template <class Kernel, class Args>
cudaError_t launch_sm90(Kernel kernel, const ScanShape& shape, int threads, int resident, int shared,
                        cudaStream_t stream, const Args& args) {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = prefer_shared(reinterpret_cast<const void*>(kernel), device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t at_once = std::max(resident * multiprocessors / shape.groups, 1) * int64_t{shape.groups};
    const int64_t blocks = std::min(shape.batch * shape.groups, at_once);
    return launch_kernel(kernel, blocks, threads, shared, stream, args);
}

// f(type tag, std::integral_constant<int, lanes>, std::bool_constant<whole>)
template <class F>
cudaError_t dispatch_sm90(DType dtype, const ScanShape& shape, F&& f) {
    const bool whole = shape.dim == shape.lanes * kVec && shape.norm_dim == shape.dim;
    const auto with_width = [&](auto tag, auto lanes) {
        return whole ? f(tag, lanes, std::true_type{}) : f(tag, lanes, std::false_type{});
    };
    const auto with_lanes = [&](auto tag) {
        switch (shape.lanes) {
            case 4: return with_width(tag, std::integral_constant<int, 4>{});
            case 8: return with_width(tag, std::integral_constant<int, 8>{});
            case 16: return with_width(tag, std::integral_constant<int, 16>{});
            default: return with_width(tag, std::integral_constant<int, 32>{});
        }
    };
    return dtype == DType::kHalf ? with_lanes(TypeTag<__half>{}) : with_lanes(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
