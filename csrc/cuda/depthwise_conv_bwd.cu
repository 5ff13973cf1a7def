// SPDX-License-Identifier: Apache-2.0
// Backward of the 3x3 depthwise convolution with bias and activation, in one read of x and dy and one write of dx. On
// request it writes the forward's result too, so that this need not be kept, and sums dx, the gradient of a bias in
// front.
//
//   g = dy act'(pre),  pre = bias + conv(x)                    recomputed, in float32, never stored
//   dx[h, w] = sum over i, j of weight[i, j] g[h + 1 - i, w + 1 - j]
//   dweight[i, j] = sum over h, w of x[h, w] g[h + 1 - i, w + 1 - j],  dbias = sum of g
//
// A block goes down a tile of columns. A thread owns four of them in two channels; one step takes row r + 1 of x (with
// the columns on both sides, which come out of the L1 cache), finishes row r of g, and with it row r - 1 of dx. Rows
// enter the sums of three rows of pre and dx, which stay in registers; the columns of g on both sides come from the
// neighbouring threads through shared memory: one barrier a step. x and dy of the next step are on their way meanwhile.
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

constexpr int kVecs = kConvVec, kColumns = kConvColumns, kWindow = kColumns + 2;

using Pair = Packed<float, kVecs>;
static_assert(kVecs == 2);

// The outer columns of g of every thread, on their way to its neighbours, between `lanes` zeros on either side for the
// columns beyond the tile.
struct Exchange {
    static constexpr int kSlots = kConvBwdThreads + 2 * kConvBwdLanes;
    Pair first[2][kSlots], last[2][kSlots];  // row r in [r & 1]

    __device__ void clear_edges(int lanes) {
        for (int i = threadIdx.x; i < 2 * lanes; i += blockDim.x) {
            const int at = i < lanes ? i : i + blockDim.x;
#pragma unroll
            for (int k = 0; k < 2; ++k) first[k][at] = last[k][at] = {};
        }
    }
};

union BlockMemory {
    struct {
        Exchange exchange;
        ConvTable<kConvBwdLanes * kVecs> table;  // in registers the taps would cost a quarter of the warps
    } walk;
    Pair sums[kConvTaps + 2][kConvBwdThreads];  // of every thread, at the end
};

__device__ __forceinline__ Pair pack(const float (&x)[kVecs]) {
    Pair out;
    memcpy(&out, x, sizeof(out));
    return out;
}

using Row = float[kWindow][kVecs];
using Outputs = float[kColumns][kVecs];
using Taps = float[kConvTaps][kVecs];

// A row of the input enters three rows of the output: done = above + taps[kLast] row, above = level + taps[1] row,
// level = bias + taps[kFirst] row. `kMirror` turns the taps round (the transposed convolution). `tap(i, out)` reads the
// taps of the thread's channels, with kBias the bias as number kConvTaps.
template <int kLast, int kFirst, bool kMirror, bool kBias, class Tap>
__device__ __forceinline__ void add_row(const Tap& tap, const Row& row, Outputs& above, Outputs& level, Outputs& done) {
    float start[kVecs] = {};
    if (kBias) tap(kConvTaps, start);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        float last[kVecs], middle[kVecs], first[kVecs];
        tap(3 * kLast + k, last), tap(3 + k, middle), tap(3 * kFirst + k, first);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
            for (int j = 0; j < kVecs; ++j) {
                const float v = row[c + (kMirror ? 2 - k : k)][j];
                if (k == 0) done[c][j] = above[c][j], above[c][j] = level[c][j], level[c][j] = start[j];
                done[c][j] = fmaf(last[j], v, done[c][j]);
                above[c][j] = fmaf(middle[j], v, above[c][j]);
                level[c][j] = fmaf(first[j], v, level[c][j]);
            }
    }
}

// dtaps[3 i + j] += x[w] g[w + 1 - j] for one row of x (the thread's columns) and one of g (with its neighbours).
template <class T>
__device__ __forceinline__ void add_taps(const Packed<T, kVecs> (&x)[kColumns], const Row& g, int i, Taps& dtaps) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float v[kVecs];
        x[c].widen(v);
#pragma unroll
        for (int k = 0; k < 3; ++k)
#pragma unroll
            for (int j = 0; j < kVecs; ++j) dtaps[3 * i + k][j] = fmaf(v[j], g[c + 2 - k][j], dtaps[3 * i + k][j]);
    }
}

// 128 registers or less: 4 blocks of 128 threads an SM. float rows on their way, and pointers to single elements, need
// more.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvBwdThreads, kAligned && sizeof(T) == 2 ? 4 : 2)
    depthwise_conv_bwd_kernel(const __grid_constant__ ConvBwdArgs args) {
    using Stored = Packed<T, kVecs>;
    __shared__ BlockMemory memory;
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
    const int block_first = chunk * plan.lanes * kVecs, width = plan.lanes * kVecs;
    const int count = min(s.dim - block_first, width);
    const int64_t first_param = static_cast<int64_t>(group) * s.dim + block_first;
    Exchange& exchange = memory.walk.exchange;
    memory.walk.table.template fill<T>(args.weight, args.bias, first_param, count, width);
    exchange.clear_edges(plan.lanes);
    __syncthreads();

    const int quad = threadIdx.x / plan.lanes;
    const Channels<kAligned> channels(threadIdx.x - quad * plan.lanes, plan.lanes, block_first, s.dim);
    // The outer threads of a tile that goes on beyond its edge belong to the neighbouring tile.
    const int column = tile * plan.tile_step + quad * kColumns;
    const bool own = (quad > 0 || tile == 0) && (quad + 1 < plan.quads || tile + 1 == plan.tiles);
    bool inside[kWindow];
#pragma unroll
    for (int k = 0; k < kWindow; ++k) inside[k] = column - 1 + k >= 0 && column - 1 + k < s.width && channels.valid > 0;

    const auto tap = [&](int i, float(&out)[kVecs]) { memory.walk.table.reread(i, channels, out); };
    Taps dtaps = {};
    float dbias[kVecs] = {}, dx_sum[kVecs] = {};
    const int first = strip * plan.rows, end = min(first + plan.rows, s.height);  // rows of dx, and of x in dweight
    // The first row of g is above the strip's, and of x above that; rows beyond the image are 0.
    const int begin = max(first - 1, 0), ahead = max(first - 3, -1);
    const auto is_own_row = [&](int row) {
        return static_cast<unsigned>(row - first) < static_cast<unsigned>(end - first);
    };
    const int left = threadIdx.x, self = left + plan.lanes, right = self + plan.lanes;
    const int64_t batch_end = min((segment + 1) * plan.images, s.batch);
    for (int64_t batch = segment * plan.images; batch < batch_end; ++batch) {
        // This thread's columns in a row of an image, all in bytes; a column's distance takes 32 bits (checked by
        // image_arg), so that its address is one instruction.
        struct Place {
            char* at;
            int64_t row;
            uint32_t token;

            __device__ __forceinline__ T* operator[](int c) const {
                return reinterpret_cast<T*>(at + static_cast<uint64_t>(token) * static_cast<uint32_t>(c));
            }
            __device__ __forceinline__ void advance() { at += row; }
        };
        const auto place = [&](const ImageArg& image, int row, int column) {
            const int64_t tokens = static_cast<int64_t>(row) * s.width + column;
            T* const base = static_cast<T*>(image.ptr) + batch * image.batch + group * image.group + block_first;
            const int64_t token = image.token * static_cast<int64_t>(sizeof(T));
            return Place{reinterpret_cast<char*>(base + channels.local + tokens * image.token), s.width * token,
                         static_cast<uint32_t>(token)};
        };
        Place x = place(args.x, ahead + 1, column - 1), dy = place(args.dy, begin, column),
              dx = place(args.dx, begin - 1, column), y = place(args.y, begin, column);

        // Rows r - 1, r and r + 1 of x, the last with its neighbours; the next one, and dy's row r, are on their way.
        Stored x_above[kColumns] = {}, x_level[kColumns] = {}, x_below[kWindow], x_ahead[kWindow], dy_ahead[kColumns];
        const auto fetch_x = [&](int row, Stored(&into)[kWindow], bool inner) {
            const bool needed = inner || (row >= 0 && row <= end + 1 && row < s.height);
#pragma unroll
            for (int k = 0; k < kWindow; ++k) into[k] = channels.load(x[k], needed && inside[k]);
            x.advance();
        };
        const auto fetch_dy = [&](int row, bool inner) {
            const bool needed = inner || (row >= 0 && row <= end && row < s.height);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) dy_ahead[c] = channels.load(dy[c], needed && inside[c + 1]);
            dy.advance();
        };
        fetch_x(ahead + 1, x_below, false);
        fetch_dy(begin, false);

        Outputs pre_above, pre_level, dx_above = {}, dx_level = {};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) tap(kConvTaps, pre_above[c]), tap(kConvTaps, pre_level[c]);

        const auto next_row = [&](const Stored(&x_own)[kColumns]) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) x_above[c] = x_level[c], x_level[c] = x_own[c];
#pragma unroll
            for (int k = 0; k < kWindow; ++k) x_below[k] = x_ahead[k];
        };
        const auto own_columns = [&](Stored(&x_own)[kColumns]) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) x_own[c] = x_below[c + 1];
        };
        const auto add_x_row = [&](Outputs& done) {
            Row row;
#pragma unroll
            for (int k = 0; k < kWindow; ++k) x_below[k].widen(row[k]);
            add_row<2, 0, false, true>(tap, row, pre_above, pre_level, done);
        };
        const auto store_dx = [&](const Outputs& done) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                if (!(own && inside[c + 1])) continue;
                channels.store(dx[c], done[c], true);
#pragma unroll
                for (int j = 0; j < kVecs; ++j) dx_sum[j] += done[c][j];
            }
        };
        // Rows of x that the first row of pre needs.
        for (int r = ahead; r < begin; ++r) {
            fetch_x(r + 2, x_ahead, false);
            if (s.activation != Activation::kNone) {
                Outputs unfinished;
                add_x_row(unfinished);
            }
            Stored x_own[kColumns];
            own_columns(x_own), next_row(x_own);
        }

        // One step. Most rows are `inner`: what it touches is there, and is the strip's own.
        const auto step = [&](int r, auto inner_tag) {
            constexpr bool inner = decltype(inner_tag)::value;
            Outputs slope;
            if (s.activation == Activation::kNone) {
#pragma unroll
                for (int c = 0; c < kColumns; ++c)
#pragma unroll
                    for (int j = 0; j < kVecs; ++j) slope[c][j] = 1.f;
            } else {
                add_x_row(slope);
                float out[kColumns * kVecs];
                activation_slope<T>(s.activation, reinterpret_cast<float(&)[kColumns * kVecs]>(slope), out);
                if (args.y.ptr != nullptr && (inner || is_own_row(r)))
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) channels.store(y[c], out + c * kVecs, own && inside[c + 1]);
            }
            Row g;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                dy_ahead[c].widen(g[c + 1]);
#pragma unroll
                for (int j = 0; j < kVecs; ++j) g[c + 1][j] *= slope[c][j];
            }
            exchange.first[r & 1][self] = pack(g[1]);
            exchange.last[r & 1][self] = pack(g[kColumns]);
            fetch_dy(r + 1, inner);
            fetch_x(r + 2, x_ahead, inner);  // half a step ahead of its use: registers are short before
            __syncthreads();
            exchange.last[r & 1][left].widen(g[0]);
            exchange.first[r & 1][right].widen(g[kWindow - 1]);

            // Rows of x that are not the strip's belong to another block's sums.
            Stored x_own[kColumns];
            own_columns(x_own);
            if (inner || is_own_row(r - 1)) add_taps(x_above, g, 0, dtaps);
            if (inner || is_own_row(r)) {
                add_taps(x_level, g, 1, dtaps);
#pragma unroll
                for (int c = 0; c < kColumns; ++c)
#pragma unroll
                    for (int j = 0; j < kVecs; ++j) dbias[j] += g[c + 1][j];
            }
            if (inner || is_own_row(r + 1)) add_taps(x_own, g, 2, dtaps);
            Outputs done;
            add_row<0, 2, true, false>(tap, g, dx_above, dx_level, done);
            if (inner || r > first) store_dx(done);
            next_row(x_own);
            dx.advance(), y.advance();
        };
        const int last_inner = min(end - 2, s.height - 3);
        const bool is_last = end == s.height;  // g is 0 below it
        for (int r = begin; r < end + !is_last; ++r) {
            if (r > first && r <= last_inner) {
                step(r, std::true_type{});
            } else {
                step(r, std::false_type{});
            }
        }
        if (is_last) store_dx(dx_above);
        __syncthreads();  // the next image begins with either half of the exchange
    }

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kConvTaps + 2; ++i) {
        const Pair sum = pack(i < kConvTaps ? dtaps[i % kConvTaps] : i == kConvTaps ? dbias : dx_sum);
        memory.sums[i][threadIdx.x] = own ? sum : Pair{};
    }
    __syncthreads();
    // The first column's place takes the sum over all of them; then out in the order of the parameters.
    float(*sums)[kConvBwdThreads * kVecs] = reinterpret_cast<float(*)[kConvBwdThreads * kVecs]>(memory.sums);
    for (int i = threadIdx.x; i < width * args.sums; i += blockDim.x) {
        float* column_sums = sums[i / width] + i % width;
        float sum = 0.f;
        for (int q = 0; q < plan.quads; ++q) sum += column_sums[q * width];
        *column_sums = sum;
    }
    __syncthreads();
    const auto place = [&](int c) { return kAligned ? c : c % plan.lanes * kVecs + c / plan.lanes; };
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
