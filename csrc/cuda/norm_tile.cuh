// SPDX-License-Identifier: Apache-2.0
// How a block of the LayerNorm kernels holds its tokens, their statistics, and sums over tokens in a fixed order.
//
// Products that are added elsewhere are rounded explicitly (__fmul_rn): left to itself the compiler fuses some of them
// in one instantiation and not in the other, and results would depend on the alignment of the inputs.
#pragma once

#include "cuda/norm_plan.h"
#include "cuda/packed.cuh"

namespace gm {

constexpr int kNormWarps = kNormThreads / 32;

// Strip of tokens of one image that a block walks.
struct Strip {
    int64_t batch, number;  // number: of all images' strips
    int first, end;

    __device__ Strip(const NormShape& s, const NormPlan& plan) : number(blockIdx.x) {
        batch = number / plan.strips;
        const int64_t begin = (number - batch * plan.strips) * plan.strip_tokens;
        first = static_cast<int>(begin);
        end = static_cast<int>(min(begin + plan.strip_tokens, s.tokens));
    }
};

// A thread's tokens and channels: `lanes` neighbouring threads share a token, kVecs vectors of 4 channels each, and go
// through kRows tokens at a time (a sweep). kAligned: images of whole tokens allow aligned vectors, and a vector exists
// or not as a whole.
template <int kVecs, bool kAligned>
struct RowTile {
    static constexpr int kRows = norm_rows(kVecs), kVectors = kVecs;
    static constexpr int kWidth = kVecs * 32 * kVec;  // at least the channels of a token
    using Values = float[kRows][kVecs][kVec];
    using Sums = float[kVecs][kVec];  // of one value a channel over all tokens of the thread

    int dim, lanes, lane, row, rows;
    bool exists[kRows];  // tokens of the sweep

    __device__ RowTile(const NormShape& s, const NormPlan& plan)
        : dim(s.dim),
          lanes(kVecs > 1 ? 32 : plan.lanes),
          lane(threadIdx.x & (lanes - 1)),
          row(threadIdx.x / lanes),
          rows(kNormThreads / lanes) {}
    __device__ __forceinline__ int channel(int v) const { return v * 32 * kVec + lane * kVec; }
    __device__ __forceinline__ bool valid(int v, int j = 0) const { return channel(v) + (kAligned ? 0 : j) < dim; }
    // `left` tokens of the strip are to come.
    __device__ __forceinline__ void sweep(int left) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) exists[r] = r * rows + row < left;
    }

    // The thread's tokens of the sweep as they are stored, 0 where there is nothing. `at(r, v)` points at the first
    // channel of a vector, `at_each(r, v, j)` at any.
    template <class T>
    using Stored = Packed<T, kVec>[kRows][kVecs];

    template <class At, class T>
    __device__ __forceinline__ void load(const At& at, Packed<T, kVec> (&out)[kRows][kVecs]) const {
        if constexpr (kAligned) {
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int v = 0; v < kVecs; ++v) out[r][v] = load_packed<kVec>(at(r, v), exists[r] && valid(v));
        } else {
            load_each([&](int r, int v, int j) { return at(r, v) + j; }, out);
        }
    }
    template <class AtEach, class T>
    __device__ __forceinline__ void load_each(const AtEach& at_each, Packed<T, kVec> (&out)[kRows][kVecs]) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                T elements[kVec];
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    elements[j] = exists[r] && valid(v, j) ? *at_each(r, v, j) : from_float<T>(0.f);
                memcpy(&out[r][v], elements, sizeof(elements));
            }
    }
    template <class T>
    static __device__ __forceinline__ void widen(const Packed<T, kVec> (&in)[kRows][kVecs], Values& out) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int v = 0; v < kVecs; ++v) in[r][v].widen(out[r][v]);
    }
    template <class At>
    __device__ __forceinline__ void store(const At& at, const Values& x) const {
        if constexpr (kAligned) {
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int v = 0; v < kVecs; ++v) store_packed<kVec>(at(r, v), x[r][v], exists[r] && valid(v));
        } else {
            store_each([&](int r, int v, int j) { return at(r, v) + j; }, x);
        }
    }
    template <class AtEach>
    __device__ __forceinline__ void store_each(const AtEach& at_each, const Values& x) const {
        using T = std::remove_pointer_t<decltype(at_each(0, 0, 0))>;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (exists[r] && valid(v, j)) *at_each(r, v, j) = from_float<T>(x[r][v][j]);
    }

    // Sums over the lanes that share a token; all of them get it.
    template <int kCount>
    __device__ __forceinline__ void lane_sums(float (&x)[kCount]) const {
        for (int d = lanes >> 1; d > 0; d >>= 1)
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kFullWarp, x[i], d);
    }

    // x becomes (x - mean) / sqrt(variance + eps) over the channels of each token, 0 where there is nothing. The
    // variance is that of the centred values: large means do not cancel.
    __device__ __forceinline__ void normalise(float eps, Values& x, float (&inverse_std)[kRows]) const {
        const float inverse_dim = 1.f / dim;
        float sum[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            sum[r] = 0.f;
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum[r] += x[r][v][j];
        }
        lane_sums(sum);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float mean = __fmul_rn(sum[r], inverse_dim);
            sum[r] = 0.f;
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                const float shift = valid(v) ? mean : 0.f;
#pragma unroll
                for (int j = 0; j < kVec; ++j) x[r][v][j] -= kAligned || valid(v, j) ? shift : 0.f;
            }
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum[r] = fmaf(x[r][v][j], x[r][v][j], sum[r]);
        }
        lane_sums(sum);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            inverse_std[r] = exists[r] ? rsqrtf(fmaf(sum[r], inverse_dim, eps)) : 0.f;
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j) x[r][v][j] = __fmul_rn(x[r][v][j], inverse_std[r]);
        }
    }

    // The gradient through the norm: h, the gradient of the normalised values, becomes
    // (h - mean(h) - normed * mean(h * normed)) / sqrt(variance + eps).
    __device__ __forceinline__ void normalise_backward(const Values& normed, const float (&inverse_std)[kRows],
                                                       Values& h) const {
        const float inverse_dim = 1.f / dim;
        float means[2 * kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float plain = 0.f, product = 0.f;
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    plain += h[r][v][j];
                    product = fmaf(h[r][v][j], normed[r][v][j], product);
                }
            means[2 * r] = plain;
            means[2 * r + 1] = product;
        }
        lane_sums(means);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float plain = __fmul_rn(means[2 * r], inverse_dim),
                        product = __fmul_rn(means[2 * r + 1], inverse_dim);
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    h[r][v][j] = inverse_std[r] * (h[r][v][j] - fmaf(normed[r][v][j], product, plain));
        }
    }

    // Sums of one value a channel over the block's tokens: `store(channel, sum)`.
    template <class Store>
    __device__ void block_sums(Sums& sums, float (*shared)[kWidth], const Store& store) const {
        for (int d = lanes; d < 32; d <<= 1)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j) sums[v][j] += __shfl_xor_sync(kFullWarp, sums[v][j], d);
        __syncthreads();
        if ((threadIdx.x & 31) < lanes)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                *reinterpret_cast<float4*>(&shared[threadIdx.x >> 5][channel(v)]) =
                    make_float4(sums[v][0], sums[v][1], sums[v][2], sums[v][3]);
        __syncthreads();
        for (int c = threadIdx.x; c < dim; c += kNormThreads) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kNormWarps; ++w) sum += shared[w][c];
            store(c, sum);
        }
    }
};

// A thread's tokens of an image, sweep after sweep.
template <class T>
struct Cursor {
    T* p;            // the thread's first token of the sweep
    int64_t stride;  // to the thread's next token
    int64_t step;    // to the next sweep

    template <class Tile>
    __device__ Cursor(const ImageArg& image, const Strip& strip, const Tile& tile, int channel)
        : p(static_cast<T*>(image.ptr) + strip.batch * image.batch + (strip.first + tile.row) * image.token + channel),
          stride(tile.rows * image.token),
          step(Tile::kRows * stride) {}
    __device__ __forceinline__ void advance() { p += step; }
    __device__ __forceinline__ T* token(int r) const { return p + r * stride; }
    __device__ __forceinline__ T* at(int r, int v) const { return token(r) + v * 32 * kVec; }  // `v`th vector
};

// A few floats of every channel in shared memory; 0 for channels that do not exist.
template <int kRows, int kWidth>
struct alignas(16) ChannelRows {
    float rows[kRows][kWidth];

    // `value(channel, row values)`; the caller's __syncthreads makes the table visible.
    template <class F>
    __device__ void fill(int dim, const F& value) {
        for (int c = threadIdx.x; c < kWidth; c += blockDim.x) {
            float row[kRows] = {};
            if (c < dim) value(c, row);
#pragma unroll
            for (int i = 0; i < kRows; ++i) rows[i][c] = row[i];
        }
    }
    // volatile: read where it is used, not once before the loop into registers that the tokens need.
    __device__ __forceinline__ void get(int row, int channel, float (&out)[kVec]) const {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
                     : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&rows[row][channel]))));
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

// Of a block's tokens: statistics, and means of the gradient and of its product with the normed values.
struct WideRows {
    float mean[kWideTokens], inverse_std[kWideTokens], plain[kWideTokens], product[kWideTokens];

    // `value(token, channel)`; by whole warps, token by token.
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
    // `gradient(token, channel)` of the normed values.
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

// Run-time plan to template arguments: f(std::integral_constant<int, vecs>, std::bool_constant<aligned>); 0 vectors for
// wide rows, whatever their alignment.
template <int kMaxVecs = kMaxRowVecs, class F>
cudaError_t dispatch_rows(int vecs, bool aligned, const F& f) {
    const auto with = [&](auto count) { return aligned ? f(count, std::true_type{}) : f(count, std::false_type{}); };
    switch (vecs) {
        case 0: return f(std::integral_constant<int, 0>{}, std::false_type{});
        case 1: return with(std::integral_constant<int, 1>{});
        case 2: return with(std::integral_constant<int, 2>{});
        case 4: return with(std::integral_constant<int, 4>{});
        default: return with(std::integral_constant<int, kMaxVecs>{});
    }
}

}  // namespace gm
