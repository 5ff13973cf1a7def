// SPDX-License-Identifier: Apache-2.0
// The gradient of the weight of a convolution of stride 1 between few channels, sm_90a, 16-bit storage:
//
//   dweight[o][i][ty][tx] = sum over pixels (r, c) of dy[r][c][o] x[r + ty - pad][c + tx - pad][i]
//
// as products over the pixels of a row, K across the rows of both factors. Two rows of dy are the 64 rows of a product,
// two rows of x its columns; of the products of two rows of dy with the kTaps + 1 rows of x that they see, a quarter
// belongs to no tap. A warpgroup has one tx, all of which read the same pixels from shared memory.
//
// A block goes through steps, a pair of rows each, image after image, and keeps its sums; a pair of rows of x is loaded
// once and stays for as many steps as it is seen. The first kLead steps of an image, or of a block that begins within
// one, only load.
#include "cuda/common/launch_kernel.cuh"
#include "cuda/narrow_conv/launch.h"
#include "cuda/narrow_conv/rows.cuh"

namespace gm {
namespace {

using namespace narrow_conv;

struct KernelArgs {
    CUtensorMap x, dy;  // two rows of a tile
    NarrowConvWeightArgs args;
};

template <int kIn, int kOut, int kTaps,
          int kColumns>  // of a tile: the compiler has to know how many products there are
struct Layout {
    static_assert(kOut == 32 && kColumns % 16 == 0);
    using X = Pixels<kIn>;
    using Dy = Pixels<kOut>;
    static constexpr int kPairs = (kTaps + 2) / 2, kLead = kPairs - 1;      // pairs of rows of x that a pair of dy sees
    static constexpr int kWarps = 4 * kTaps, kThreads = 32 * (kWarps + 1);  // the last warp loads
    // The swizzle of a pair's second row must begin where that of its first does: whole 8 pixels.
    static constexpr int kXPixels = kColumns + 8, kXRow = kXPixels * X::kBytes, kDyRow = kColumns * Dy::kBytes;
    static_assert(kTaps - 1 <= 8);
    static constexpr int kXPair = X::bytes(2 * kXPixels), kStage = kXPair + Dy::bytes(2 * kColumns);
    static constexpr int kStages = 216 * 1024 / kStage;
    static_assert(kStages >= kLead + 4);
    static constexpr int kBarriers = kStages * kStage, kBytes = kBarriers + 2 * kStages * 8;
    static constexpr int kResults = kOut * kIn * kTaps * kTaps;
    static_assert(kResults * 4 <= kBarriers);
};

template <class T, int kIn, int kOut, int kTaps, int kColumns>
__global__ void __launch_bounds__(Layout<kIn, kOut, kTaps, kColumns>::kThreads, 1)
    narrow_conv_weight_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
    using Layout = Layout<kIn, kOut, kTaps, kColumns>;
    using X = typename Layout::X;
    using Dy = typename Layout::Dy;
    constexpr int kPairs = Layout::kPairs, kLead = Layout::kLead, kStages = Layout::kStages;
    extern __shared__ __align__(1024) unsigned char shared[];
    const NarrowConvWeightArgs& args = maps.args;
    const NarrowConvShape& s = args.shape;
    const uint32_t base = shared_address(shared), full = base + Layout::kBarriers, empty = full + kStages * 8;
    const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0), tap_x = warp / 4;
    const int lane = threadIdx.x % 32;

    // Steps of an image and tile: kLead that only load, then one for each pair of rows of dy.
    const int pairs = (s.out_height + 1) / 2, steps = pairs + kLead;
    const int64_t all = s.batch * args.plan.columns * steps;
    const int64_t first = all * blockIdx.x / args.plan.blocks, end = all * (blockIdx.x + 1) / args.plan.blocks;
    const int64_t begin = first - min(static_cast<int>(first % steps), kLead);

    const auto load = [&](int64_t at) {
        const int64_t tile = at / steps;
        const int image = static_cast<int>(tile / args.plan.columns), step = static_cast<int>(at - tile * steps);
        const int column = static_cast<int>(tile - int64_t{image} * args.plan.columns) * kColumns;
        const int stage = static_cast<int>(at - begin) % kStages;
        const uint32_t barrier = full + stage * 8, to = base + stage * Layout::kStage;
        mbarrier_expect(barrier, 2 * (Layout::kXRow + Layout::kDyRow));
        tma_load(to, &maps.x, {0, column - s.pad, 2 * step - s.pad, image, 0}, barrier);
        // Of a step that only loads, rows above the image: zeros.
        tma_load(to + Layout::kXPair, &maps.dy, {0, column, step < kLead ? -2 : 2 * (step - kLead), image, 0}, barrier);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, Layout::kWarps);
        mbarrier_init_fence();
    }
    __syncthreads();

    float sums[kPairs][kIn];
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
#pragma unroll
        for (int i = 0; i < kIn; ++i) sums[p][i] = 0.f;
    if (warp == Layout::kWarps) {
        for (int64_t at = begin; at < end && lane == 0; ++at) {
            const int turn = static_cast<int>(at - begin);
            if (turn >= kStages) mbarrier_wait(empty + turn % kStages * 8, (turn / kStages - 1) % 2);
            load(at);
        }
    } else {
        const auto arrive = [&](int turn) { mbarrier_wait(full + turn % kStages * 8, turn / kStages % 2); };
        // What no product reads any more once those of step `turn` are done.
        const auto release = [&](int turn) {
            if (turn >= kLead && lane == 0) mbarrier_arrive(empty + (turn - kLead) % kStages * 8);
        };
        int turn = 0;
        for (int64_t at = begin; at < end;) {
            const int64_t tile = at / steps;
            const int of_tile = static_cast<int>(min((tile + 1) * steps, end) - at);
            at += of_tile;
            const int tile_end = turn + of_tile;
#pragma unroll
            for (int i = 0; i < kLead; ++i) {
                if (turn >= tile_end) break;
                arrive(turn);
                release(turn++);
            }
            const int first_product = turn;
            for (; turn < tile_end; ++turn) {
                arrive(turn);
                const uint32_t dy = base + turn % kStages * Layout::kStage + Layout::kXPair;
                uint32_t x[kPairs];
#pragma unroll
                for (int p = 0; p < kPairs; ++p)
                    x[p] = base + (turn - kLead + p) % kStages * Layout::kStage + tap_x * X::kBytes;
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kColumns / 16; ++k) {
                    const uint64_t rows = rows_descriptor<Dy::kBytes>(dy + k * 16 * Dy::kBytes, Layout::kDyRow);
#pragma unroll
                    for (int p = 0; p < kPairs; ++p)
                        Wgmma<T, 2 * kIn, true>::run(
                            sums[p], rows, rows_descriptor<X::kBytes>(x[p] + k * 16 * X::kBytes, Layout::kXRow), true);
                }
                wgmma_commit();
                // The products of the step before are done; those of this one run on beside the next rows' arrival.
                wgmma_wait<1>();
                if (turn > first_product) release(turn - 1);
            }
            wgmma_wait<0>();
            if (turn > first_product) release(turn - 1);  // a block may end with steps that only load
        }
#pragma unroll
        for (int p = 0; p < kPairs; ++p) wgmma_wait<0>(sums[p]);
    }
    __syncthreads();

    // A thread's sum of row m of dy's pair, column n of x's: tap ty = 2 pair + (row of x) - (row of dy).
    float* const results = reinterpret_cast<float*>(shared);
    const int row = warp % 4 / 2, out = warp % 2 * 16 + lane / 4;
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p)
#pragma unroll
            for (int i = 0; i < kIn; ++i) {
                const int n = i / 4 * 8 + lane % 4 * 2 + i % 2, o = out + i / 2 % 2 * 8;
                const int in = n % kIn, tap_y = 2 * p + i / (kIn / 2) - turn;
                float* const to = results + ((o * kIn + in) * kTaps + tap_y) * kTaps + tap_x;
                if (warp == Layout::kWarps || row != turn || tap_y < 0 || tap_y >= kTaps) continue;
                *to = turn == 0 ? sums[p][i] : *to + sums[p][i];
            }
        __syncthreads();
    }
    float* const partials = args.partials + static_cast<int64_t>(blockIdx.x) * Layout::kResults;
    for (int i = threadIdx.x; i < Layout::kResults; i += Layout::kThreads) partials[i] = results[i];
}

template <class T, int kIn, int kOut, int kTaps, int kColumns>
cudaError_t launch(const NarrowConvWeightArgs& args, DType dtype, cudaStream_t stream) {
    using Layout = Layout<kIn, kOut, kTaps, kColumns>;
    const NarrowConvShape& s = args.shape;
    KernelArgs maps{{}, {}, args};
    if (!Pixels<kIn>::encode(maps.x, args.x, s.batch, s.height, s.width, Layout::kXPixels, 2, dtype) ||
        !Pixels<kOut>::encode(maps.dy, args.dy, s.batch, s.out_height, s.out_width, kColumns, 2, dtype))
        return cudaErrorInvalidValue;
    return launch_kernel(narrow_conv_weight_kernel<T, kIn, kOut, kTaps, kColumns>, args.plan.blocks, Layout::kThreads,
                         Layout::kBytes, stream, maps);
}

template <class T, int kIn, int kOut, int kTaps>
cudaError_t launch(const NarrowConvWeightArgs& args, DType dtype, cudaStream_t stream) {
    return args.plan.tile == 112 ? launch<T, kIn, kOut, kTaps, 112>(args, dtype, stream)
                                 : launch<T, kIn, kOut, kTaps, 128>(args, dtype, stream);
}

}  // namespace

cudaError_t launch_narrow_conv_weight(const NarrowConvWeightArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_narrow_conv(dtype, args.shape, [&](auto tag, auto in, auto out, auto taps) {
        return launch<typename decltype(tag)::type, decltype(in)::value, decltype(out)::value, decltype(taps)::value>(
            args, dtype, stream);
    });
}

}  // namespace gm
