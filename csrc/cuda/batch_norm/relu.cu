// SPDX-License-Identifier: Apache-2.0
// BatchNorm with the statistics of the batch, followed by ReLU, on rows of channels. Every step is bound by memory:
// the forward reads x twice and writes y, the backward reads x and dy twice and writes dx. The mask of the ReLU is
// computed again from x.
//
//   z = (x - mean) weight / deviation + bias,  y = max(z, 0),  g = dy [z > 0]
//   dbias = sum of g,  dweight = sum of g (x - mean) / deviation
//   dx = weight / deviation (g - dbias / rows - (x - mean) dweight / (deviation rows))
//
// Sums: each thread over its rows, the block over its threads, one more launch over the blocks, all in a fixed order.
#include "cuda/batch_norm/launch.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/packed.cuh"
#include "cuda/common/reduce.cuh"

namespace gm {
namespace {

constexpr int kWide = kBatchNormUnit;  // channels of a thread: 16 bytes of a 16-bit type, 32 of float
constexpr int kThreads = kBatchNormThreads;
constexpr int kFinishColumns = 8, kFinishRows = 64;

using Channels = float[kWide];

// kWide adjacent channels: one access of 16 bytes, or two.
template <class T>
__device__ __forceinline__ void load(const T* p, Channels& out) {
    constexpr int kCount = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kWide; i += kCount) {
        float part[kCount];
        load_packed<kCount>(p + i, true).widen(part);
#pragma unroll
        for (int j = 0; j < kCount; ++j) out[i + j] = part[j];
    }
}

template <class T>
__device__ __forceinline__ void store(T* p, const Channels& x) {
    constexpr int kCount = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kWide; i += kCount) store_packed<kCount>(p + i, x + i, true);
}

// The rows of a block, and those of a thread, which owns kWide channels in every `step`-th row.
struct Walk {
    int channel, row_thread, step;
    bool active;
    int64_t begin, end;

    __device__ explicit Walk(const BatchNormArgs& args) {
        const int vectors = args.channels / kWide;
        step = kThreads / vectors;
        row_thread = threadIdx.x / vectors;
        channel = (threadIdx.x - row_thread * vectors) * kWide;
        active = row_thread < step;
        const int64_t rows = (args.rows + args.blocks - 1) / args.blocks;
        begin = min(blockIdx.x * rows, args.rows), end = min(begin + rows, args.rows);
    }
};

// What z of a channel is computed from.
template <class T>
struct Affine {
    Channels mean, scale, bias;

    __device__ Affine(const BatchNormArgs& args, int channel) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            mean[j] = args.stats[channel + j];
            scale[j] = args.stats[2 * args.channels + channel + j] * load_param<T>(args.weight, channel + j);
            bias[j] = load_param<T>(args.bias, channel + j);
        }
    }
    __device__ __forceinline__ float z(float x, int j) const { return fmaf(x - mean[j], scale[j], bias[j]); }
};

// Adds two sums for each channel over the block's threads and writes them as its row of args.partials.
__device__ __forceinline__ void leave_sums(const BatchNormArgs& args, const Walk& walk, const Channels& first,
                                           const Channels& second) {
    __shared__ float sums[2][kThreads * kWide];
    if (walk.active) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            const int at = walk.row_thread * args.channels + walk.channel + j;
            sums[0][at] = first[j], sums[1][at] = second[j];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * args.channels; i += kThreads) {
        const int k = i / args.channels, c = i - k * args.channels;
        float sum = 0.f;
        for (int r = 0; r < walk.step; ++r) sum += sums[k][r * args.channels + c];
        args.partials[static_cast<int64_t>(blockIdx.x) * 2 * args.channels + i] = sum;
    }
}

// Sums of x - x0 and of its square, where x0 is the first row: its distance from the mean is small compared with the
// deviation, or at most of its size, so the variance keeps its digits.
template <class T>
__global__ void __launch_bounds__(kThreads) batch_norm_sums_kernel(const __grid_constant__ BatchNormArgs args) {
    begin_kernel();
    const Walk walk(args);
    Channels sum = {}, squares = {};
    if (walk.active) {
        const T* const x = static_cast<const T*>(args.x) + walk.channel;
        Channels first;
        load(x, first);
#pragma unroll 4
        for (int64_t row = walk.begin + walk.row_thread; row < walk.end; row += walk.step) {
            Channels v;
            load(x + row * args.channels, v);
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                const float d = v[j] - first[j];
                sum[j] += d, squares[j] = fmaf(d, d, squares[j]);
            }
        }
    }
    leave_sums(args, walk, sum, squares);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) batch_norm_grad_sums_kernel(const __grid_constant__ BatchNormArgs args) {
    begin_kernel();
    const Walk walk(args);
    Channels sum = {}, products = {};
    if (walk.active) {
        const Affine<T> affine(args, walk.channel);
        const T* const x = static_cast<const T*>(args.x) + walk.channel;
        const T* const dy = static_cast<const T*>(args.dy) + walk.channel;
#pragma unroll 4
        for (int64_t row = walk.begin + walk.row_thread; row < walk.end; row += walk.step) {
            Channels v, g;
            load(x + row * args.channels, v), load(dy + row * args.channels, g);
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                if (affine.z(v[j], j) <= 0.f) g[j] = 0.f;
                sum[j] += g[j], products[j] = fmaf(g[j], v[j] - affine.mean[j], products[j]);
            }
        }
    }
    leave_sums(args, walk, sum, products);
}

// The two sums of a channel over the blocks: one thread for a channel and every kFinishRows-th block.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kFinishColumns* kFinishRows)
    batch_norm_finish_kernel(const __grid_constant__ BatchNormArgs args) {
    begin_kernel();
    __shared__ float sums[2][kFinishRows][kFinishColumns];
    const int x = threadIdx.x % kFinishColumns, y = threadIdx.x / kFinishColumns;
    const int channel = blockIdx.x * kFinishColumns + x;  // args.channels is a multiple of kFinishColumns
    float first = 0.f, second = 0.f;
#pragma unroll 8
    for (int i = y; i < args.blocks; i += kFinishRows) {
        const float* const row = args.partials + static_cast<int64_t>(i) * 2 * args.channels + channel;
        first += row[0], second += row[args.channels];
    }
    sums[0][y][x] = first, sums[1][y][x] = second;
    __syncthreads();
    if (y != 0) return;
    first = second = 0.f;
#pragma unroll 8
    for (int i = 0; i < kFinishRows; ++i) first += sums[0][i][x], second += sums[1][i][x];
    const float rows = static_cast<float>(args.rows);
    if constexpr (kBackward) {
        const float inverse = args.stats[2 * args.channels + channel];
        store_param<T>(args.dweight, channel, second * inverse);
        store_param<T>(args.dbias, channel, first);
        args.means[channel] = first / rows;
        args.means[args.channels + channel] = second * inverse * inverse / rows;
    } else {
        const float offset = first / rows;
        const float variance = fmaxf(fmaf(-offset, first, second), 0.f) / rows;
        args.stats[channel] = to_float(static_cast<const T*>(args.x)[channel]) + offset;
        args.stats[args.channels + channel] = variance * (rows / (rows - 1.f));
        args.stats[2 * args.channels + channel] = 1.f / sqrtf(variance + args.eps);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) batch_norm_apply_kernel(const __grid_constant__ BatchNormArgs args) {
    begin_kernel();
    const Walk walk(args);
    if (!walk.active) return;
    const Affine<T> affine(args, walk.channel);
    const T* const x = static_cast<const T*>(args.x) + walk.channel;
    T* const y = static_cast<T*>(args.y) + walk.channel;
#pragma unroll 4
    for (int64_t row = walk.begin + walk.row_thread; row < walk.end; row += walk.step) {
        Channels v;
        load(x + row * args.channels, v);
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            const float z = affine.z(v[j], j);
            v[j] = z < 0.f ? 0.f : z;  // NaN stays NaN
        }
        store(y + row * args.channels, v);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) batch_norm_grad_kernel(const __grid_constant__ BatchNormArgs args) {
    begin_kernel();
    const Walk walk(args);
    if (!walk.active) return;
    const Affine<T> affine(args, walk.channel);
    Channels mean_g, slope;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
        mean_g[j] = args.means[walk.channel + j];
        slope[j] = args.means[args.channels + walk.channel + j];
    }
    const T* const x = static_cast<const T*>(args.x) + walk.channel;
    const T* const dy = static_cast<const T*>(args.dy) + walk.channel;
    T* const dx = static_cast<T*>(args.dx) + walk.channel;
#pragma unroll 4
    for (int64_t row = walk.begin + walk.row_thread; row < walk.end; row += walk.step) {
        Channels v, g;
        load(x + row * args.channels, v), load(dy + row * args.channels, g);
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            if (affine.z(v[j], j) <= 0.f) g[j] = 0.f;
            v[j] = affine.scale[j] * fmaf(affine.mean[j] - v[j], slope[j], g[j] - mean_g[j]);
        }
        store(dx + row * args.channels, v);
    }
}

template <bool kBackward>
cudaError_t launch(const BatchNormArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto sums = kBackward ? batch_norm_grad_sums_kernel<T> : batch_norm_sums_kernel<T>;
        const auto apply = kBackward ? batch_norm_grad_kernel<T> : batch_norm_apply_kernel<T>;
        cudaError_t error = launch_kernel(sums, args.blocks, kThreads, 0, stream, args);
        if (error == cudaSuccess)
            error = launch_kernel(batch_norm_finish_kernel<T, kBackward>, args.channels / kFinishColumns,
                                  kFinishColumns * kFinishRows, 0, stream, args);
        if (error != cudaSuccess) return error;
        BatchNormArgs last = args;
        last.blocks = batch_norm_blocks(args.rows, args.channels,
                                        kBackward ? tuning::kBatchNormBwdBlocks : tuning::kBatchNormApply);
        return launch_kernel(apply, last.blocks, kThreads, 0, stream, last);
    });
}

}  // namespace

cudaError_t launch_batch_norm_relu_fwd(const BatchNormArgs& args, DType dtype, cudaStream_t stream) {
    return launch<false>(args, dtype, stream);
}

cudaError_t launch_batch_norm_relu_bwd(const BatchNormArgs& args, DType dtype, cudaStream_t stream) {
    return launch<true>(args, dtype, stream);
}

}  // namespace gm
