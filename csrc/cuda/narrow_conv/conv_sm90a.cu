// SPDX-License-Identifier: Apache-2.0
// A convolution of stride 1 between few channels, sm_90a, 16-bit storage. With 32 channels a pixel is 64 bytes, and an
// image passes memory faster than a general kernel multiplies it: here a row of x is loaded once, multiplied once with
// all taps of a column at the same time, and added to as many rows of y as there are taps.
//
//   y[r] = sum over t of x[r + t - pad] taps[t]:  a product of row l of x with taps t = l - j for the rows j of y that
//   it belongs to. Row j lives in registers from row l = j on, and is whole after row l = j + taps - 1.
//
// A block owns a strip of rows, 128 columns wide; each of its two warpgroups has 64 pixels. The sums of row j are block
// j % kTaps of a product's columns, so which tap belongs to which block goes round with l: the weights lie in shared
// memory as taps K-1, ..., 0, K-1, ..., 1 (pack.cu), and a product begins at the tap that its first block needs.
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/packed.cuh"
#include "cuda/narrow_conv/launch.h"
#include "cuda/narrow_conv/rows.cuh"

namespace gm {
namespace {

using namespace narrow_conv;

constexpr int kThreads = 256, kWarps = kThreads / 32, kColumns = kNarrowConvColumns;

struct KernelArgs {
    CUtensorMap x;
    NarrowConvArgs args;
};

template <int kIn, int kOut, int kTaps>
struct Layout {
    using X = Pixels<kIn>;
    static constexpr int kStages = 6;
    static constexpr int kPlane = (2 * kTaps - 1) * kOut * 16, kTapX = kIn / 8 * kPlane, kWeights = kTaps * kTapX;
    static constexpr int kRow = X::bytes(kColumns + kTaps - 1);
    static constexpr int kRing = 0, kWeight = kRing + kStages * kRow, kBias = kWeight + kWeights;
    static constexpr int kBarriers = kBias + kOut * 4, kBytes = kBarriers + (2 * kStages + 1) * 8;
    static constexpr int kSums = kOut / 2;  // of a thread for a row of y
};

template <class T, int kIn, int kOut, int kTaps>
__global__ void __launch_bounds__(kThreads, 2) narrow_conv_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
    using Layout = Layout<kIn, kOut, kTaps>;
    using X = typename Layout::X;
    constexpr int kStages = Layout::kStages;
    extern __shared__ __align__(1024) unsigned char shared[];
    const NarrowConvArgs& args = maps.args;
    const NarrowConvShape& s = args.shape;
    const uint32_t base = shared_address(shared), full = base + Layout::kBarriers, empty = full + kStages * 8,
                   weights_there = empty + kStages * 8;
    const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0), group = warp / 4;
    const int lane = threadIdx.x % 32;

    const int blocks = args.plan.strips * args.plan.columns, block = blockIdx.x % blocks;
    const int image = blockIdx.x / blocks;
    const int strip = block / args.plan.columns, first_column = block % args.plan.columns * kColumns;
    const int begin = static_cast<int>(int64_t{strip} * s.out_height / args.plan.strips),
              end = static_cast<int>(int64_t{strip + 1} * s.out_height / args.plan.strips);
    const int columns = min(kColumns, s.out_width - first_column);
    const int rows = end - begin + kTaps - 1;  // of x

    const auto load_row = [&](int l) {
        const uint32_t barrier = full + l % kStages * 8;
        mbarrier_expect(barrier, (min(kColumns, s.out_width) + kTaps - 1) * X::kBytes);
        tma_load(base + Layout::kRing + l % kStages * Layout::kRow, &maps.x,
                 {0, first_column - s.pad, begin + l - s.pad, image, 0}, barrier);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, kWarps);
        mbarrier_init(weights_there, 1);
        mbarrier_init_fence();
        mbarrier_expect(weights_there, Layout::kWeights);
        bulk_load(base + Layout::kWeight, args.weight, Layout::kWeights, weights_there);
        for (int l = 0; l < min(kStages - 1, rows); ++l) load_row(l);
    }
    if (threadIdx.x < kOut)
        reinterpret_cast<float*>(shared + Layout::kBias)[threadIdx.x] = load_param_or<T>(args.bias, threadIdx.x, 0.f);

    float sums[kTaps * Layout::kSums];
    const auto start = [&](auto phase) {  // the sums of a row of y
        constexpr int kAt = decltype(phase)::value * Layout::kSums;
#pragma unroll
        for (int i = 0; i < kOut / 32; ++i) {
            const float4* const bias =
                reinterpret_cast<const float4*>(shared + Layout::kBias + i * 128 + lane % 4 * 32);
            const float4 low = bias[0], high = bias[1];
            const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[kAt + i * 16 + 4 * j + k] = values[2 * j + k % 2];
        }
    };
    const int pixel = group * 64 + warp % 4 * 16 + lane / 4;
    T* const y = static_cast<T*>(args.y) + (int64_t{image} * s.out_height * s.out_width + first_column + pixel) * kOut +
                 lane % 4 * 8;
    uint32_t words[kOut / 32][2][4];  // a whole row of y
    const auto take = [&](auto phase) {
        constexpr int kAt = decltype(phase)::value * Layout::kSums;
#pragma unroll
        for (int i = 0; i < kOut / 32; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float a = sums[kAt + i * 16 + 4 * j + 2 * half], b = sums[kAt + i * 16 + 4 * j + 2 * half + 1];
                    if (args.relu) a = a < 0.f ? 0.f : a, b = b < 0.f ? 0.f : b;  // NaN stays NaN
                    words[i][half][j] = pack_pair<T>(a, b);
                }
    };
    const auto store = [&](int row) {
        T* const to = y + int64_t{row} * s.out_width * kOut;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (pixel + 8 * half >= columns) continue;
#pragma unroll
            for (int i = 0; i < kOut / 32; ++i) store_words(to + half * 8 * kOut + i * 32, words[i][half]);
        }
    };
    __syncthreads();
    mbarrier_wait(weights_there, 0);
#pragma unroll
    for (int i = 0; i < kTaps * Layout::kSums; ++i) sums[i] = 0.f;
    start(std::integral_constant<int, 0>{});
    const auto step = [&](auto phase, int l) {  // phase = l % kTaps
        constexpr int kPhase = decltype(phase)::value;
        mbarrier_wait(full + l % kStages * 8, l / kStages % 2);
        wgmma_fence();
        const uint32_t row = base + Layout::kRing + l % kStages * Layout::kRow + group * 64 * X::kBytes;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
            for (int k = 0; k < kIn / 16; ++k) {
                const uint64_t pixels = rows_descriptor<X::kBytes>(row + tap * X::kBytes + k * 32, 16);
                const uint64_t weights = chunk_descriptor(base + Layout::kWeight + tap * Layout::kTapX +
                                                              2 * k * Layout::kPlane + (kTaps - 1 - kPhase) * kOut * 16,
                                                          Layout::kPlane);
                Wgmma<T, kTaps * kOut>::run(sums, pixels, weights, true);
            }
        wgmma_commit();
        // Beside the products: the row that was whole a step ago, and the row that comes into its place in the ring.
        if (l >= kTaps) store(begin + l - kTaps);
        if (threadIdx.x == 0 && l + kStages - 1 < rows) {
            if (l > 0) mbarrier_wait(empty + (l - 1) % kStages * 8, (l - 1) / kStages % 2);
            load_row(l + kStages - 1);
        }
        __syncwarp();
        wgmma_wait<0>(sums);
        if (lane == 0) mbarrier_arrive(empty + l % kStages * 8);
        constexpr int kDone = (kPhase + 1) % kTaps;
        take(std::integral_constant<int, kDone>{});
        start(std::integral_constant<int, kDone>{});
    };
    for (int l = 0;;) {
        step(std::integral_constant<int, 0>{}, l);
        if (++l == rows) break;
        step(std::integral_constant<int, 1>{}, l);
        if (++l == rows) break;
        step(std::integral_constant<int, 2>{}, l);
        if (++l == rows) break;
        if constexpr (kTaps == 4) {
            step(std::integral_constant<int, 3>{}, l);
            if (++l == rows) break;
        }
    }
    store(end - 1);
}

template <class T, int kIn, int kOut, int kTaps>
cudaError_t launch(const NarrowConvArgs& args, DType dtype, cudaStream_t stream) {
    KernelArgs maps{{}, args};
    const NarrowConvShape& s = args.shape;
    if (!Pixels<kIn>::encode(maps.x, args.x, s.batch, s.height, s.width, std::min(kColumns, s.out_width) + kTaps - 1, 1,
                             dtype))
        return cudaErrorInvalidValue;
    return launch_kernel(narrow_conv_kernel<T, kIn, kOut, kTaps>, args.plan.blocks, kThreads,
                         Layout<kIn, kOut, kTaps>::kBytes, stream, maps);
}

}  // namespace

bool has_narrow_conv() { return has_tensor_maps() && capability_of_device() == 90; }

cudaError_t launch_narrow_conv(const NarrowConvArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_narrow_conv(dtype, args.shape, [&](auto tag, auto in, auto out, auto taps) {
        return launch<typename decltype(tag)::type, decltype(in)::value, decltype(out)::value, decltype(taps)::value>(
            args, dtype, stream);
    });
}

}  // namespace gm
