// SPDX-License-Identifier: Apache-2.0
// The backward of the feed-forward network from dout to the hidden image, sm_90a, 16-bit storage:
//
//   hidden = xn fc1^T + bias,  dactivated = scale dout fc2;   then, as ../depthwise_conv/bwd_sm90.cu has it,
//   activated = gelu(conv(hidden)),  dhidden, and the sums for the convolution's weight and both biases
//
// The first two are up to eight times as wide as xn, and never leave the chip. A block owns 64 hidden channels of 14
// columns and goes down the rows of its images, four at a time:
//
//   products: one warpgroup computes four rows of hidden, 18 columns of them, the other four of dactivated, 16 columns,
//             and each writes them to shared memory as pixels of 64 channels;
//   convolve: each warp walks its 8 channels down these rows (bwd_walk.cuh). Meanwhile the next rows of xn and dout
//             arrive.
//
// Two blocks share a multiprocessor, so that the products of one run beside the convolution of the other.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/depthwise_conv/bwd_walk.cuh"
#include "cuda/feed_forward/launch.h"

namespace gm {
namespace {

constexpr int kRows = 4, kOctets = kConvSm90Warps, kHidden = kOctets * kOctet;
constexpr int kXnColumns = kConvBwdSm90Columns + 4, kDoutColumns = kConvBwdSm90Columns + 2;
constexpr int kXnPixels = kRows * kXnColumns, kDoutPixels = kRows * kDoutColumns;
static_assert(kHidden * 2 == kPanelRow && kXnPixels == 72 && kDoutPixels == 64, "the columns of a product");

using Rows = ConvBwdRows<kOctets, kRows>;

struct KernelArgs {
    CUtensorMap xn, dout;            // 64 channels of four rows
    CUtensorMap fc1, fc2;            // 64 by 64
    CUtensorMap dhidden, activated;  // 64 channels of a row
    FeedForwardBwdArgs args;
};

struct Layout {
    static constexpr int kResults = Rows::kStage, kXn = kResults + 2 * Rows::kResults;
    static constexpr int kDout = kXn + kXnPixels * kPanelRow;
    static constexpr int kFc1 = kDout + kDoutPixels * kPanelRow, kFc2 = kFc1 + kHidden * kPanelRow;
    // The taps of a channel as load_diagonals has them, 12 words of it, and a channel of zeros; biases of the
    // convolution and of fc1; what a lane addresses (LaneTable).
    static constexpr int kTaps = kFc2 + kHidden * kPanelRow, kTapsRow = 12 * 4;
    static constexpr int kConvBias = kTaps + (kHidden + 1) * kTapsRow, kFc1Bias = kConvBias + kHidden * 4;
    static constexpr int kLanes = kFc1Bias + kHidden * 4, kBarriers = kLanes + 32 * 16 * 4;
    static constexpr int kNext = kBarriers + 2 * 8, kBytes = kNext + 8;
    static constexpr int kSourceBytes = (kXnPixels + kDoutPixels) * kPanelRow;
};

// What a lane addresses, of channels 0 to 7 (the convolution) and 0 to 15 (the products): those of other channels
// differ by an exclusive or, as the swizzle has it. In shared memory, since what follows from it would take registers
// all the time, or instructions at each step.
struct alignas(16) LaneTable {
    uint32_t x_outer, x_inner, dy_pixel, result;  // as in ConvBwdLane
    uint32_t outer_channels, inner_channels;
    float in_sum[2];
    uint32_t hidden[5];   // where its rows of matrices of hidden belong
    uint32_t dactivated;  // the same of dactivated, in the first row
    uint32_t unused[2];

    template <class Place>
    __device__ LaneTable(const Place& at, int width, uint32_t rows, uint32_t results) {
        Place first = at;
        first.octet = 0;
        const ConvBwdLane<Rows> lane(first, width, rows, results);
        x_outer = lane.x_outer, x_inner = lane.x_inner, dy_pixel = lane.dy_pixel, result = lane.result;
        outer_channels = lane.outer_channels, inner_channels = lane.inner_channels;
        in_sum[0] = lane.in_sum[0], in_sum[1] = lane.in_sum[1];
        const int octet = at.lane / 8 % 2;
#pragma unroll
        for (int j = 0; j < 5; ++j) {
            const int pixel = min(16 * j + at.lane / 16 * 8, kXnPixels - 8) + at.lane % 8, row = pixel / kXnColumns;
            hidden[j] = rows + row * Rows::kX + Rows::Row::offset(pixel - row * kXnColumns, octet);
        }
        dactivated = rows + kRows * Rows::kX + Rows::Row::offset(at.lane / 16 * 8 + at.lane % 8, octet);
    }
};
static_assert(sizeof(LaneTable) == 4 * 16);

// Four words of it: the tables of all lanes lie side by side in pieces of 16 bytes.
__device__ __forceinline__ uint4 lane_words(const unsigned char* tables, int piece, int lane) {
    return reinterpret_cast<const uint4*>(tables)[piece * 32 + lane];
}

__device__ __forceinline__ ConvBwdLane<Rows> lane_of(const unsigned char* tables, int number, int octet) {
    const uint4 a = lane_words(tables, 0, number), b = lane_words(tables, 1, number);
    const uint32_t bits = octet * 16;
    ConvBwdLane<Rows> lane;
    lane.number = number;
    lane.x_outer = a.x ^ bits, lane.x_inner = a.y ^ bits, lane.dy_pixel = a.z ^ bits, lane.result = a.w ^ bits;
    lane.outer_channels = b.x ^ bits, lane.inner_channels = b.y ^ (number & 8 ? 0 : bits);  // or the ones
    lane.in_sum[0] = __uint_as_float(b.z), lane.in_sum[1] = __uint_as_float(b.w);
    return lane;
}

// Four rows of hidden, of a warp's 16 channels, to the rows of x.
template <class T>
__device__ __forceinline__ void store_hidden(const float (&sums)[kXnPixels / 2], const float (&bias)[2],
                                             const unsigned char* tables, int warp, int lane) {
    constexpr int kEighths = kXnPixels / 8;
    uint32_t words[kEighths][2];
#pragma unroll
    for (int j = 0; j < kEighths; ++j) {
        const float* const s = sums + 4 * j;
        words[j][0] = pack_pair<T>(s[0] + bias[0], s[1] + bias[0]);
        words[j][1] = pack_pair<T>(s[2] + bias[1], s[3] + bias[1]);
    }
    const uint4 a = lane_words(tables, 2, lane);
    const uint32_t places[5] = {a.x, a.y, a.z, a.w, lane_words(tables, 3, lane).x}, bits = warp * 32;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        stmatrix_trans(places[j] ^ bits, {words[2 * j][0], words[2 * j][1], words[2 * j + 1][0], words[2 * j + 1][1]});
    stmatrix_trans(places[4] ^ bits, words[kEighths - 1]);
}

// Zeros in place of the pixels that store_hidden has written outside the image: columns before `left` and from `right`
// on, rows from `rows` on.
__device__ __forceinline__ void clear_outside(unsigned char* shared, int left, int right, int rows, int warp,
                                              int lane) {
    __syncwarp();
    const auto clear = [&](int row, int column, int chunk) {
        *reinterpret_cast<uint4*>(shared + row * Rows::kX + Rows::Row::offset(column, warp * 2 + chunk)) = uint4{};
    };
    const int count = left + kXnColumns - right, in = min(max(rows, 0), kRows);
#pragma unroll 1
    for (int i = lane; i < count * in * 2; i += 32) {
        const int pixel = i / 2, column = pixel / in;
        clear(pixel - column * in, column < left ? column : right + column - left, i % 2);
    }
#pragma unroll 1
    for (int i = in * 2 * kXnColumns + lane; i < kXnPixels * 2; i += 32)
        clear(i / (2 * kXnColumns), i / 2 % kXnColumns, i % 2);
}

// Four rows of dactivated to the rows of dy.
template <class T>
__device__ __forceinline__ void store_dactivated(float (&sums)[kDoutPixels / 2], float scale,
                                                 const unsigned char* tables, int warp, int lane) {
    static_assert(kDoutColumns == 16, "a row is two matrices of 8 pixels");
    const uint32_t place = lane_words(tables, 3, lane).y ^ warp * 32;
    if (scale != 1.f) {
#pragma unroll
        for (int i = 0; i < kDoutPixels / 2; ++i) sums[i] *= scale;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack_pair<T>(sums[8 * row + 2 * i], sums[8 * row + 2 * i + 1]);
        stmatrix_trans(place + row * Rows::kDy, words);
    }
}

template <class T>
__global__ void __launch_bounds__(kConvSm90Threads, kConvBwdSm90Resident)
    feed_forward_bwd_sm90a_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
    extern __shared__ __align__(1024) unsigned char shared[];
    const FeedForwardBwdArgs& args = maps.args;
    const ConvBwdArgs& conv = args.conv;
    const ConvShape& s = conv.shape;
    const uint32_t base = shared_address(shared), source = base + Layout::kBarriers, weights = source + 8;
    const ConvPlace<kOctets, kConvBwdSm90Columns> at(s, conv.sm90);
    const bool loads_rows = threadIdx.x == 0;

    // The rows that come next, four at a time, and of images whose branch is dropped none: in shared memory, since
    // registers are few.
    int2& next = *reinterpret_cast<int2*>(shared + Layout::kNext);  // image, row
    const auto skip_dropped = [&](int batch) {
        while (batch < at.batch_end && !keeps_branch(conv.drop_path, batch)) ++batch;
        return batch;
    };
    const auto load = [&] {
        int2 from = next;
        if (from.x >= at.batch_end) return;
        mbarrier_expect(source, Layout::kSourceBytes);
        tma_load(base + Layout::kXn, &maps.xn, {0, at.block_column - 2, from.y, from.x, 0}, source);
        tma_load(base + Layout::kDout, &maps.dout, {0, at.block_column - 1, from.y - 1, from.x, 0}, source);
        from.y += kRows;
        next = from.y < s.height + 2 ? from : int2{skip_dropped(from.x + 1), 0};
    };
    if (loads_rows) {
        mbarrier_init(source, 1), mbarrier_init(weights, 1);
        mbarrier_init_fence();
        mbarrier_expect(weights, 2 * kHidden * kPanelRow);
        tma_load(base + Layout::kFc1, &maps.fc1, {0, at.block_channel, 0, 0, 0}, weights);
        tma_load(base + Layout::kFc2, &maps.fc2, {at.block_channel, 0, 0, 0, 0}, weights);
        next = {skip_dropped(at.batch), 0};
        load();
    }
    for (int i = threadIdx.x; i < (kHidden + 1) * kConvTaps; i += kConvSm90Threads) {
        const int of_block = i / kConvTaps, tap = i % kConvTaps, channel = at.block_channel + of_block;
        const bool in = of_block < kHidden && channel < s.dim;
        const float w = in ? load_param<T>(conv.weight, int64_t{channel} * kConvTaps + tap) : 0.f;
        *reinterpret_cast<uint32_t*>(shared + Layout::kTaps + of_block * Layout::kTapsRow + tap * 4) =
            of_block % 2 == 0 ? pack_pair<T>(w, 0.f) : pack_pair<T>(0.f, w);
    }
    if (threadIdx.x < 32) {
        const LaneTable table(at, s.width, base, base + Layout::kResults);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            reinterpret_cast<uint4*>(shared + Layout::kLanes)[i * 32 + threadIdx.x] =
                reinterpret_cast<const uint4*>(&table)[i];
    }
    if (threadIdx.x < kHidden) {
        const int channel = at.block_channel + threadIdx.x;
        const bool in = channel < s.dim;
        reinterpret_cast<float*>(shared + Layout::kConvBias)[threadIdx.x] =
            in ? load_param_or<T>(conv.bias, channel, 0.f) : 0.f;
        reinterpret_cast<float*>(shared + Layout::kFc1Bias)[threadIdx.x] =
            in ? to_float(static_cast<const T*>(args.fc1_bias)[channel]) : 0.f;
    }
    Rows::write_ones(shared, pack_pair<T>(1.f, 1.f), threadIdx.x);
    __syncthreads();
    mbarrier_wait(weights, 0);

    const int of_group = at.warp % 4;
    const unsigned char* const tables = shared + Layout::kLanes;
    // The columns of hidden that are in the image.
    const int left = at.block_column == 0 ? 2 : 0, right = min(s.width - at.block_column + 2, kXnColumns);
    const bool edge = left > 0 || right < kXnColumns;
    const auto products = [&](int rows) {
        wgmma_fence();
        if (at.warp < 4) {
            float sums[kXnPixels / 2];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                Wgmma<T, kXnPixels>::run(sums, panel_descriptor(base + Layout::kFc1) + 2 * k,
                                         panel_descriptor(base + Layout::kXn) + 2 * k, k > 0);
            wgmma_commit();
            const float* const biases =
                reinterpret_cast<const float*>(shared + Layout::kFc1Bias) + of_group * 16 + at.lane / 4;
            const float bias[2] = {biases[0], biases[8]};
            wgmma_wait<0>(sums);
            store_hidden<T>(sums, bias, tables, of_group, at.lane);
            if (edge || rows < kRows) clear_outside(shared, left, right, rows, of_group, at.lane);
        } else {
            float sums[kDoutPixels / 2];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                Wgmma<T, kDoutPixels, true, false>::run(
                    sums, rows_descriptor<kPanelRow>(base + Layout::kFc2, 16) + k * kPanelRow,
                    panel_descriptor(base + Layout::kDout) + 2 * k, k > 0);
            wgmma_commit();
            wgmma_wait<0>(sums);
            store_dactivated<T>(sums, args.scale, tables, of_group, at.lane);
        }
    };

    // The warps whose first thread stores rows.
    enum Mover { kStoreY = 2, kStoreDx = 3 };
    const bool of_y = at.warp == kStoreY, stores_rows = at.lane == 0 && (of_y || at.warp == kStoreDx);
    const auto load_bias = [&](float(&bias)[4]) {
        const float2 b =
            *reinterpret_cast<const float2*>(shared + Layout::kConvBias + at.octet * kOctet * 4 + at.lane % 4 * 8);
        bias[0] = bias[2] = b.x, bias[1] = bias[3] = b.y;
    };
    // Read anew for each four rows: kept, they would take registers that the products need.
    const auto load_taps = [&](uint32_t(&diagonals)[3][3]) {
        int number = at.lane;
        asm volatile("" : "+r"(number));
        const int g = number / 4, channel = g / 2 == number % 4 ? at.octet * kOctet + g : kHidden;
        const uint4* const taps = reinterpret_cast<const uint4*>(shared + Layout::kTaps + channel * Layout::kTapsRow);
        const uint4 a = taps[0], b = taps[1];
        const uint32_t all[kConvTaps] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, taps[2].x};
#pragma unroll
        for (int i = 0; i < kConvTaps; ++i) diagonals[i / 3][i % 3] = all[i];
    };
    ConvBwdWalk walk;
    uint32_t turn = 0;  // of the barrier, and of the halves of the results
    for (int batch = at.batch; batch < at.batch_end; ++batch) {
        if (!keeps_branch(conv.drop_path, batch)) {
            for (const ImageArg* image : {&conv.dx, &conv.y})
                clear_image<T>(*image, s, batch, 0, at.block_channel, at.block_column, kHidden, Rows::kColumns);
            continue;
        }
        float bias[4];
        load_bias(bias);
        walk.begin_image(bias);
        for (int first = 0; first < s.height + 2; first += kRows) {
            mbarrier_wait(source, turn);
            products(s.height - first);
            __syncthreads();
            if (loads_rows) load();
            if (!at.idle) {
                const ConvBwdLane<Rows> lane = lane_of(tables, at.lane, at.octet);
                uint32_t diagonals[3][3];
                load_taps(diagonals);
                load_bias(bias);
                // All four at once would spill with float16.
#pragma unroll(std::is_same_v<T, __half> ? 2 : kRows)
                for (int i = 0; i < kRows; ++i)
                    walk.row<T, Activation::kGelu>(lane, 0, i, turn * Rows::kResults,
                                                   first + i >= 2 && first + i < s.height + 2, diagonals, bias);
            }
            fence_proxy_async();
            if (stores_rows) tma_wait_read();  // the stores before, whose half of the results is next
            __syncthreads();
            if (stores_rows)
                store_rows<kRows>(of_y ? &maps.activated : &maps.dhidden,
                                  base + Layout::kResults + turn * Rows::kResults + (of_y ? 0 : kRows * Rows::kOut),
                                  Rows::kOut, s.height, at.block_channel, at.block_column, first - (of_y ? 1 : 2), 0,
                                  batch);
            turn ^= 1;
        }
    }
    unsigned number;  // the block's, read anew, so that what follows from it takes no registers until here
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
    const ConvPlace<kOctets, kConvBwdSm90Columns> place(s, conv.sm90, number);
    if (!place.idle) walk.leave_sums(conv, place);
    if (place.lane == 0) tma_wait_read();  // the end of the kernel makes visible what was written
}

template <class T>
cudaError_t launch(const FeedForwardBwdArgs& args, DType dtype, cudaStream_t stream) {
    KernelArgs kernel{{}, {}, {}, {}, {}, {}, args};
    const ConvShape& s = args.conv.shape;
    const int64_t channels = args.channels, hidden = s.dim, row = channels * s.width;
    const auto image = [&](int64_t columns) {
        return TensorMapShape{
            {channels, s.width, s.height, s.batch, 1}, {channels, row, row * s.height, 0}, {64, columns, kRows}};
    };
    const auto matrix = [&](int64_t columns, int64_t rows) {
        return TensorMapShape{{columns, rows, 1, 1, 1}, {columns, 0, 0, 0}, {64, 64, 1}};
    };
    const auto encode = [&](CUtensorMap& map, const void* tensor, const TensorMapShape& shape) {
        return encode_tensor_map(map, tensor, dtype, shape, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_SWIZZLE_128B);
    };
    if (!encode(kernel.xn, args.xn, image(kXnColumns)) || !encode(kernel.dout, args.dout, image(kDoutColumns)) ||
        !encode(kernel.fc1, args.fc1_weight, matrix(channels, hidden)) ||
        !encode(kernel.fc2, args.fc2_weight, matrix(hidden, channels)) ||
        !encode_rows<Rows::Row>(kernel.dhidden, args.conv.dx, s, Rows::kColumns, dtype) ||
        !encode_rows<Rows::Row>(kernel.activated, args.conv.y, s, Rows::kColumns, dtype))
        return cudaErrorInvalidValue;
    return launch_kernel(feed_forward_bwd_sm90a_kernel<T>, args.conv.sm90.blocks, kConvSm90Threads, Layout::kBytes,
                         stream, kernel);
}

}  // namespace

cudaError_t launch_feed_forward_bwd_sm90a(const FeedForwardBwdArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<T, float>) {
            return cudaErrorInvalidValue;
        } else {
            return launch<T>(args, dtype, stream);
        }
    });
}

}  // namespace gm
