// SPDX-License-Identifier: Apache-2.0
// Backward of the 3x3 depthwise convolution with bias and activation, in one read of x and dy and one write of dx.
//
//   g = dy act'(pre),  pre = bias + conv(x)                    recomputed, in float32, never stored
//   dx[h, w] = sum over i, j of weight[i, j] g[h + 1 - i, w + 1 - j]
//   dweight[i, j] = sum over h, w of x[h, w] g[h + 1 - i, w + 1 - j],  dbias = sum of g
//
// A block goes down a tile of columns. A thread owns two of them; one step takes row r + 1 of x, finishes row r of g,
// and with it row r - 1 of dx. Rows enter the sums of three rows of pre and dx, which stay in registers; the columns on
// both sides come from the neighbouring threads through shared memory (x as stored, g as float): one barrier a step. x
// and dy of the next step are on their way meanwhile.
//
// dweight and dbias: every thread sums over its columns and rows, then the block over its threads, then
// launch_reduce_columns over the blocks, all in a fixed order.
#include "cuda/activation.cuh"
#include "cuda/conv_tile.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"

namespace gm {
namespace {

constexpr int kWindow = kConvColumns + 2;
constexpr int kTableWidth = kConvBwdLanes * kConvVec;

// The rows on their way between threads, between `lanes` zeros on either side for the columns beyond the tile.
template <class T>
struct Exchange {
    static constexpr int kSlots = kConvBwdThreads + 2 * kConvBwdLanes;
    Packed<T, kConvVec> x[4][kConvColumns][kSlots];      // row r in x[r & 3]
    Packed<float, kConvVec> g[2][kConvColumns][kSlots];  // row r in g[r & 1]

    __device__ void clear_edges(int lanes) {
        for (int i = threadIdx.x; i < 2 * lanes; i += blockDim.x) {
            const int at = i < lanes ? i : i + blockDim.x;
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) {
#pragma unroll
                for (int k = 0; k < 4; ++k) x[k][c][at] = {};
#pragma unroll
                for (int k = 0; k < 2; ++k) g[k][c][at] = {};
            }
        }
    }
};

template <class T>
union BlockMemory {
    struct {
        ConvTable<kTableWidth> table;
        Exchange<T> exchange;
    } walk;
    Packed<float, kConvVec> sums[kConvTaps + 1][kConvBwdThreads];  // of every thread, at the end
};

__device__ __forceinline__ Packed<float, kConvVec> pack(const float (&x)[kConvVec]) {
    Packed<float, kConvVec> out;
    memcpy(&out, x, sizeof(out));
    return out;
}

// A row of the input enters three rows of the output: done = above + taps[kLast] row, above = level + taps[1] row,
// level = start + taps[kFirst] row. `kMirror` turns the taps round (the transposed convolution).
template <int kLast, int kFirst, bool kMirror>
__device__ __forceinline__ void add_row(const float (&taps)[3][3][kConvVec], const float (&row)[kWindow][kConvVec],
                                        const float (&start)[kConvVec], float (&above)[kConvColumns][kConvVec],
                                        float (&level)[kConvColumns][kConvVec], float (&done)[kConvColumns][kConvVec]) {
#pragma unroll
    for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
        for (int j = 0; j < kConvVec; ++j) {
            float last = above[c][j], middle = level[c][j], first = start[j];
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                const float v = row[c + (kMirror ? 2 - k : k)][j];
                last = fmaf(taps[kLast][k][j], v, last);
                middle = fmaf(taps[1][k][j], v, middle);
                first = fmaf(taps[kFirst][k][j], v, first);
            }
            done[c][j] = last;
            above[c][j] = middle;
            level[c][j] = first;
        }
}

// dtaps[i][j] += x[w] g[w + 1 - j] for one row of x (the thread's columns) and one of g (with its neighbours).
__device__ __forceinline__ void add_taps(const float (&x)[kConvColumns][kConvVec], const float (&g)[kWindow][kConvVec],
                                         float (&dtaps)[3][kConvVec]) {
#pragma unroll
    for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
        for (int k = 0; k < 3; ++k)
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) dtaps[k][j] = fmaf(x[c][j], g[c + 2 - k][j], dtaps[k][j]);
}

static_assert(kConvBwdHalo == kConvColumns, "a tile's outer pairs are its halo");

// 168 registers or less: 3 blocks of 128 threads an SM. float rows on their way, and pointers to single elements, need
// more.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvBwdThreads, kAligned && sizeof(T) == 2 ? 3 : 2)
    depthwise_conv_bwd_kernel(const __grid_constant__ ConvBwdArgs args) {
    using Pack = Packed<T, kConvVec>;
    __shared__ BlockMemory<T> memory;
    ConvTable<kTableWidth>& table = memory.walk.table;
    Exchange<T>& exchange = memory.walk.exchange;
    const ConvShape& s = args.shape;
    const ConvBwdPlan& plan = args.plan;

    unsigned rest = blockIdx.x;
    const auto next = [&rest](int count) {
        const int i = rest % count;
        rest /= count;
        return i;
    };
    const int chunk = next(plan.chunks), group = next(s.groups), tile = next(plan.tiles), strip = next(plan.strips);
    const int64_t segment = rest;
    const int block_first = chunk * plan.lanes * kConvVec, width = plan.lanes * kConvVec;
    const int count = min(s.dim - block_first, width);
    const int64_t first_param = static_cast<int64_t>(group) * s.dim + block_first;
    table.template fill<T>(args.weight, args.bias, first_param, count, width);
    exchange.clear_edges(plan.lanes);
    __syncthreads();

    const int pair = threadIdx.x / plan.lanes;
    const Channels<kAligned> channels(threadIdx.x - pair * plan.lanes, plan.lanes, block_first, s.dim);
    float taps[3][3][kConvVec], bias[kConvVec], zero[kConvVec] = {};
#pragma unroll
    for (int i = 0; i < kConvTaps; ++i) table.get(i, channels, taps[i / 3][i % 3]);
    table.get(kConvTaps, channels, bias);

    // The outer pairs of a tile that goes on beyond its edge belong to the neighbouring tile.
    const int column = tile * plan.tile_step + pair * kConvColumns;
    const bool own = (pair > 0 || tile == 0) && (pair + 1 < plan.pairs || tile + 1 == plan.tiles);
    bool inside[kConvColumns];
#pragma unroll
    for (int c = 0; c < kConvColumns; ++c) inside[c] = column + c < s.width && channels.valid > 0;
    const int first = strip * plan.rows, end = min(first + plan.rows, s.height);  // rows of dx, and of x in dweight
    const int start = max(first - 3, -1);                                         // row of g in the first step
    const int left = threadIdx.x, self = left + plan.lanes, right = self + plan.lanes;

    float dtaps[3][3][kConvVec] = {}, dbias[kConvVec] = {};
    const int64_t batch_end = min((segment + 1) * plan.images, s.batch);
    for (int64_t batch = segment * plan.images; batch < batch_end; ++batch) {
        const auto at = [&](const ImageArg& image, int row) {
            return static_cast<T*>(image.ptr) + batch * image.batch + group * image.group + block_first +
                   channels.local + (static_cast<int64_t>(row) * s.width + column) * image.token;
        };
        const T* x = at(args.x, start + 1);
        const T* dy = at(args.dy, start);
        T* dx = at(args.dx, start - 1);
        const auto fetch = [&](const T*& image, int64_t token, bool in, Pack(&out)[kConvColumns]) {
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) out[c] = channels.load(image + c * token, in && inside[c]);
            image += token * s.width;
        };

        Pack x_ahead[kConvColumns], dy_ahead[kConvColumns];
        const auto send_x = [&](int row) {
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) exchange.x[row & 3][c][self] = x_ahead[c];
        };
        fetch(x, args.x.token, start + 1 < s.height, x_ahead);
        send_x(start + 1);
        fetch(x, args.x.token, start + 2 < s.height, x_ahead);
        fetch(dy, args.dy.token, start >= 0, dy_ahead);
        __syncthreads();

        float pre_above[kConvColumns][kConvVec], pre_level[kConvColumns][kConvVec];
        float dx_above[kConvColumns][kConvVec] = {}, dx_level[kConvColumns][kConvVec] = {};
#pragma unroll
        for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) pre_above[c][j] = pre_level[c][j] = bias[j];

        for (int r = start; r <= end; ++r) {
            float g[kWindow][kConvVec];
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) dy_ahead[c].widen(g[c + 1]);
            if (s.activation != Activation::kNone) {
                float row[kWindow][kConvVec], slope[kConvColumns][kConvVec];
                const auto& x_row = exchange.x[(r + 1) & 3];
                x_row[kConvColumns - 1][left].widen(row[0]);
                x_row[0][right].widen(row[kWindow - 1]);
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c) x_row[c][self].widen(row[c + 1]);
                add_row<2, 0, false>(taps, row, bias, pre_above, pre_level, slope);
                activation_slope<T>(s.activation, reinterpret_cast<float(&)[kConvColumns * kConvVec]>(slope));
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
                    for (int j = 0; j < kConvVec; ++j) g[c + 1][j] *= slope[c][j];
            }
            auto& g_row = exchange.g[r & 1];
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) g_row[c][self] = pack(g[c + 1]);
            send_x(r + 2);
            fetch(x, args.x.token, r + 3 < s.height && r + 2 <= end, x_ahead);
            fetch(dy, args.dy.token, r + 1 >= 0 && r + 1 < s.height && r < end, dy_ahead);
            __syncthreads();
            g_row[kConvColumns - 1][left].widen(g[0]);
            g_row[0][right].widen(g[kWindow - 1]);

#pragma unroll
            for (int i = 0; i < 3; ++i) {
                if (r - 1 + i < first || r - 1 + i >= end) continue;  // another block's row of x
                float x_row[kConvColumns][kConvVec];
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c) exchange.x[(r - 1 + i) & 3][c][self].widen(x_row[c]);
                add_taps(x_row, g, dtaps[i]);
            }
            if (r >= first && r < end) {
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
                    for (int j = 0; j < kConvVec; ++j) dbias[j] += g[c + 1][j];
            }
            float done[kConvColumns][kConvVec];
            add_row<0, 2, true>(taps, g, zero, dx_above, dx_level, done);
            if (r > first) {
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c)
                    channels.store(dx + c * args.dx.token, done[c], own && inside[c]);
            }
            dx += args.dx.token * s.width;
        }
    }

    __syncthreads();
#pragma unroll
    for (int i = 0; i <= kConvTaps; ++i) {
        memory.sums[i][threadIdx.x] = {};
        if (own) memory.sums[i][threadIdx.x] = pack(i < kConvTaps ? dtaps[i % kConvTaps / 3][i % 3] : dbias);
    }
    __syncthreads();
    // The first pair's place takes the sum over the pairs; then out in the order of the parameters.
    float(*sums)[kConvBwdThreads * kConvVec] = reinterpret_cast<float(*)[kConvBwdThreads * kConvVec]>(memory.sums);
    for (int i = threadIdx.x; i < width * (kConvTaps + 1); i += blockDim.x) {
        float* column_sums = sums[i / width] + i % width;
        float sum = 0.f;
        for (int p = 0; p < plan.pairs; ++p) sum += column_sums[p * width];
        *column_sums = sum;
    }
    __syncthreads();
    const auto place = [&](int c) { return kAligned ? c : c % plan.lanes * kConvVec + c / plan.lanes; };
    const int64_t params = static_cast<int64_t>(s.groups) * s.dim;
    float* out = args.partials + ((segment * plan.strips + strip) * plan.tiles + tile) * params * (kConvTaps + 1);
    for (int i = threadIdx.x; i < count * kConvTaps; i += blockDim.x)
        out[first_param * kConvTaps + i] = sums[i % kConvTaps][place(i / kConvTaps)];
    for (int c = threadIdx.x; c < count; c += blockDim.x)
        out[params * kConvTaps + first_param + c] = sums[kConvTaps][place(c)];
}

template <class T, bool kAligned>
cudaError_t launch(const ConvBwdArgs& args, cudaStream_t stream) {
    const ConvBwdPlan& plan = args.plan;
    const int64_t blocks = plan.partial_rows * args.shape.groups * plan.chunks;
    return launch_kernel(depthwise_conv_bwd_kernel<T, kAligned>, blocks, plan.threads, 0, stream, args);
}

}  // namespace

cudaError_t launch_depthwise_conv_bwd(const ConvBwdArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return args.shape.aligned ? launch<T, true>(args, stream) : launch<T, false>(args, stream);
    });
}

}  // namespace gm
