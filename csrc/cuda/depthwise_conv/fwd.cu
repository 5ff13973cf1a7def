// SPDX-License-Identifier: Apache-2.0
// Forward of the 3x3 depthwise convolution with bias and activation: one read, one write.
//
//   y[h, w] = act(bias + sum over i, j in 0..2 of weight[i, j] x[h + i - 1, w + j - 1]),  x = 0 outside the image;
//   y = 0 in the images whose branch is dropped
//
// A thread goes down kConvColumns columns. In a step it reads one row of them and of their two neighbours (the
// neighbours come from the L1 cache, where the next thread has just read them). A row enters the sums of three output
// rows, which are all that the thread keeps; the next rows are in flight meanwhile.
#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/depthwise_conv/launch.h"
#include "cuda/depthwise_conv/tile.cuh"

namespace gm {
namespace {

constexpr int kWindow = kConvColumns + 2;

// Rows in flight beside the one in use. 20 warps of an SM ask for 10 KB of new pixels a row (the neighbours are
// another thread's), and the memory answers after some 700 ns.
constexpr int kRowsAhead = 3;

// 20 warps an SM, 16 of float; pointers to single elements need more than 128 registers.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvFwdThreads, kAligned ? (sizeof(T) == 2 ? 5 : 4) : 3)
    depthwise_conv_fwd_kernel(const __grid_constant__ ConvFwdArgs args) {
    begin_kernel();
    __shared__ ConvTable<kConvFwdLanes * kConvVec> table;
    const ConvShape& s = args.shape;
    const ConvFwdPlan& plan = args.plan;
    const int chunk = blockIdx.x % plan.chunks, group = blockIdx.x / plan.chunks % s.groups;
    const int block_first = chunk * plan.lanes * kConvVec, width = plan.lanes * kConvVec;
    table.fill<T>(args.weight, args.bias, static_cast<int64_t>(group) * s.dim + block_first,
                  min(s.dim - block_first, width), width);
    __syncthreads();

    const int lane = threadIdx.x % plan.lanes;
    const int64_t walker =
        static_cast<int64_t>(blockIdx.x / plan.chunks / s.groups) * plan.walkers + threadIdx.x / plan.lanes;
    const int64_t image_strip = walker / plan.quads, batch = image_strip / plan.strips;
    const Channels<kAligned> channels(lane, plan.lanes, block_first, s.dim);
    if (batch >= s.batch || channels.valid == 0) return;
    const int column = static_cast<int>(walker - image_strip * plan.quads) * kConvColumns;
    const int first = static_cast<int>(image_strip - batch * plan.strips) * plan.rows;
    const int end = min(first + plan.rows, s.height);

    float weight[kConvTaps][kConvVec], bias[kConvVec];
#pragma unroll
    for (int i = 0; i < kConvTaps; ++i) table.get(i, channels, weight[i]);
    table.get(kConvTaps, channels, bias);
    // Without rows and bias, the result of an image is 0.
    int rows_end = min(end + 1, s.height);
    if (!keeps_branch(args.drop_path, batch)) {
        rows_end = 0;
#pragma unroll
        for (int j = 0; j < kConvVec; ++j) bias[j] = 0.f;
    }

    const int64_t x_token = args.x.token, x_row = x_token * s.width, y_token = args.y.token, y_row = y_token * s.width;
    const int start = max(first - 1, 0);
    const int64_t channel = block_first + channels.local;
    const T* x[kWindow];
    x[0] = static_cast<const T*>(args.x.ptr) + batch * args.x.batch + group * args.x.group + channel + start * x_row +
           (column - 1) * x_token;
#pragma unroll
    for (int k = 1; k < kWindow; ++k) x[k] = x[k - 1] + x_token;
    T* y = static_cast<T*>(args.y.ptr) + batch * args.y.batch + group * args.y.group + channel + first * y_row +
           column * y_token;
    bool inside[kWindow];
#pragma unroll
    for (int k = 0; k < kWindow; ++k) inside[k] = column - 1 + k >= 0 && column - 1 + k < s.width;

    // sums of the output rows above and level with `row`
    float above[kConvColumns][kConvVec], level[kConvColumns][kConvVec];
#pragma unroll
    for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
        for (int j = 0; j < kConvVec; ++j) above[c][j] = level[c][j] = bias[j];
    using Row = Packed<T, kConvVec>[kWindow];
    Row rows[kRowsAhead + 1];
    int row = start;
    const auto fetch = [&](Row& into, int number) {
        const bool needed = number < rows_end;
#pragma unroll
        for (int k = 0; k < kWindow; ++k) {
            into[k] = channels.load(x[k], needed && inside[k]);
            x[k] += x_row;
        }
    };
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) fetch(rows[i], start + i);

    // Computes with row `row`, which is in rows[kSlot]; false after the last one.
    const auto step = [&](auto slot) {
        constexpr int kSlot = decltype(slot)::value;
        fetch(rows[(kSlot + kRowsAhead) % (kRowsAhead + 1)], row + kRowsAhead);
        float in[kWindow][kConvVec], out[kConvColumns * kConvVec];
#pragma unroll
        for (int k = 0; k < kWindow; ++k) rows[kSlot][k].widen(in[k]);
#pragma unroll
        for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) {
                float done = above[c][j], next = level[c][j], fresh = bias[j];
#pragma unroll
                for (int k = 0; k < 3; ++k) {
                    done = fmaf(weight[6 + k][j], in[c + k][j], done);
                    next = fmaf(weight[3 + k][j], in[c + k][j], next);
                    fresh = fmaf(weight[k][j], in[c + k][j], fresh);
                }
                out[c * kConvVec + j] = done;
                above[c][j] = next;
                level[c][j] = fresh;
            }
        if (row > first) {
            activate<T>(s.activation, out);
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) channels.store(y + c * y_token, out + c * kConvVec, inside[c + 1]);
            y += y_row;
        }
        return ++row <= end;
    };
    while (step(std::integral_constant<int, 0>{}) && step(std::integral_constant<int, 1>{}) &&
           step(std::integral_constant<int, 2>{}) && step(std::integral_constant<int, 3>{})) {
        static_assert(kRowsAhead == 3, "one step for each slot");
    }
}

template <class T, bool kAligned>
cudaError_t launch(const ConvFwdArgs& args, cudaStream_t stream) {
    const int64_t blocks = args.plan.walker_blocks * args.shape.groups * args.plan.chunks;
    return launch_kernel(depthwise_conv_fwd_kernel<T, kAligned>, blocks, args.plan.threads, 0, stream, args);
}

}  // namespace

cudaError_t launch_depthwise_conv_fwd(const ConvFwdArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return args.shape.aligned ? launch<T, true>(args, stream) : launch<T, false>(args, stream);
    });
}

}  // namespace gm
