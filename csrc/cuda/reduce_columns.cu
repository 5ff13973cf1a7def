// SPDX-License-Identifier: Apache-2.0
// Second stage of parameter sums: adds the rows of a matrix of partial sums in a fixed order, so that results are
// bitwise repeatable.
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace gm {
namespace {

constexpr int kMaxRowThreads = 32;

template <class T>
__global__ void __launch_bounds__(kReduceColumns* kMaxRowThreads)
    reduce_columns_kernel(const __grid_constant__ ReduceArgs args) {
    __shared__ float shared[kMaxRowThreads][kReduceColumns];
    const int64_t column_blocks = (args.columns + kReduceColumns - 1) / kReduceColumns;
    const int64_t segment = blockIdx.x / column_blocks;
    const int64_t column = (blockIdx.x - segment * column_blocks) * kReduceColumns + threadIdx.x;
    const float* p = args.partials + segment * args.rows * args.row_stride + column;
    float sum = 0.f;
    if (column < args.columns) {
#pragma unroll 8
        for (int64_t i = threadIdx.y; i < args.rows; i += blockDim.y) sum += p[i * args.row_stride];
    }
    sum = row_sum(sum, shared) * args.factor;
    if (threadIdx.y != 0) return;
    int64_t first = 0;
#pragma unroll
    for (int i = 0; i < kReduceTargets; ++i) {
        const int64_t count = args.counts[i];
        if (column >= first && column < first + count)
            store_param<T>(args.targets[i], segment * count + column - first, sum);
        first += count;
    }
}

}  // namespace

cudaError_t launch_reduce_columns(const ReduceArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t blocks = (args.columns + kReduceColumns - 1) / kReduceColumns * args.segments;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    int rows = 1;
    while (rows < kMaxRowThreads && rows < args.rows) rows *= 2;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        reduce_columns_kernel<T><<<static_cast<unsigned>(blocks), dim3(kReduceColumns, rows), 0, stream>>>(args);
        return cudaGetLastError();
    });
}

}  // namespace gm
