// SPDX-License-Identifier: Apache-2.0
// Channel affinity: gate = sigmoid(fc2(relu(fc1(pooled)))) and its backward, float32. It is a few kilobytes an image,
// so latency counts: one launch forward (which also finishes the pooling) and two backward.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "cuda/channel_affinity/launch.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/ptx/cp_async.cuh"
#include "cuda/common/reduce.cuh"

namespace gm {
namespace {

// One block for an image. What counts is how many accesses follow one another, so as many threads as possible share
// each step, four columns at once where rows allow that, and the copies of the weights to shared memory start first.
constexpr int kAffinityThreads = 512;

// Copies one parameter to shared memory, 16 bytes at a time where its address and size allow it.
__device__ __forceinline__ void copy_parameter(unsigned char* to, const unsigned char* from, int bytes) {
    const bool by_16 = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    const int unit = by_16 ? 16 : 4;
#pragma unroll 1
    for (int i = threadIdx.x * unit; i < bytes; i += kAffinityThreads * unit) {
        if (by_16) {
            cp_async_16(to + i, from + i, true);
        } else {
            cp_async_4(to + i, from + i);
        }
    }
}

// The weights and biases as a block reads them: in `shared`, where the copies just started put them, or in place where
// args.staged_bytes is 0. The caller waits for the copies.
struct Weights {
    ParamArg fc1_weight, fc2_weight, fc1_bias, fc2_bias;

    static __device__ __forceinline__ Weights of(const AffinityArgs& args, float* shared) {
        Weights w{args.fc1_weight, args.fc2_weight, args.fc1_bias, args.fc2_bias};
        if (args.staged_bytes == 0) return w;
        auto* const to = reinterpret_cast<unsigned char*>(shared);
#pragma unroll 1
        for (int k = 0; k < args.staged_count; ++k)
            copy_parameter(to + args.staged[k].at, static_cast<const unsigned char*>(args.staged[k].from),
                           args.staged[k].bytes);
        cp_async_commit();
        w.fc1_weight.ptr = to, w.fc2_weight.ptr = to + args.staged[1].at;
        if (args.staged_count > 2) w.fc1_bias.ptr = to + args.staged[2].at, w.fc2_bias.ptr = to + args.staged[3].at;
        return w;
    }
};

// Decides what Weights copies in a block that has `bytes_besides`: nothing where parameters are not whole 32-bit words
// or the device has no room for them.
void stage_weights(AffinityArgs& args, DType dtype, bool biases, int bytes_besides) {
    int room = 0;
    if (device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, room) != cudaSuccess) return;
    const std::pair<const ParamArg*, int64_t> parameters[] = {
        {&args.fc1_weight, static_cast<int64_t>(args.hidden) * args.dim},
        {&args.fc2_weight, static_cast<int64_t>(args.hidden) * args.out_dim},
        {&args.fc1_bias, args.hidden},
        {&args.fc2_bias, args.out_dim}};
    const int count = biases ? 4 : 2;
    int64_t at = 0;
    for (int k = 0; k < count; ++k) {
        const auto [parameter, elements] = parameters[k];
        const int64_t bytes = elements * (parameter->is_float || dtype == DType::kFloat ? 4 : 2);
        if (bytes % 4 != 0 || reinterpret_cast<uintptr_t>(parameter->ptr) % 4 != 0 || bytes > room) return;
        args.staged[k] = {parameter->ptr, static_cast<int>(at), static_cast<int>(bytes)};
        at += (bytes + 15) / 16 * 16;
    }
    if (bytes_besides + at > room) return;
    args.staged_bytes = static_cast<int>(at), args.staged_count = count;
}

__device__ __forceinline__ int gate_index(const AffinityArgs& args, int m) {
    const int group = m / args.group_dim;
    return group * args.group_width + m - group * args.group_dim;
}

__device__ __forceinline__ int gate_width(const AffinityArgs& args) {
    return args.out_dim / args.group_dim * args.group_width;
}

template <int kWidth>
struct Floats {
    float v[kWidth];
};

// Row `row` of a weight, read kWidth adjacent elements at a time.
template <class T, int kWidth>
struct WeightRow {
    const void* p;
    bool is_float;

    __device__ __forceinline__ WeightRow(const ParamArg& w, int row, int columns)
        : p(static_cast<const char*>(w.ptr) +
            static_cast<int64_t>(row) * columns * (is_float_of(w) ? sizeof(float) : sizeof(T))),
          is_float(is_float_of(w)) {}
    __device__ __forceinline__ Floats<kWidth> load(int i) const {
        Floats<kWidth> out;
        if constexpr (kWidth == 1) {
            out.v[0] = is_float ? static_cast<const float*>(p)[i] : to_float(static_cast<const T*>(p)[i]);
        } else if (is_float) {
            to_floats(*reinterpret_cast<const Vec4<float>*>(static_cast<const float*>(p) + i), out.v);
        } else {
            to_floats(*reinterpret_cast<const Vec4<T>*>(static_cast<const T*>(p) + i), out.v);
        }
        return out;
    }

private:
    // With T = float, which the launchers choose where all parameters are float, no load has to ask.
    static __device__ __forceinline__ bool is_float_of(const ParamArg& w) {
        return std::is_same_v<T, float> || w.is_float;
    }
};

template <class T>
__device__ __forceinline__ bool rows_of_four(const ParamArg& w, int columns) {
    const size_t size = w.is_float ? sizeof(float) : sizeof(T);
    return columns % kVec == 0 && reinterpret_cast<uintptr_t>(w.ptr) % (kVec * size) == 0;
}

// emit(row, w[row] x) for w (rows, columns): a power of two of lanes for each row, each with about eight loads.
template <class T, int kWidth, class Emit>
__device__ __forceinline__ void row_products(const ParamArg& w, int rows, int columns, const float* x,
                                             const Emit& emit) {
    int shift = 0;
    while (shift < 5 && (kWidth * 8) << shift < columns) ++shift;
    const int lanes = 1 << shift, lane = threadIdx.x & (lanes - 1);
#pragma unroll 1
    for (int first = 0; first < rows; first += kAffinityThreads >> shift) {  // the same for all threads, which shuffle
        const int row = first + (threadIdx.x >> shift);
        float sum = 0.f;
        if (row < rows) {
            const WeightRow<T, kWidth> weights(w, row, columns);
#pragma unroll 1
            for (int c = lane * kWidth; c < columns; c += kWidth << shift) {
                const Floats<kWidth> weight = weights.load(c);
                float v[kWidth];
                if constexpr (kWidth == kVec) {
                    to_floats(*reinterpret_cast<const Vec4<float>*>(x + c), v);
                } else {
                    v[0] = x[c];
                }
#pragma unroll
                for (int k = 0; k < kWidth; ++k) sum = fmaf(weight.v[k], v[k], sum);
            }
        }
#pragma unroll 1
        for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kFullWarp, sum, d);
        if (row < rows && lane == 0) emit(row, sum);
    }
}

// emit(column, sum over rows of x[row] w[row, column]): rows of threads share a column. `scratch` has a float for
// kWidth columns of every thread, or for all columns.
template <class T, int kWidth, class Emit>
__device__ __forceinline__ void column_products(const ParamArg& w, int rows, int columns, const float* x,
                                                float* scratch, const Emit& emit) {
    const int vectors = columns / kWidth, thread_rows = max(kAffinityThreads / vectors, 1);
    const int r = threadIdx.x / vectors;
    for (int i = threadIdx.x - r * vectors; r < thread_rows && i < vectors; i += kAffinityThreads) {
        float sum[kWidth] = {};
#pragma unroll 4
        for (int row = r; row < rows; row += thread_rows) {
            const Floats<kWidth> weight = WeightRow<T, kWidth>(w, row, columns).load(i * kWidth);
#pragma unroll
            for (int k = 0; k < kWidth; ++k) sum[k] = fmaf(weight.v[k], x[row], sum[k]);
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) scratch[r * columns + i * kWidth + k] = sum[k];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += kAffinityThreads) {
        float sum = 0.f;
        for (int i = 0; i < thread_rows; ++i) sum += scratch[i * columns + c];
        emit(c, sum);
    }
    __syncthreads();
}

// Floats that column_products needs for so many columns.
int product_scratch(int columns) { return std::max(kAffinityThreads * kVec, columns); }

template <class T, class Emit>
__device__ __forceinline__ void row_products(const ParamArg& w, int rows, int columns, const float* x,
                                             const Emit& emit) {
    if (rows_of_four<T>(w, columns)) {
        row_products<T, kVec>(w, rows, columns, x, emit);
    } else {
        row_products<T, 1>(w, rows, columns, x, emit);
    }
}

template <class T, class Emit>
__device__ __forceinline__ void column_products(const ParamArg& w, int rows, int columns, const float* x,
                                                float* scratch, const Emit& emit) {
    if (rows_of_four<T>(w, columns)) {
        column_products<T, kVec>(w, rows, columns, x, scratch, emit);
    } else {
        column_products<T, 1>(w, rows, columns, x, scratch, emit);
    }
}

__host__ __device__ __forceinline__ int whole_vectors(int floats) { return (floats + kVec - 1) / kVec * kVec; }

// emit(column, sum over `count` rows, `stride` floats apart, of from[at(column)]): all threads of the block share the
// columns, each with eight loads in flight. `scratch` has a float for every thread, or for every column.
template <class At, class Emit>
__device__ __forceinline__ void sum_rows(const float* from, int count, int64_t stride, int columns, float* scratch,
                                         const At& at, const Emit& emit) {
    constexpr int kAhead = 8;
    const int rows = max(kAffinityThreads / columns, 1), r = threadIdx.x / columns;
#pragma unroll 1
    for (int c = threadIdx.x - r * columns; r < rows && c < columns; c += kAffinityThreads) {
        const float* next = from + r * stride + at(c);
        float sum = 0.f;
#pragma unroll 1
        for (int left = count - r; left > 0; left -= kAhead * rows) {
            float v[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k, next += rows * stride) v[k] = k * rows < left ? *next : 0.f;
#pragma unroll
            for (int k = 0; k < kAhead; ++k) sum += v[k];
        }
        scratch[r * columns + c] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < columns; c += kAffinityThreads) {
        float sum = 0.f;
#pragma unroll 1
        for (int i = 0; i < rows; ++i) sum += scratch[i * columns + c];
        emit(c, sum);
    }
}

template <class T>
__global__ void __launch_bounds__(kAffinityThreads, 1)
    channel_affinity_fwd_kernel(const __grid_constant__ AffinityArgs args) {
    begin_kernel();
    extern __shared__ float4 dynamic_shared[];  // weights, pooled, hidden, sums by rows
    float* const shared = reinterpret_cast<float*>(dynamic_shared);
    float* const pooled = shared + args.staged_bytes / sizeof(float);
    float* const hidden = pooled + whole_vectors(args.dim);
    const int64_t image = blockIdx.x;
    const Weights weights = Weights::of(args, shared);
    const auto own = [](int c) { return c; };
    sum_rows(args.partials + image * args.strips * args.dim, args.strips, args.dim, args.dim, hidden + args.hidden, own,
             [&](int c, float sum) { pooled[c] = args.pooled[image * args.dim + c] = sum * args.factor; });
    cp_async_wait<0>();
    __syncthreads();
    row_products<T>(weights.fc1_weight, args.hidden, args.dim, pooled, [&](int j, float sum) {
        hidden[j] = args.hidden_out[image * args.hidden + j] = fmaxf(sum + load_param<T>(weights.fc1_bias, j), 0.f);
    });
    __syncthreads();
    float* const gate = args.gate + image * gate_width(args);
    row_products<T>(weights.fc2_weight, args.out_dim, args.hidden, hidden, [&](int m, float sum) {
        gate[gate_index(args, m)] = 1.f / (1.f + expf(-sum - load_param<T>(weights.fc2_bias, m)));
    });
    const int pads = args.group_width - args.group_dim;
#pragma unroll 1
    for (int i = threadIdx.x; i < args.out_dim / args.group_dim * pads; i += kAffinityThreads)
        gate[i / pads * args.group_width + args.group_dim + i % pads] = 0.f;
}

// Gradients before the sigmoid and the relu, and of the pooled image.
template <class T>
__global__ void __launch_bounds__(kAffinityThreads, 1)
    channel_affinity_bwd_kernel(const __grid_constant__ AffinityArgs args) {
    begin_kernel();
    extern __shared__ float4
        dynamic_shared[];  // weights, gradient before the sigmoid, before the relu, sum_rows or column_products
    float* const shared = reinterpret_cast<float*>(dynamic_shared);
    float* const before_sigmoid = shared + args.staged_bytes / sizeof(float);
    float* const hidden = before_sigmoid + args.out_dim;
    const Weights weights = Weights::of(args, shared);
    float* const sums = hidden + args.hidden;
    const int64_t image = blockIdx.x;
    float* const scratch = args.scratch + image * (args.out_dim + args.hidden);
    const int width = gate_width(args);
    const auto in_gate = [&](int m) { return gate_index(args, m); };
    sum_rows(args.dgate + image * args.dgate_parts * args.dgate_stride, args.dgate_parts, args.dgate_stride,
             args.out_dim, sums, in_gate, [&](int m, float sum) {
                 const float gate = args.gate[image * width + gate_index(args, m)];
                 scratch[m] = before_sigmoid[m] = sum * gate * (1.f - gate);
             });
    cp_async_wait<0>();
    __syncthreads();
    column_products<T>(weights.fc2_weight, args.out_dim, args.hidden, before_sigmoid, sums, [&](int j, float sum) {
        if (args.hidden_out[image * args.hidden + j] <= 0.f) sum = 0.f;
        scratch[args.out_dim + j] = hidden[j] = sum;
    });
    column_products<T>(weights.fc1_weight, args.hidden, args.dim, hidden, sums,
                       [&](int c, float sum) { args.dpooled[image * args.dim + c] = sum; });
}

constexpr int kSumThreads = 8;

// kSumThreads threads for each parameter, each for every kSumThreads-th image.
template <class T>
__global__ void __launch_bounds__(kReduceColumns* kSumThreads)
    channel_affinity_weights_kernel(const __grid_constant__ AffinityArgs args) {
    begin_kernel();
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

DType dtype_of_parameters(const AffinityArgs& args, DType of_images) {
    const bool all =
        args.fc1_weight.is_float && args.fc1_bias.is_float && args.fc2_weight.is_float && args.fc2_bias.is_float;
    return all ? DType::kFloat : of_images;
}

}  // namespace

cudaError_t launch_channel_affinity_fwd(const AffinityArgs& given, DType of_images, cudaStream_t stream) {
    AffinityArgs args = given;
    const DType dtype = dtype_of_parameters(args, of_images);
    const int sums = std::max(kAffinityThreads / args.dim, 1) * args.dim;
    const int shared = static_cast<int>(sizeof(float)) * (whole_vectors(args.dim) + args.hidden + sums);
    stage_weights(args, dtype, true, shared);
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(channel_affinity_fwd_kernel<typename decltype(tag)::type>, args.batch, kAffinityThreads,
                             args.staged_bytes + shared, stream, args);
    });
}

cudaError_t launch_channel_affinity_bwd(const AffinityArgs& given, DType of_images, cudaStream_t stream) {
    AffinityArgs args = given;
    const DType dtype = dtype_of_parameters(args, of_images);
    const int64_t parameters = static_cast<int64_t>(args.hidden) * (args.dim + args.out_dim + 1) + args.out_dim;
    const int sums = product_scratch(std::max({args.hidden, args.dim, args.out_dim}));
    const int shared = static_cast<int>(sizeof(float)) * (args.out_dim + args.hidden + sums);
    stage_weights(args, dtype, false, shared);
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const cudaError_t error = launch_kernel(channel_affinity_bwd_kernel<T>, args.batch, kAffinityThreads,
                                                args.staged_bytes + shared, stream, args);
        if (error != cudaSuccess) return error;
        const int64_t blocks = (parameters + kReduceColumns - 1) / kReduceColumns;
        return launch_kernel(channel_affinity_weights_kernel<T>, blocks, dim3(kReduceColumns, kSumThreads), 0, stream,
                             args);
    });
}

}  // namespace gm
