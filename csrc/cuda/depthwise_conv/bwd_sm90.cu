// SPDX-License-Identifier: Apache-2.0
// The backward of bwd.cu by tensor cores, sm_90, 16-bit storage (tensor_cores.cuh): the same results, in one read of x
// and dy and one write of dx and, on request, of the forward's result y.
//
//   pre = bias + conv(x);  g = dy act'(pre);  dx = conv^T(g);  dweight = x g, dbias = sum of g
//
// Row r of x finishes row r - 1 of pre and g, and with it row r - 2 of dx. A warp computes 16 columns of g from 18 of x
// and owns the 14 inner ones of dx, so that no warp waits for another's g. The sums over pixels of dweight are products
// of x at two taps, channels by pixels, and g, pixels by channels; they are on the diagonals of the result. g is
// rounded to 16 bits for the products, as x and dy are.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/packed.cuh"
#include "cuda/depthwise_conv/launch.h"
#include "cuda/depthwise_conv/tensor_cores.cuh"

namespace gm {
namespace {

struct KernelArgs {
    CUtensorMap x, dy, dx, y;
    ConvBwdArgs args;
};

// Rows that come and go together. Four need fewer barriers than two, and registers, which not all kernels have.
constexpr int rows_at_once(int octets, Activation activation) {
    return activation == Activation::kGelu && octets > 2 ? 4 : 2;
}

template <int kOctets, int kRowsAtOnce>
struct Layout {
    using Row = PixelRow<kOctets>;
    static constexpr int kRows = kRowsAtOnce, kStages = kRows == 4 ? 3 : 4;  // on their way, or in use
    static constexpr int kTiles = kConvSm90Warps / kOctets, kColumns = kTiles * kConvBwdSm90Columns;
    // Behind a row of x there are 64 ones.
    static constexpr int kOnes = (kColumns + 4) * Row::kPixel, kX = Row::bytes((kOnes + 128) / Row::kPixel);
    static constexpr int kDy = Row::bytes(kColumns + 2), kOut = Row::bytes(kColumns), kStage = kRows * (kX + kDy);
    // Results: kRows of y, then of dx, in each of two halves.
    static constexpr int kResults = kStages * kStage, kHalf = 2 * kRows * kOut;
    static constexpr int kBarriers = kResults + 2 * kHalf, kBytes = kBarriers + kStages * 8;
    // Behind a row of results: where the computed pixels go that are not the warp's own, as far from their place as is
    // a multiple of 8, so that they keep to their banks.
    static __device__ __forceinline__ int aside(int pixel) { return kColumns / 8 * 8 + (pixel & 7); }
    static_assert(kOut >= (kColumns / 8 * 8 + 8) * Row::kPixel);
};

// The warps whose first thread moves rows: one each, so that no warp falls behind the others.
enum Mover { kLoadX, kLoadDy, kStoreY, kStoreDx };

// What a warp keeps while it goes down the rows.
struct Walk {
    float pre_above[4], pre_level[4], dx_above[4], dx_level[4];
    // Rows of x as channels by pixels: at the outer taps, and at the inner one with ones below it.
    uint32_t outer_above[4], inner_above[4], outer_level[4], inner_level[4];
    // By row of the tap, 16 by 8 channels: of the two outer taps, and of the inner one and, below, of the bias.
    float douter[3][4] = {}, dinner[3][4] = {};
    float dx_sum[2] = {};
};

template <class T, int kOctets, Activation kActivation>
__global__ void __launch_bounds__(kConvSm90Threads, kConvBwdSm90Resident)
    depthwise_conv_bwd_sm90_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
#if __CUDA_ARCH__ == 900
    using Layout = Layout<kOctets, rows_at_once(kOctets, kActivation)>;
    using Row = typename Layout::Row;
    constexpr int kRows = Layout::kRows;
    extern __shared__ __align__(1024) unsigned char shared[];
    const ConvBwdArgs& args = maps.args;
    const ConvShape& s = args.shape;
    const uint32_t base = shared_address(shared), barriers = base + Layout::kBarriers;
    const ConvPlace<kOctets, kConvBwdSm90Columns> at(s, args.sm90);
    const int lane = at.lane, g = lane / 4, t = lane % 4;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Layout::kStages; ++i) mbarrier_init(barriers + i * 8, 2);
        mbarrier_init_fence();
    }
    __syncthreads();
    const bool of_x = at.warp == kLoadX, loads_rows = of_x || at.warp == kLoadDy;
    RowLoads loads{at.block_channel, at.block_column - (of_x ? 2 : 1), at.group, at.batch, at.batch_end};
    const auto load = [&](int stage) {
        loads.next<kRows>(args.drop_path, s.height + 2, of_x ? &maps.x : &maps.dy, of_x ? 0 : 1,
                          base + stage * Layout::kStage + (of_x ? 0 : kRows * Layout::kX),
                          of_x ? Layout::kX : Layout::kDy, (Layout::kColumns + (of_x ? 4 : 2)) * Row::kPixel,
                          barriers + stage * 8);
    };
    if (loads_rows) {
        loads.skip_dropped(args.drop_path);
#pragma unroll 1
        for (int i = 0; i < Layout::kStages; ++i) load(i);
    }
    uint32_t diagonals[3][3];
    float bias[4];
    load_diagonals<T>(args.weight, s.dim, at, diagonals);
    load_bias<T>(args.bias, s.dim, at, bias);
    // Of the warp's 16 pixels the lane has g and g + 8: whether they are its own, and for the sum of dx also in the
    // image.
    const bool own[2] = {g > 0, g < 7};
    float in_sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) in_sum[i] = own[i] && at.column - 1 + g + 8 * i < s.width ? 1.f : 0.f;
    asm volatile("" : "+f"(in_sum[0]), "+f"(in_sum[1]));  // kept, or each row would make them anew
    // What this lane addresses: of x the pixels at the outer taps, and at the inner one; of dy; of the results, y and
    // then dx.
    const int pixel = at.tile * kConvBwdSm90Columns + lane % 16;
    const uint32_t x_outer = base + Row::offset(pixel + lane / 16 * 2, at.octet),
                   x_inner = base + Row::offset(pixel + 1, at.octet),
                   dy_pixel = base + kRows * Layout::kX + Row::offset(pixel, at.octet);
    const int to = lane % 16 == 0 || lane % 16 == 15 ? Layout::aside(pixel - 1) : pixel - 1;
    const uint32_t result = base + Layout::kResults + lane / 16 * kRows * Layout::kOut + Row::offset(to, at.octet);
    // The same for x as channels by pixels, where the pixels at the inner tap are followed by ones.
    const int x_pixel = at.tile * kConvBwdSm90Columns + lane % 8 + lane / 16 * 8, second = lane / 8 % 2;
    const uint32_t outer_channels = base + Row::offset(x_pixel + second * 2, at.octet),
                   inner_channels =
                       base + (second == 1 ? Layout::kOnes + lane % 8 * 16 : Row::offset(x_pixel + 1, at.octet));
    for (int i = threadIdx.x; i < Layout::kStages * kRows * 8; i += kConvSm90Threads) {
        const uint32_t ones = pack_pair<T>(1.f, 1.f);
        const int row = i / 8, place = row / kRows * Layout::kStage + row % kRows * Layout::kX + Layout::kOnes;
        *reinterpret_cast<uint4*>(shared + place + i % 8 * 16) = make_uint4(ones, ones, ones, ones);
    }
    __syncthreads();

    Walk walk;
    const auto row = [&](uint32_t stage, int i, uint32_t half, bool has_dx) {
        float slope[4] = {1.f, 1.f, 1.f, 1.f}, y[4] = {};
        if constexpr (kActivation != Activation::kNone) {
            uint32_t outer[4], inner[2];
            ldmatrix(outer, x_outer + stage + i * Layout::kX);
            ldmatrix(inner, x_inner + stage + i * Layout::kX);
            add_taps<T>({&slope, &walk.pre_above, &walk.pre_level}, {&walk.pre_above, &walk.pre_level, &bias}, outer,
                        inner, diagonals, {2, 1, 0}, [] {});
            activation_slope<T>(kActivation, slope, y);
        }
        Packed<T, 4> dy;
        ldmatrix(dy.words, dy_pixel + stage + i * Layout::kDy);
        float gradient[4];
        dy.widen(gradient);
#pragma unroll
        for (int k = 0; k < 4; ++k) gradient[k] *= slope[k];
        const uint32_t level[2] = {pack_pair<T>(gradient[0], gradient[1]), pack_pair<T>(gradient[2], gradient[3])};
        // g at the pixels to the right and to the left. The outermost two get what does not matter.
        const int right = (lane + 4) % 32, left = (lane + 28) % 32;
        const uint32_t sides[4] = {__shfl_sync(kFullWarp, g == 0 ? level[1] : level[0], right),
                                   __shfl_sync(kFullWarp, level[1], right), __shfl_sync(kFullWarp, level[0], left),
                                   __shfl_sync(kFullWarp, g == 7 ? level[0] : level[1], left)};
        // x as channels by pixels, g as pixels by channels.
        uint32_t outer_below[4], inner_below[4];
        ldmatrix_trans(outer_below, outer_channels + stage + i * Layout::kX);
        ldmatrix_trans(inner_below, inner_channels + stage + i * Layout::kX);
        const uint32_t g0 = movmatrix_trans(own[0] ? level[0] : 0), g1 = movmatrix_trans(own[1] ? level[1] : 0);
        float dx[4];
        const float none[4] = {};
        const auto products = [&] {
            warp_mma<T>(walk.douter[0], walk.outer_above, g0, g1, walk.douter[0]);
            warp_mma<T>(walk.dinner[0], walk.inner_above, g0, g1, walk.dinner[0]);
            warp_mma<T>(walk.douter[1], walk.outer_level, g0, g1, walk.douter[1]);
            warp_mma<T>(walk.dinner[1], walk.inner_level, g0, g1, walk.dinner[1]);
            warp_mma<T>(walk.douter[2], outer_below, g0, g1, walk.douter[2]);
            warp_mma<T>(walk.dinner[2], inner_below, g0, g1, walk.dinner[2]);
        };
        add_taps<T>({&dx, &walk.dx_above, &walk.dx_level}, {&walk.dx_above, &walk.dx_level, &none}, sides, level,
                    diagonals, {0, 1, 2}, products);
        if (has_dx) {
#pragma unroll
            for (int k = 0; k < 4; ++k) walk.dx_sum[k % 2] = fmaf(in_sum[k / 2], dx[k], walk.dx_sum[k % 2]);
        }
        const uint32_t results[4] = {pack_pair<T>(y[0], y[1]), pack_pair<T>(y[2], y[3]), pack_pair<T>(dx[0], dx[1]),
                                     pack_pair<T>(dx[2], dx[3])};
        stmatrix(result + half + i * Layout::kOut, results);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            walk.outer_above[k] = walk.outer_level[k], walk.outer_level[k] = outer_below[k];
            walk.inner_above[k] = walk.inner_level[k], walk.inner_level[k] = inner_below[k];
        }
    };

    const bool of_y = at.warp == kStoreY,
               stores_rows = lane == 0 && ((of_y && args.y.ptr != nullptr) || at.warp == kStoreDx);
    int stage = 0;
    uint32_t parity = 0, half = 0;
    for (int batch = at.batch; batch < at.batch_end; ++batch) {
        if (!keeps_branch(args.drop_path, batch)) {
            for (const ImageArg* image : {&args.dx, &args.y})
                if (image->ptr != nullptr)
                    clear_image<T>(*image, s, batch, at.group, at.block_channel, at.block_column, kOctets * kOctet,
                                   Layout::kColumns);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            walk.pre_above[i] = walk.pre_level[i] = bias[i], walk.dx_above[i] = walk.dx_level[i] = 0.f;
            walk.outer_above[i] = walk.inner_above[i] = walk.outer_level[i] = walk.inner_level[i] = 0;
        }
        for (int first = 0; first < s.height + 2; first += kRows) {
            const uint32_t from = stage * Layout::kStage;
            mbarrier_wait(barriers + stage * 8, parity);
            if (!at.idle) {
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                    row(from, i, half * Layout::kHalf, first + i >= 2 && first + i < s.height + 2);
            }
            fence_proxy_async();
            if (stores_rows) tma_wait_read();  // the stores before, whose half of the results is next
            __syncthreads();
            if (loads_rows) load(stage);
            if (stores_rows)
                store_rows<kRows>(of_y ? &maps.y : &maps.dx,
                                  base + Layout::kResults + half * Layout::kHalf + (of_y ? 0 : kRows * Layout::kOut),
                                  Layout::kOut, s.height, at.block_channel, at.block_column, first - (of_y ? 1 : 2),
                                  at.group, batch);
            half ^= 1;
            if (++stage == Layout::kStages) stage = 0, parity ^= 1;
        }
    }
    if (!at.idle) {
        const int64_t params = static_cast<int64_t>(s.groups) * s.dim,
                      param = static_cast<int64_t>(at.group) * s.dim + at.channel;
        const int tile = at.column / kConvBwdSm90Columns;
        float* const out = args.partials + (int64_t{at.segment} * args.sm90.tiles + tile) * params * args.sums;
        // The diagonals: a lane has those of channel g if it has columns 2 t and 2 t + 1 of row g.
        if (g / 2 == t) {
            const auto of_channel = [&](const float(&sums)[4], int half) {
                return g % 2 == 0 ? sums[half * 2] : sums[half * 2 + 1];
            };
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                float* const taps = out + (param + g) * kConvTaps + 3 * i;
                taps[0] = of_channel(walk.douter[i], 0);
                taps[1] = of_channel(walk.dinner[i], 0);
                taps[2] = of_channel(walk.douter[i], 1);
            }
            out[params * kConvTaps + param + g] = of_channel(walk.dinner[2], 1);
        }
        if (args.sums > kConvTaps + 1) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float sum = walk.dx_sum[j];
#pragma unroll
                for (int apart = 4; apart < 32; apart *= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
                if (g == 0) out[params * (kConvTaps + 1) + param + 2 * t + j] = sum;
            }
        }
    }
    if (lane == 0) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

}  // namespace

bool has_depthwise_conv_bwd_sm90() {
    static const bool built = is_built_for(
        reinterpret_cast<const void*>(depthwise_conv_bwd_sm90_kernel<__nv_bfloat16, 8, Activation::kGelu>), 90);
    return built && has_tensor_maps() && capability_of_device() == 90;
}

cudaError_t launch_depthwise_conv_bwd_sm90(const ConvBwdArgs& args, DType dtype, cudaStream_t stream) {
    const ConvShape& s = args.shape;
    return dispatch_conv_sm90<kConvBwdSm90Octets>(
        dtype, args.sm90.octets, s.activation, [&](auto tag, auto octets, auto activation) {
            using Layout =
                Layout<decltype(octets)::value, rows_at_once(decltype(octets)::value, decltype(activation)::value)>;
            KernelArgs maps{{}, {}, {}, {}, args};
            const auto encode = [&](CUtensorMap& map, const ImageArg& image, int columns) {
                return image.ptr == nullptr || encode_rows<typename Layout::Row>(map, image, s, columns, dtype);
            };
            if (!encode(maps.x, args.x, Layout::kColumns + 4) || !encode(maps.dy, args.dy, Layout::kColumns + 2) ||
                !encode(maps.dx, args.dx, Layout::kColumns) || !encode(maps.y, args.y, Layout::kColumns))
                return cudaErrorInvalidValue;
            return launch_kernel(depthwise_conv_bwd_sm90_kernel<typename decltype(tag)::type, decltype(octets)::value,
                                                                decltype(activation)::value>,
                                 args.sm90.blocks, kConvSm90Threads, Layout::kBytes, stream, maps);
        });
}

}  // namespace gm
