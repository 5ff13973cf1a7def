// SPDX-License-Identifier: Apache-2.0
// Second stage of parameter sums: adds the rows of a matrix of partial sums in a fixed order, so that results are
// bitwise repeatable.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/parameters/launch.h"

namespace gm {
namespace {

// The columns of a block are one 32-byte sector of a row. Latency of loads counts, so the rows are shared by as many
// threads as there are, each with 8 loads in flight.
constexpr int kColumns = 8, kMaxRowThreads = 128, kWarpRows = 32 / kColumns;

template <class T>
__global__ void __launch_bounds__(kColumns* kMaxRowThreads)
    reduce_columns_kernel(const __grid_constant__ ReduceArgs args) {
    begin_kernel();
    __shared__ float warps[kMaxRowThreads / kWarpRows][kColumns];
    const int64_t column_blocks = (args.columns + kColumns - 1) / kColumns;
    const int64_t segment = blockIdx.x / column_blocks;
    const int64_t column = (blockIdx.x - segment * column_blocks) * kColumns + threadIdx.x;
    const float* p = args.partials + (segment * args.rows + threadIdx.y) * args.row_stride + column;
    const int64_t step = blockDim.y * args.row_stride;
    float sum = 0.f;
    if (column < args.columns) {
        int64_t left = args.rows - threadIdx.y;
        constexpr int kAhead = 8;
        for (; left > (kAhead - 1) * int64_t{blockDim.y}; left -= kAhead * int64_t{blockDim.y}, p += kAhead * step) {
            float x[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) x[i] = p[i * step];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) sum += x[i];
        }
        for (; left > 0; left -= blockDim.y, p += step) sum += *p;
    }
#pragma unroll
    for (int d = kColumns; d < 32; d *= 2) sum += __shfl_xor_sync(kFullWarp, sum, d);
    const int row_warps = blockDim.y / kWarpRows;
    if (threadIdx.y % kWarpRows == 0) warps[threadIdx.y / kWarpRows][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0) return;
    sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < row_warps; ++i) sum += warps[i][threadIdx.x];
    sum *= args.factor;
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
    const int64_t blocks = (args.columns + kColumns - 1) / kColumns * args.segments;
    int rows = kWarpRows;
    while (rows < kMaxRowThreads && rows < args.rows) rows *= 2;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch_kernel(reduce_columns_kernel<T>, blocks, dim3(kColumns, rows), 0, stream, args);
    });
}

}  // namespace gm
