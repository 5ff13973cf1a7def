// SPDX-License-Identifier: Apache-2.0
// Backward of the 3x3 depthwise convolution with bias and activation, in one read of x and dy and one write of dx. On
// request it also writes the forward's result, which then need not be kept, and sums dx, which is the gradient of a
// bias added to x.
//
//   g = dy act'(pre),  pre = bias + conv(x)                    recomputed, in float32, never stored
//   dx[h, w] = sum over i, j of weight[i, j] g[h + 1 - i, w + 1 - j]
//   dweight[i, j] = sum over h, w of x[h, w] g[h + 1 - i, w + 1 - j],  dbias = sum of g
//
// A block goes down a tile of columns. A thread owns four columns of two channels. One step reads row r + 1 of x, with
// the columns on both sides, finishes row r of g, and with it row r - 1 of dx. A row enters the sums of three rows of
// pre and of dx, which stay in registers. The columns of g on both sides come from the neighbouring threads through
// shared memory: one barrier a step. Rows of x and dy are copied to shared memory some steps ahead by cp.async.
//
// dweight and dbias: every thread sums over its columns and rows, then the block over its threads, then the
// caller over the blocks, all in a fixed order.
#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/ptx/cp_async.cuh"
#include "cuda/depthwise_conv/launch.h"
#include "cuda/depthwise_conv/tile.cuh"

namespace gm {
namespace {

constexpr int kVecs = kConvVec, kColumns = kConvColumns, kWindow = kColumns + 2;

using Pair = Packed<float, kVecs>;
static_assert(kVecs == 2);

// The outer columns of g of every thread, passed to its neighbours, between `lanes` zeros on either side for the
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

// A ring buffer of rows of the tile in flight. Pair p is row p of x and row p - 1 of dy, both in slot p % kSlots. In a
// slot, columns 3, 1, 2 and 0 of all threads lie one after another, so that a warp reads adjacent words; what lies
// left of the first thread's column 0 and right of the last one's column 3 are `lanes` zeros in front and behind.
template <class T>
struct RowRing {
    static constexpr int kSlots = sizeof(T) == 2 ? 4 : 2;  // 20 KB
    static constexpr int kPitch = kConvBwdThreads * kColumns + 2 * kConvBwdLanes;
    static constexpr int kLanesOfCopy = kConvBwdVector / kVecs;  // neighbouring lanes whose channels a thread copies
    using Stored = Packed<T, kVecs>;
    struct alignas(16) Row {
        Stored columns[kPitch];
    } x[kSlots], dy[kSlots];

    static __device__ __forceinline__ int place(int c, int quads, int lanes) {
        return (1 + (c == 0 ? 3 : c == 3 ? 0 : c) * quads) * lanes;
    }
    __device__ void clear_edges(int quads, int lanes) {
        for (int i = threadIdx.x; i < 2 * lanes; i += blockDim.x) {
            const int at = i < lanes ? i : kColumns * quads * lanes + i;
#pragma unroll
            for (int k = 0; k < kSlots; ++k) x[k].columns[at] = {};
        }
    }
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
// level = bias + taps[kFirst] row. `kMirror` mirrors the taps (the transposed convolution). `tap(i, out)` reads the
// taps of the thread's channels; with kBias, number kConvTaps is the bias.
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

// 128 registers or fewer: 4 blocks of 128 threads an SM. float rows, and pointers to single elements, need more.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvBwdThreads, kAligned && sizeof(T) == 2 ? 4 : 2)
    depthwise_conv_bwd_kernel(const __grid_constant__ ConvBwdArgs args) {
    begin_kernel();
    using Stored = Packed<T, kVecs>;
    using Ring = RowRing<T>;
    __shared__ BlockMemory memory;
    __shared__ Ring ring;
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
    exchange.clear_edges(plan.lanes), ring.clear_edges(plan.quads, plan.lanes);
    __syncthreads();

    const int quad = threadIdx.x / plan.lanes;
    const Channels<kAligned> channels(threadIdx.x - quad * plan.lanes, plan.lanes, block_first, s.dim);
    // Where a tile goes on beyond its edge, its outer threads belong to the neighbouring tile.
    const int column = tile * plan.tile_step + quad * kColumns;
    const bool own = (quad > 0 || tile == 0) && (quad + 1 < plan.quads || tile + 1 == plan.tiles);
    bool inside[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) inside[c] = column + c < s.width && channels.valid > 0;

    const auto tap = [&](int i, float(&out)[kVecs]) { memory.walk.table.reread(i, channels, out); };
    Taps dtaps = {};
    float dbias[kVecs] = {}, dx_sum[kVecs] = {};
    const int first = strip * plan.rows, end = min(first + plan.rows, s.height);  // rows of dx, and of x in dweight
    // g starts one row above the strip, and x one row above that; rows beyond the image are 0.
    const int begin = max(first - 1, 0), ahead = max(first - 3, -1);
    const auto is_own_row = [&](int row) {
        return static_cast<unsigned>(row - first) < static_cast<unsigned>(end - first);
    };
    const int left = threadIdx.x, self = left + plan.lanes, right = self + plan.lanes;
    // What this thread copies of a row: kConvBwdVector channels of any column, or where images are not aligned its own
    // columns.
    const int copies = max(plan.lanes / Ring::kLanesOfCopy, 1);  // of a column
    const int tile_column = kAligned ? threadIdx.x / copies : quad * kColumns;
    const int copy_lane = kAligned ? threadIdx.x % copies * Ring::kLanesOfCopy : 0;
    const int copy_column = tile * plan.tile_step + tile_column;
    const int copy_channel = block_first + (kAligned ? copy_lane * kVecs : channels.local);
    const int copy_to = kAligned ? Ring::place(tile_column % kColumns, plan.quads, plan.lanes) +
                                       tile_column / kColumns * plan.lanes + copy_lane
                                 : threadIdx.x;
    const bool copy_in = copy_channel < s.dim && copy_column < s.width;
    constexpr int kToDy = Ring::kSlots * Ring::kPitch;
    const int64_t batch_end = min((segment + 1) * plan.images, s.batch);
    for (int64_t batch = segment * plan.images; batch < batch_end; ++batch) {
        // This thread's columns in a row of an image, all in bytes. The distance of a column fits 32 bits (image_arg
        // checks that), so that its address is one instruction.
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
        const auto row_of = [&](const ImageArg& image, int row) {
            return static_cast<const T*>(image.ptr) + batch * image.batch + group * image.group + copy_channel +
                   (static_cast<int64_t>(row) * s.width + copy_column) * image.token;
        };
        if (!keeps_branch(args.drop_path, batch)) {
            Place dx = place(args.dx, first, column), y = place(args.y, first, column);
            const float zeros[kVecs] = {};
#pragma unroll 1
            for (int row = first; row < end; ++row) {
                for (int c = 0; c < kColumns; ++c) {
                    channels.store(dx[c], zeros, own && inside[c]);
                    if (args.y.ptr != nullptr) channels.store(y[c], zeros, own && inside[c]);
                }
                dx.advance(), y.advance();
            }
            continue;
        }
        Place dx = place(args.dx, begin - 1, column), y = place(args.y, begin, column);

        const bool is_last = end == s.height;  // g is 0 below it
        const int last_pair = end + !is_last;
        const T* x = row_of(args.x, ahead + 1);
        const T* dy = row_of(args.dy, ahead);
        // Starts the copies of pair p; called for one pair after another.
        const auto queue = [&](int p) {
            const bool x_in = p < s.height && p <= last_pair, dy_in = p > begin && p <= last_pair;
            Stored* const to = ring.x[p % Ring::kSlots].columns + copy_to;
            if constexpr (kAligned) {
                constexpr int kStep = 16 / sizeof(T);  // channels of a copy
#pragma unroll
                for (int k = 0; k < kConvBwdVector / kStep; ++k) {
                    Stored* const place = to + k * kStep / kVecs;
                    cp_async_16(place, x + k * kStep, copy_in && x_in);
                    cp_async_16(place + kToDy, dy + k * kStep, copy_in && dy_in);
                }
            } else {
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    Stored* const place = to + Ring::place(c, plan.quads, plan.lanes);
                    place[0] = channels.load(x + c * args.x.token, x_in && inside[c]);
                    place[kToDy] = channels.load(dy + c * args.dy.token, dy_in && inside[c]);
                }
            }
            cp_async_commit();
            x += s.width * args.x.token, dy += s.width * args.dy.token;
        };
        // Waits for pair p, and frees its predecessor's slot for the pair after those in flight.
        const auto acquire = [&](int p) {
            cp_async_wait<Ring::kSlots - 2>();
            __syncthreads();
            queue(p - 1 + Ring::kSlots);
        };

        // Rows r - 1, r and r + 1 of x, the last with its neighbours.
        Stored x_above[kColumns] = {}, x_level[kColumns] = {}, x_below[kWindow];
        const auto take_x = [&](int p) {
            const Stored* const row = ring.x[p % Ring::kSlots].columns + threadIdx.x;
            x_below[0] = row[Ring::place(3, plan.quads, plan.lanes) - plan.lanes];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) x_below[c + 1] = row[Ring::place(c, plan.quads, plan.lanes)];
            x_below[kWindow - 1] = row[Ring::place(0, plan.quads, plan.lanes) + plan.lanes];
        };
#pragma unroll
        for (int k = 0; k < Ring::kSlots - 1; ++k) queue(ahead + 1 + k);

        Outputs pre_above, pre_level, dx_above = {}, dx_level = {};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) tap(kConvTaps, pre_above[c]), tap(kConvTaps, pre_level[c]);

        const auto next_row = [&](const Stored(&x_own)[kColumns]) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) x_above[c] = x_level[c], x_level[c] = x_own[c];
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
                if (!(own && inside[c])) continue;
                channels.store(dx[c], done[c], true);
#pragma unroll
                for (int j = 0; j < kVecs; ++j) dx_sum[j] += done[c][j];
            }
        };
        // Rows of x that the first row of pre needs.
        for (int p = ahead + 1; p <= begin; ++p) {
            acquire(p);
            take_x(p);
            if (s.activation != Activation::kNone) {
                Outputs unfinished;
                add_x_row(unfinished);
            }
            Stored x_own[kColumns];
            own_columns(x_own), next_row(x_own);
        }

        acquire(begin + 1);

        // One step. Most rows are `inner`: everything they touch exists and belongs to the strip.
        const auto step = [&](int r, auto inner_tag) {
            constexpr bool inner = decltype(inner_tag)::value;
            take_x(r + 1);
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
                    for (int c = 0; c < kColumns; ++c) channels.store(y[c], out + c * kVecs, own && inside[c]);
            }
            Row g;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                ring.dy[(r + 1) % Ring::kSlots].columns[threadIdx.x + Ring::place(c, plan.quads, plan.lanes)].widen(
                    g[c + 1]);
#pragma unroll
                for (int j = 0; j < kVecs; ++j) g[c + 1][j] *= slope[c][j];
            }
            exchange.first[r & 1][self] = pack(g[1]);
            exchange.last[r & 1][self] = pack(g[kColumns]);
            acquire(r + 2);  // its barrier serves the exchange too
            exchange.last[r & 1][left].widen(g[0]);
            exchange.first[r & 1][right].widen(g[kWindow - 1]);

            // Rows of x outside the strip belong to another block's sums.
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
        for (int r = begin; r < end + !is_last; ++r) {
            if (r > first && r <= last_inner) {
                step(r, std::true_type{});
            } else {
                step(r, std::false_type{});
            }
        }
        if (is_last) store_dx(dx_above);
        cp_async_wait<0>();
        __syncthreads();  // the next image begins with either half of the exchange, and with any slot
    }

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kConvTaps + 2; ++i) {
        const Pair sum = pack(i < kConvTaps ? dtaps[i % kConvTaps] : i == kConvTaps ? dbias : dx_sum);
        memory.sums[i][threadIdx.x] = own ? sum : Pair{};
    }
    __syncthreads();
    // The sum over all columns takes the place of the first one; then it is written in the order of the parameters.
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
