// SPDX-License-Identifier: Apache-2.0
// Second stage of the parameter gradients of the scan's backward: adds the rows of `partials` over (batch, part) in a
// fixed order, so that results are bitwise repeatable.
//
// With p_b and q_b the sums over an image of g silu(z) norm(y) and g silu(z):
//   dgate_b = norm_weight p_b + norm_bias q_b,  dnorm_weight = sum_b gate_b p_b,  dnorm_bias = sum_b gate_b q_b
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/scan/launch.h"
#include "cuda/scan/plan.h"

namespace gm {
namespace {

constexpr int kRowThreads = 32;  // bound by the latency of loads: many threads, each with 8 loads in flight

template <class T>
__global__ void __launch_bounds__(kReduceColumns* kRowThreads)
    scan_reduce_kernel(const __grid_constant__ ScanReduceArgs args) {
    begin_kernel();
    __shared__ float shared[kRowThreads][kReduceColumns];
    const int column_blocks = (args.dim + kReduceColumns - 1) / kReduceColumns;
    const int rows = args.states + kFixedRows + args.rank;
    const int d = blockIdx.x % column_blocks * kReduceColumns + threadIdx.x;
    const int row = blockIdx.x / column_blocks % rows;
    const int group = blockIdx.x / column_blocks / rows;
    const int scans = args.scans > 0 ? args.scans : args.groups, first = group / scans * args.dim;
    const bool in = d < args.dim && first + d < args.param_dim;
    const int64_t channel = static_cast<int64_t>(group % scans) * args.param_dim + first + d;
    const int64_t row_stride = static_cast<int64_t>(args.groups) * rows * args.dim;  // to the next (batch, part)
    const float* column = args.partials + (static_cast<int64_t>(group) * rows + row) * args.dim + d;

    const int fixed = row - args.states;
    if (fixed == kRowSum) return;  // done together with kRowProduct
    if (fixed == kRowProduct) {
        if (!args.dnorm_weight.ptr && !args.dnorm_bias.ptr && !args.dgate.ptr) return;
        const float weight = in ? load_param_or<T>(args.norm_weight, channel, 1.f) : 0.f;
        const float bias = in ? load_param_or<T>(args.norm_bias, channel, 0.f) : 0.f;
        float dweight = 0.f, dbias = 0.f;
        for (int64_t b = threadIdx.y; in && b < args.batch; b += kRowThreads) {
            float p = 0.f, q = 0.f;
#pragma unroll 4
            for (int w = 0; w < args.parts; ++w) {
                const float* v = column + (b * args.parts + w) * row_stride;
                p += v[0];
                q += v[args.dim];
            }
            const int64_t i = b * args.groups * args.dim + channel;
            store_param<T>(args.dgate, i, fmaf(weight, p, bias * q));
            const float gate = load_param_or<T>(args.gate, i, 1.f);
            dweight = fmaf(gate, p, dweight);
            dbias = fmaf(gate, q, dbias);
        }
        dweight = row_sum(dweight, shared);
        dbias = row_sum(dbias, shared);
        if (in && threadIdx.y == 0) {
            store_param<T>(args.dnorm_weight, channel, dweight);
            store_param<T>(args.dnorm_bias, channel, dbias);
        }
        return;
    }
    float sum = 0.f;
    const int parts = fixed < 0 ? args.state_parts : args.parts;
    const int64_t count = args.batch * parts;
    if (in) {
#pragma unroll 8
        for (int64_t i = threadIdx.y; i < count; i += kRowThreads)
            sum += column[(parts == args.parts ? i : i / parts * args.parts + i % parts) * row_stride];
    }
    sum = row_sum(sum, shared);
    if (!in || threadIdx.y != 0) return;
    if (fixed < 0) {
        store_param<T>(args.dA, channel * args.states + row, sum);
    } else if (fixed == kRowSkip) {
        store_param<T>(args.dD, channel, sum);
    } else if (fixed == kRowBias) {
        store_param<T>(args.ddt_bias, channel, sum);
    } else {
        store_param<T>(args.ddt_weight, channel * args.rank + (fixed - kFixedRows), sum);
    }
}

}  // namespace

cudaError_t launch_scan_reduce(const ScanReduceArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t rows = args.states + kFixedRows + args.rank;
    const int64_t blocks = static_cast<int64_t>((args.dim + kReduceColumns - 1) / kReduceColumns) * rows * args.groups;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch_kernel(scan_reduce_kernel<T>, blocks, dim3(kReduceColumns, kRowThreads), 0, stream, args);
    });
}

}  // namespace gm
