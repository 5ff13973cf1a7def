// SPDX-License-Identifier: Apache-2.0
// Backward of the 3x3 depthwise convolution with bias and activation, in one read of x and dy and one write of dx. On
// request it writes the forward's result too, so that this need not be kept, and sums dx, the gradient of a bias in
// front.
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
        Packed<float, kConvVec> bias_sums[2][kConvBwdThreads];  // dbias, then the sum of dx: registers are short
    } walk;
    Packed<float, kConvVec> sums[kConvTaps + 2][kConvBwdThreads];  // of every thread, at the end
};

__device__ __forceinline__ Packed<float, kConvVec> pack(const float (&x)[kConvVec]) {
    Packed<float, kConvVec> out;
    memcpy(&out, x, sizeof(out));
    return out;
}

// A row of the input enters three rows of the output: done = above + taps[kLast] row, above = level + taps[1] row,
// level = start + taps[kFirst] row. `kMirror` turns the taps round (the transposed convolution). `tap(i, out)` reads
// the taps of the thread's channels from shared memory, with kBias the bias as number kConvTaps: kept in registers they
// would cost a quarter of the warps.
template <int kLast, int kFirst, bool kMirror, bool kBias, class Tap>
__device__ __forceinline__ void add_row(const Tap& tap, const float (&row)[kWindow][kConvVec],
                                        float (&above)[kConvColumns][kConvVec], float (&level)[kConvColumns][kConvVec],
                                        float (&done)[kConvColumns][kConvVec]) {
    float start[kConvVec] = {};
    if (kBias) tap(kConvTaps, start);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        float last[kConvVec], middle[kConvVec], first[kConvVec];
        tap(3 * kLast + k, last), tap(3 + k, middle), tap(3 * kFirst + k, first);
#pragma unroll
        for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) {
                const float v = row[c + (kMirror ? 2 - k : k)][j];
                if (k == 0) done[c][j] = above[c][j], above[c][j] = level[c][j], level[c][j] = start[j];
                done[c][j] = fmaf(last[j], v, done[c][j]);
                above[c][j] = fmaf(middle[j], v, above[c][j]);
                level[c][j] = fmaf(first[j], v, level[c][j]);
            }
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

// 128 registers or less: 4 blocks of 128 threads an SM. float rows on their way, and pointers to single elements, need
// more.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvBwdThreads, kAligned && sizeof(T) == 2 ? 4 : 2)
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
    const auto tap = [&](int i, float(&out)[kConvVec]) { table.reread(i, channels, out); };

    // The outer pairs of a tile that goes on beyond its edge belong to the neighbouring tile.
    const int column = tile * plan.tile_step + pair * kConvColumns;
    const bool own = (pair > 0 || tile == 0) && (pair + 1 < plan.pairs || tile + 1 == plan.tiles);
    bool inside[kConvColumns];
#pragma unroll
    for (int c = 0; c < kConvColumns; ++c) inside[c] = column + c < s.width && channels.valid > 0;
    const int first = strip * plan.rows, end = min(first + plan.rows, s.height);  // rows of dx, and of x in dweight
    const int start = max(first - 3, -1);                                         // row of g in the first step
    using Place = std::conditional_t<kAligned, uint32_t, int64_t>;
    const auto place_of = [&](const ImageArg& image) {
        return static_cast<Place>(column) * static_cast<Place>(image.token) + channels.local;
    };
    const Place x_place = place_of(args.x), dy_place = place_of(args.dy);
    const int left = threadIdx.x, self = left + plan.lanes, right = self + plan.lanes;

    float dtaps[3][3][kConvVec] = {};
    auto& bias_sums = memory.walk.bias_sums;
    bias_sums[0][threadIdx.x] = bias_sums[1][threadIdx.x] = {};
    const auto add_to = [&](Packed<float, kConvVec>& sum, const auto& added) {
        float total[kConvVec];
        sum.widen(total);
#pragma unroll
        for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
            for (int j = 0; j < kConvVec; ++j) total[j] += added(c, j);
        sum = pack(total);
    };
    const int64_t batch_end = min((segment + 1) * plan.images, s.batch);
    for (int64_t batch = segment * plan.images; batch < batch_end; ++batch) {
        // A row's address is the block's, for uniform registers; a thread keeps its place in a row.
        const auto at = [&](const ImageArg& image, int row) {
            return static_cast<T*>(image.ptr) + batch * image.batch + group * image.group + block_first +
                   static_cast<int64_t>(row) * s.width * image.token;
        };
        const T* x = at(args.x, start + 1);
        const T* dy = at(args.dy, start);
        T* dx = at(args.dx, start - 1);
        T* y = at(args.y, start);
        const auto fetch = [&](const T*& image, int64_t token, Place place, bool in, Pack(&out)[kConvColumns]) {
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) out[c] = channels.load(image + c * token + place, in && inside[c]);
            image += token * s.width;
        };

        Pack x_ahead[kConvColumns], dy_ahead[kConvColumns];
        const auto send_x = [&](int row) {
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) exchange.x[row & 3][c][self] = x_ahead[c];
        };
        fetch(x, args.x.token, x_place, start + 1 < s.height, x_ahead);
        send_x(start + 1);
        fetch(x, args.x.token, x_place, start + 2 < s.height, x_ahead);
        fetch(dy, args.dy.token, dy_place, start >= 0, dy_ahead);
        __syncthreads();

        float pre_above[kConvColumns][kConvVec], pre_level[kConvColumns][kConvVec];
        float dx_above[kConvColumns][kConvVec] = {}, dx_level[kConvColumns][kConvVec] = {};
#pragma unroll
        for (int c = 0; c < kConvColumns; ++c) tap(kConvTaps, pre_above[c]), tap(kConvTaps, pre_level[c]);

        for (int r = start; r <= end; ++r) {
            float slope[kConvColumns][kConvVec];
            if (s.activation == Activation::kNone) {
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c)
#pragma unroll
                    for (int j = 0; j < kConvVec; ++j) slope[c][j] = 1.f;
            } else {
                float row[kWindow][kConvVec];
                const auto& x_row = exchange.x[(r + 1) & 3];
                x_row[kConvColumns - 1][left].widen(row[0]);
                x_row[0][right].widen(row[kWindow - 1]);
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c) x_row[c][self].widen(row[c + 1]);
                add_row<2, 0, false, true>(tap, row, pre_above, pre_level, slope);
                float out[kConvColumns * kConvVec];
                activation_slope<T>(s.activation, reinterpret_cast<float(&)[kConvColumns * kConvVec]>(slope), out);
                if (args.y.ptr != nullptr && r >= first && r < end)
#pragma unroll
                    for (int c = 0; c < kConvColumns; ++c)
                        channels.store(y + c * args.y.token + place_of(args.y), out + c * kConvVec, own && inside[c]);
            }
            float g[kWindow][kConvVec];
            auto& g_row = exchange.g[r & 1];
#pragma unroll
            for (int c = 0; c < kConvColumns; ++c) {
                dy_ahead[c].widen(g[c + 1]);
#pragma unroll
                for (int j = 0; j < kConvVec; ++j) g[c + 1][j] *= slope[c][j];
                g_row[c][self] = pack(g[c + 1]);
            }
            send_x(r + 2);
            fetch(x, args.x.token, x_place, r + 3 < s.height && r + 2 <= end, x_ahead);
            fetch(dy, args.dy.token, dy_place, r + 1 >= 0 && r + 1 < s.height && r < end, dy_ahead);
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
            if (r >= first && r < end) add_to(bias_sums[0][threadIdx.x], [&](int c, int j) { return g[c + 1][j]; });
            float done[kConvColumns][kConvVec];
            add_row<0, 2, true, false>(tap, g, dx_above, dx_level, done);
            if (r > first) {
#pragma unroll
                for (int c = 0; c < kConvColumns; ++c)
                    channels.store(dx + c * args.dx.token + place_of(args.dx), done[c], own && inside[c]);
                if (args.sums > kConvTaps + 1)
                    add_to(bias_sums[1][threadIdx.x], [&](int c, int j) { return inside[c] ? done[c][j] : 0.f; });
            }
            dx += args.dx.token * s.width, y += args.y.token * s.width;
        }
    }

    const Packed<float, kConvVec> dbias = bias_sums[0][threadIdx.x], dx_sum = bias_sums[1][threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kConvTaps + 2; ++i) {
        const auto sum = i < kConvTaps ? pack(dtaps[i % kConvTaps / 3][i % 3]) : i == kConvTaps ? dbias : dx_sum;
        memory.sums[i][threadIdx.x] = own ? sum : Packed<float, kConvVec>{};
    }
    __syncthreads();
    // The first pair's place takes the sum over the pairs; then out in the order of the parameters.
    float(*sums)[kConvBwdThreads * kConvVec] = reinterpret_cast<float(*)[kConvBwdThreads * kConvVec]>(memory.sums);
    for (int i = threadIdx.x; i < width * args.sums; i += blockDim.x) {
        float* column_sums = sums[i / width] + i % width;
        float sum = 0.f;
        for (int p = 0; p < plan.pairs; ++p) sum += column_sums[p * width];
        *column_sums = sum;
    }
    __syncthreads();
    const auto place = [&](int c) { return kAligned ? c : c % plan.lanes * kConvVec + c / plan.lanes; };
    const int64_t params = static_cast<int64_t>(s.groups) * s.dim;
    float* out = args.partials + ((segment * plan.strips + strip) * plan.tiles + tile) * params * args.sums;
    for (int i = threadIdx.x; i < count * kConvTaps; i += blockDim.x)
        out[first_param * kConvTaps + i] = sums[i % kConvTaps][place(i / kConvTaps)];
    for (int c = threadIdx.x; c < count; c += blockDim.x)
        for (int i = kConvTaps; i < args.sums; ++i) out[params * i + first_param + c] = sums[i][place(c)];
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
