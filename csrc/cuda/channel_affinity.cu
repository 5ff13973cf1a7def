// SPDX-License-Identifier: Apache-2.0
// Channel affinity: gate = sigmoid(fc2(relu(fc1(pooled)))) and its backward, float32. A few kilobytes an image: what
// counts is latency, and that it is one launch forward (with the end of the pooling) and two backward.
#include <algorithm>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/reduce.cuh"

namespace gm {
namespace {

constexpr int kThreads = 256, kAffinityThreads = 512;  // forward: all hidden units of the field's widths at once

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kFullWarp, v, d);
    return v;
}

__device__ __forceinline__ int gate_index(const AffinityArgs& args, int m) {
    const int group = m / args.group_dim;
    return group * args.group_width + m - group * args.group_dim;
}

__device__ __forceinline__ int gate_width(const AffinityArgs& args) {
    return args.out_dim / args.group_dim * args.group_width;
}

constexpr int kGateLanes = 8;

// Mean over the image from the sums of its strips, into shared memory and args.pooled: `rows` threads a channel.
__device__ __forceinline__ void pool(const AffinityArgs& args, float* shared, float* rows_of_sums) {
    const int64_t image = blockIdx.x;
    const float* const from = args.partials + image * args.strips * args.dim;
    const int rows = max(kAffinityThreads / args.dim, 1), r = threadIdx.x / args.dim;
    for (int c = threadIdx.x - r * args.dim; r < rows && c < args.dim; c += kAffinityThreads) {
        float sum = 0.f;
#pragma unroll 8
        for (int i = r; i < args.strips; i += rows) sum += from[static_cast<int64_t>(i) * args.dim + c];
        rows_of_sums[r * args.dim + c] = sum;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < args.dim; c += kAffinityThreads) {
        float sum = 0.f;
        for (int i = 0; i < rows; ++i) sum += rows_of_sums[i * args.dim + c];
        shared[c] = args.pooled[image * args.dim + c] = sum * args.factor;
    }
}

// A block an image; a warp a hidden unit, then a thread a channel of the gate.
template <class T>
__global__ void __launch_bounds__(kAffinityThreads)
    channel_affinity_fwd_kernel(const __grid_constant__ AffinityArgs args) {
    extern __shared__ float shared[];  // pooled, hidden, sums by rows
    float* const hidden = shared + args.dim;
    const int64_t image = blockIdx.x;
    pool(args, shared, hidden + args.hidden);
    __syncthreads();
    for (int j = threadIdx.x / 32; j < args.hidden; j += kAffinityThreads / 32) {
        float sum = 0.f;
#pragma unroll 8
        for (int c = threadIdx.x % 32; c < args.dim; c += 32)
            sum = fmaf(shared[c], load_param<T>(args.fc1_weight, static_cast<int64_t>(j) * args.dim + c), sum);
        sum = fmaxf(warp_sum(sum) + load_param<T>(args.fc1_bias, j), 0.f);
        if (threadIdx.x % 32 == 0) {
            hidden[j] = sum;
            args.hidden_out[image * args.hidden + j] = sum;
        }
    }
    __syncthreads();
    const int width = gate_width(args);
    // kGateLanes threads share a channel's row of fc2: they read whole sectors.
    const int lane = threadIdx.x % kGateLanes;
    for (int first = 0; first < width; first += kAffinityThreads / kGateLanes) {
        const int i = first + threadIdx.x / kGateLanes;
        const int group = i / args.group_width, d = i - group * args.group_width;
        const bool real = i < width && d < args.group_dim;
        float sum = 0.f;
        if (real) {
            const int64_t row = static_cast<int64_t>(group * args.group_dim + d) * args.hidden;
#pragma unroll 8
            for (int j = lane; j < args.hidden; j += kGateLanes)
                sum = fmaf(hidden[j], load_param<T>(args.fc2_weight, row + j), sum);
        }
#pragma unroll
        for (int k = kGateLanes / 2; k > 0; k /= 2) sum += __shfl_xor_sync(kFullWarp, sum, k);
        if (lane != 0 || i >= width) continue;
        if (real) sum += load_param<T>(args.fc2_bias, group * args.group_dim + d);
        args.gate[image * width + i] = real ? 1.f / (1.f + expf(-sum)) : 0.f;
    }
}

// A block an image: gradients before the sigmoid and the relu, of the pooled image.
template <class T>
__global__ void __launch_bounds__(kThreads) channel_affinity_bwd_kernel(const __grid_constant__ AffinityArgs args) {
    extern __shared__ float shared[];  // gradient before the sigmoid, before the relu, and by rows of threads
    float* const hidden = shared + args.out_dim;
    float* const by_rows = hidden + args.hidden;
    const int64_t image = blockIdx.x;
    float* const scratch = args.scratch + image * (args.out_dim + args.hidden);
    const int width = gate_width(args);
    for (int m = threadIdx.x; m < args.out_dim; m += kThreads) {
        const int i = gate_index(args, m);
        const float gate = args.gate[image * width + i];
        const float* const from = args.dgate + image * args.dgate_parts * args.dgate_stride + i;
        float sum = 0.f;
#pragma unroll 8
        for (int k = 0; k < args.dgate_parts; ++k) sum += from[k * args.dgate_stride];
        scratch[m] = shared[m] = sum * gate * (1.f - gate);
    }
    __syncthreads();
    // Neighbouring threads take neighbouring hidden units, rows of threads every so-manieth channel.
    const int rows = max(kThreads / args.hidden, 1), r = threadIdx.x / args.hidden;
    for (int j = threadIdx.x - r * args.hidden; r < rows && j < args.hidden; j += kThreads) {
        float sum = 0.f;
#pragma unroll 8
        for (int m = r; m < args.out_dim; m += rows)
            sum = fmaf(shared[m], load_param<T>(args.fc2_weight, static_cast<int64_t>(m) * args.hidden + j), sum);
        by_rows[r * args.hidden + j] = sum;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < args.hidden; j += kThreads) {
        float sum = 0.f;
        for (int i = 0; i < rows; ++i) sum += by_rows[i * args.hidden + j];
        if (args.hidden_out[image * args.hidden + j] <= 0.f) sum = 0.f;
        scratch[args.out_dim + j] = hidden[j] = sum;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < args.dim; c += kThreads) {
        float sum = 0.f;
#pragma unroll 8
        for (int j = 0; j < args.hidden; ++j)
            sum = fmaf(hidden[j], load_param<T>(args.fc1_weight, static_cast<int64_t>(j) * args.dim + c), sum);
        args.dpooled[image * args.dim + c] = sum;
    }
}

constexpr int kSumThreads = 8;

// kSumThreads threads a parameter, for every kSumThreads-th image each.
template <class T>
__global__ void __launch_bounds__(kReduceColumns* kSumThreads)
    channel_affinity_weights_kernel(const __grid_constant__ AffinityArgs args) {
    __shared__ float shared[kSumThreads][kReduceColumns];
    int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
    const int64_t row = args.out_dim + args.hidden;
    const int64_t first = static_cast<int64_t>(args.hidden) * args.dim;
    const int64_t second = static_cast<int64_t>(args.out_dim) * args.hidden;
    // gradient[b * row] times with[b * with_row], summed over the images b
    const float *gradient = args.scratch, *with = nullptr;
    int64_t with_row = 0;
    ParamOut out;
    if (i < first) {
        const int64_t j = i / args.dim;
        gradient += args.out_dim + j, with = args.pooled + i - j * args.dim, with_row = args.dim;
        out = args.dfc1_weight;
    } else if ((i -= first) < second) {
        const int64_t m = i / args.hidden;
        gradient += m, with = args.hidden_out + i - m * args.hidden, with_row = args.hidden;
        out = args.dfc2_weight;
    } else if ((i -= second) < args.hidden) {
        gradient += args.out_dim + i;
        out = args.dfc1_bias;
    } else if ((i -= args.hidden) < args.out_dim) {
        gradient += i;
        out = args.dfc2_bias;
    }
    float sum = 0.f;
    if (out.ptr != nullptr) {
#pragma unroll 4
        for (int b = threadIdx.y; b < args.batch; b += kSumThreads)
            sum = fmaf(gradient[b * row], with == nullptr ? 1.f : with[b * with_row], sum);
    }
    sum = row_sum(sum, shared);
    if (threadIdx.y == 0) store_param<T>(out, i, sum);
}

}  // namespace

cudaError_t launch_channel_affinity_fwd(const AffinityArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        const int sums = std::max(kAffinityThreads / args.dim, 1) * args.dim;
        return launch_kernel(channel_affinity_fwd_kernel<typename decltype(tag)::type>, args.batch, kAffinityThreads,
                             sizeof(float) * (args.dim + args.hidden + sums), stream, args);
    });
}

cudaError_t launch_channel_affinity_bwd(const AffinityArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t parameters = static_cast<int64_t>(args.hidden) * (args.dim + args.out_dim + 1) + args.out_dim;
    const int sums = std::max(kThreads / args.hidden, 1) * args.hidden;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const cudaError_t error = launch_kernel(channel_affinity_bwd_kernel<T>, args.batch, kThreads,
                                                sizeof(float) * (args.out_dim + args.hidden + sums), stream, args);
        if (error != cudaSuccess) return error;
        const int64_t blocks = (parameters + kReduceColumns - 1) / kReduceColumns;
        channel_affinity_weights_kernel<T>
            <<<static_cast<unsigned>(blocks), dim3(kReduceColumns, kSumThreads), 0, stream>>>(args);
        return cudaGetLastError();
    });
}

}  // namespace gm
