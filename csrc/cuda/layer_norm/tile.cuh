// SPDX-License-Identifier: Apache-2.0
// How a block of the LayerNorm kernels holds its tokens, their statistics, and sums over tokens in a fixed order.
//
// Products that are added elsewhere are rounded explicitly (__fmul_rn). Otherwise the compiler would fuse some of them
// in one instantiation and not in another, and results would depend on the alignment of the inputs.
#pragma once

#include <climits>

#include "cuda/common/dispatch.h"
#include "cuda/common/packed.cuh"
#include "cuda/layer_norm/args.h"
#include "cuda/layer_norm/plan.h"

namespace gm {

constexpr int kNormWarps = kNormThreads / 32;

// Blocks an SM that the registers of a kernel leave room for. Other architectures than 9.0, for which the kernels were
// tuned, need more of them.
constexpr int fitted_blocks(NormPass pass, int vecs) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
    return norm_resident(pass, vecs) - 1;
#else
    return norm_resident(pass, vecs);
#endif
}

// The strip of tokens of one image that a block goes through.
struct Strip {
    int64_t batch, number;  // number: counts the strips of all images
    int first, end;

    __device__ Strip(const NormShape& s, const NormPlan& plan) : number(blockIdx.x) {
        batch = number / plan.strips;
        const int64_t begin = (number - batch * plan.strips) * plan.strip_tokens;
        first = static_cast<int>(begin);
        end = static_cast<int>(min(begin + plan.strip_tokens, s.tokens));
    }
};

// A thread's token and channels: `lanes` neighbouring threads share a token, kVecs vectors of 4 slots each. kLanes:
// their number where the kernel knows it, else 0. A kernel that does has fewer addresses to compute, and sums over the
// lanes without a loop.
template <int kVecs, int kLanes>
struct RowTile {
    static constexpr int kVectors = kVecs;
    static constexpr bool kKnowsLanes = kLanes > 0;
    static constexpr int kWidth = kVecs * 32 * kVec;  // at least the slots of a token
    using Values = float[kVecs][kVec];

    int slots, lanes_of_plan, lane, row, rows, group_dim, group_width;
    float inverse_dim;
    int group[kVecs];     // the group of a vector; 0 where there is none
    int channels[kVecs];  // channels of its group from the vector on; 0 or less where there are none or no vector
    bool exists;          // whether this step has a token

    __device__ RowTile(const NormShape& s, const NormPlan& plan)
        : slots(s.groups * s.group_width),
          lanes_of_plan(plan.lanes),
          lane(threadIdx.x & (lanes() - 1)),
          row(threadIdx.x / lanes()),
          rows(plan.step),
          group_dim(s.group_dim),
          group_width(s.group_width),
          inverse_dim(1.f / s.dim) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            group[v] = slot(v) < slots ? slot(v) / group_width : 0;
            channels[v] = slot(v) < slots ? group_dim - slot(v) % group_width : INT_MIN / 2;
        }
    }
    __device__ __forceinline__ int lanes() const { return kLanes > 0 ? kLanes : lanes_of_plan; }
    __device__ __forceinline__ int slot(int v) const { return (v * lanes() + lane) * kVec; }
    __device__ __forceinline__ bool is_channel(int v, int j) const { return channels[v] > j; }

    // `left` tokens of the strip are still to come.
    __device__ __forceinline__ void step(int left) { exists = row < left; }

    // Sums over the lanes that share a token; all of them get the sums.
    template <int kCount>
    __device__ __forceinline__ void lane_sums(float (&x)[kCount]) const {
#pragma unroll(kLanes > 0 ? 5 : 1)
        for (int d = lanes() >> 1; d > 0; d >>= 1)
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kFullWarp, x[i], d);
    }

    // x becomes (x - mean) / sqrt(variance + eps) over the channels of the token, and 0 in the padding and where there
    // is no token. The variance is that of the centred values, so large means do not cancel.
    __device__ __forceinline__ float normalise(float eps, Values& x) const {
        float sum[1] = {};
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int j = 0; j < kVec; ++j) sum[0] += x[v][j];
        lane_sums(sum);
        const float mean = __fmul_rn(sum[0], inverse_dim);
        sum[0] = 0.f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                x[v][j] = is_channel(v, j) ? x[v][j] - mean : 0.f;
                sum[0] = fmaf(x[v][j], x[v][j], sum[0]);
            }
        }
        lane_sums(sum);
        const float inverse_std = exists ? rsqrtf(fmaf(sum[0], inverse_dim, eps)) : 0.f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int j = 0; j < kVec; ++j) x[v][j] = __fmul_rn(x[v][j], inverse_std);
        return inverse_std;
    }

    // The gradient through the norm. h comes in as the gradient of the normalised values, 0 in the padding, and
    // becomes what is to be divided by sqrt(variance + eps): h - mean(h) - normed * mean(h * normed). The padding then
    // holds anything finite.
    __device__ __forceinline__ void normalise_backward(const Values& normed, Values& h) const {
        float means[2] = {};
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                means[0] += h[v][j];
                means[1] = fmaf(h[v][j], normed[v][j], means[1]);
            }
        lane_sums(means);
        const float plain = __fmul_rn(means[0], inverse_dim), product = __fmul_rn(means[1], inverse_dim);
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int j = 0; j < kVec; ++j) h[v][j] -= fmaf(normed[v][j], product, plain);
    }

    // Sums of one value for each channel over the block's tokens: `store(channel, slot, sum)`.
    template <class Store>
    __device__ void block_sums(Values& sums, float (*shared)[kWidth], const Store& store) const {
        for (int d = lanes(); d < 32; d <<= 1)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j) sums[v][j] += __shfl_xor_sync(kFullWarp, sums[v][j], d);
        __syncthreads();
        if ((threadIdx.x & 31) < lanes())
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                *reinterpret_cast<float4*>(&shared[threadIdx.x >> 5][slot(v)]) =
                    make_float4(sums[v][0], sums[v][1], sums[v][2], sums[v][3]);
        __syncthreads();
        for (int i = threadIdx.x; i < slots; i += kNormThreads) {
            const int group = i / group_width, d = i - group * group_width;
            if (d >= group_dim) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kNormWarps; ++w) sum += shared[w][i];
            store(group * group_dim + d, i, sum);
        }
    }
};

// Zeros after the last group of the strip's tokens, in an image of adjacent groups.
template <class T>
__device__ void clear_tails(const NormImage& image, const NormShape& s, const Strip& strip) {
    T* const p = static_cast<T*>(image.ptr) + strip.batch * image.batch + strip.first * image.token + s.dim;
    for (int i = threadIdx.x; i < image.tail * (strip.end - strip.first); i += kNormThreads)
        p[i / image.tail * image.token + i % image.tail] = from_float<T>(0.f);
}

// A few floats for each slot in shared memory; 0 in the padding.
template <int kRows, int kWidth>
struct alignas(16) SlotRows {
    float rows[kRows][kWidth];

    // `value(channel, row values)` for the slots of a token's lanes; the caller's __syncthreads makes the table
    // visible.
    template <class F>
    __device__ void fill(const NormShape& s, const NormPlan& plan, const F& value) {
        for (int i = threadIdx.x; i < plan.lanes * (kWidth / 32); i += kNormThreads) {
            float row[kRows] = {};
            get_values(s, i, value, row);
            put(i, row);
        }
    }
    // The same, with all of a thread's values on their way at once, where there are registers for them.
    template <class F>
    __device__ void fill_at_once(const NormShape& s, const NormPlan& plan, const F& value) {
        constexpr int kTurns = kWidth / kNormThreads;
        float values[kTurns][kRows] = {};
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) get_values(s, threadIdx.x + turn * kNormThreads, value, values[turn]);
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int i = threadIdx.x + turn * kNormThreads;
            if (i < plan.lanes * (kWidth / 32)) put(i, values[turn]);
        }
    }
    // volatile, so that it is read where it is used: read once before the loop it would take registers.
    __device__ __forceinline__ void get(int row, int slot, float (&out)[kVec]) const {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
                     : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&rows[row][slot]))));
    }

private:
    template <class F>
    static __device__ __forceinline__ void get_values(const NormShape& s, int slot, const F& value,
                                                      float (&row)[kRows]) {
        const int group = slot / s.group_width, d = slot - group * s.group_width;
        if (group < s.groups && d < s.group_dim) value(group * s.group_dim + d, row);
    }
    __device__ __forceinline__ void put(int slot, const float (&row)[kRows]) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) rows[j][slot] = row[j];
    }
};

// Sum of one value of every thread of the block, in a fixed order; valid in thread 0.
__device__ __forceinline__ float block_total(float x) {
    __shared__ float warps[kNormWarps];
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(kFullWarp, x, d);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kNormWarps; ++w) sum += warps[w];
    return sum;
}

// Wide rows: a warp goes through all channels of a token.
template <class F>
__device__ __forceinline__ float wide_mean(int dim, const F& value) {
    float sum = 0.f;
#pragma unroll 2
    for (int c = threadIdx.x & 31; c < dim; c += 32) sum += value(c);
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, d);
    return sum / dim;
}

// Statistics of a block's tokens, and means of the gradient and of its product with the normed values.
struct WideRows {
    float mean[kWideTokens], inverse_std[kWideTokens], plain[kWideTokens], product[kWideTokens];

    // `value(token, channel)`; called by whole warps, token by token.
    template <class F>
    __device__ __forceinline__ void statistics(int t, int dim, float eps, const F& value) {
        const float m = wide_mean(dim, [&](int c) { return value(t, c); });
        const float variance = wide_mean(dim, [&](int c) {
            const float centred = value(t, c) - m;
            return centred * centred;
        });
        mean[t] = m;
        inverse_std[t] = rsqrtf(variance + eps);
    }
    // `gradient(token, channel)` is the gradient of the normed values.
    template <class F, class G>
    __device__ __forceinline__ void gradient_means(int t, int dim, const F& value, const G& gradient) {
        plain[t] = wide_mean(dim, [&](int c) { return gradient(t, c); });
        product[t] = wide_mean(dim, [&](int c) { return gradient(t, c) * normed(t, value(t, c)); });
    }
    __device__ __forceinline__ float normed(int t, float x) const { return (x - mean[t]) * inverse_std[t]; }
    __device__ __forceinline__ float backward(int t, float gradient, float normed) const {
        return inverse_std[t] * (gradient - fmaf(normed, product[t], plain[t]));
    }
};

// A token of an image whose rows are wide: channel by channel.
template <class T>
struct WideImage {
    T* p;
    const NormImage& image;
    const NormShape& s;

    __device__ WideImage(const NormImage& image, const NormShape& s, const Strip& strip)
        : p(static_cast<T*>(image.ptr) + strip.batch * image.batch + strip.first * image.token), image(image), s(s) {}
    __device__ __forceinline__ int64_t offset(int c) const {
        const int group = c / s.group_dim;
        return group * image.group + (c - group * s.group_dim);
    }
    __device__ __forceinline__ T& operator()(int t, int64_t at) const { return p[t * image.token + at]; }
    // Zeros after the channels of each group.
    __device__ void clear_pads(int tokens) const {
        const int pads = image.width - s.group_dim, all = pads * s.groups;
        for (int i = threadIdx.x; i < all * tokens; i += kNormThreads) {
            const int t = i / all, group = (i - t * all) / pads, d = s.group_dim + (i - t * all) % pads;
            p[t * image.token + group * image.group + d] = from_float<T>(0.f);
        }
    }
};

// What the images of a launch allow, the least of what each does (image.cuh).
enum class NormAccess {
    kAny,      // accesses of single elements too
    kWords,    // vectors; where an image is a residual stream with groups that start within a word, words
    kAligned,  // vectors alone
};

// From the plan at run time to template arguments: f(type tag of the tile, integral constant of the access); void for
// wide rows. Only the row widths of most models have kernels for other images than any. Among these, rows that fill at
// most three of a thread's four vectors (96, 192 or 348 channels) have kernels of three vectors, with a quarter fewer
// instructions, and those of a whole warp (348 channels), which instructions limit, have kernels that know this.
template <class T, bool kPixels = false, int kMaxVecs = kMaxRowVecs, class F>
cudaError_t dispatch_rows(const NormPlan& plan, const NormShape& s, NormAccess access, const F& f) {
    using Any = std::integral_constant<NormAccess, NormAccess::kAny>;
    using Words = std::integral_constant<NormAccess, NormAccess::kWords>;
    using Aligned = std::integral_constant<NormAccess, NormAccess::kAligned>;
    if (plan.vecs == 0) return f(TypeTag<void>{}, Any{});
    if constexpr (kMaxVecs > kRowVecs)
        if (plan.vecs > kRowVecs) return f(TypeTag<RowTile<kMaxVecs, 0>>{}, Any{});
    if (access == NormAccess::kAny || (!kPixels && access == NormAccess::kWords))
        return f(TypeTag<RowTile<kRowVecs, 0>>{}, Any{});
    if constexpr (sizeof(T) == 2) {
        const bool narrow = plan.narrow(s.slots()), warp = narrow && plan.lanes == 32;
        if (warp && access == NormAccess::kAligned) return f(TypeTag<RowTile<kRowVecs - 1, 32>>{}, Aligned{});
        // Rows that memory limits have one kernel for words and vectors.
        using Usual = std::conditional_t<kPixels, Words, Aligned>;
        if (warp) return f(TypeTag<RowTile<kRowVecs - 1, 32>>{}, Usual{});
        if (narrow) return f(TypeTag<RowTile<kRowVecs - 1, 0>>{}, Usual{});
        return f(TypeTag<RowTile<kRowVecs, 0>>{}, Usual{});
    } else {
        return f(TypeTag<RowTile<kRowVecs, 0>>{}, Aligned{});
    }
}

}  // namespace gm
