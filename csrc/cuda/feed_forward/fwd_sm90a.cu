// SPDX-License-Identifier: Apache-2.0
// The feed-forward network of a block as one kernel, sm_90a, 16-bit storage:
//
//   out = [x +] fc2 gelu(conv3x3(fc1 LayerNorm(x)))
//
// The hidden image, up to eight times as wide as x, stays on the chip; a backward computes it again. A block owns a
// tile of pixels (see plan.h) and goes through the hidden channels 64 at a time, in two phases with a barrier after
// each:
//
//   products: fc2 of the last 64 channels, added to the sums that the block keeps in registers; fc1 of the next 64 for
//             all pixels of the tile and the ring around it, written to shared memory, 0 outside the image;
//   convolve: convolution and GELU, a warp for 8 channels (convolve.cuh). Meanwhile the weights of the next products
//             arrive.
//
// Two blocks share a multiprocessor, so that the products of one run beside the convolution of the other.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/feed_forward/convolve.cuh"

namespace gm {
namespace {

using namespace feed_forward;

// Which of the pixels whose hidden values a thread holds are in the image: masks of its two pixels in either half of a
// row, and one bit for each row.
struct Inside {
    uint32_t halves[2], rows;
};

// One of a warpgroup's products of fc1.
template <class T, int kBlocks>
__device__ __forceinline__ void fc1_product(float (&sums)[Tile<kBlocks>::kFc1Tokens / 2], uint32_t shared,
                                            int first_token) {
    using Tile = Tile<kBlocks>;
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint64_t weights = panel_descriptor(shared + Tile::kFc1 + b * kWidth * kPanelRow);
            const uint64_t pixels = panel_descriptor(shared + Tile::kX + (b * Tile::kTokens + first_token) * kPanelRow);
            Wgmma<T, Tile::kFc1Tokens>::run(sums, weights + 2 * k, pixels + 2 * k, b + k > 0);
        }
    wgmma_commit();
}

// Writes its sums, with the bias, to the hidden image. `hidden`: where the lane's row of the first matrices belongs.
// The offsets are constants: as many addresses would take registers that the sums of fc2 need.
template <class T, int kBlocks, int kFirstToken>
__device__ __forceinline__ void store_hidden(const float (&sums)[Tile<kBlocks>::kFc1Tokens / 2], const float (&bias)[2],
                                             const Inside& inside, uint32_t hidden) {
    constexpr int kEighths = Tile<kBlocks>::kFc1Tokens / 8;
    uint32_t rows = inside.rows;
    asm volatile("" : "+r"(rows));  // or the masks below are computed before the loop over hidden channels, and kept
    uint32_t words[kEighths][2];    // 8 tokens of 8 channels each
#pragma unroll
    for (int j = 0; j < kEighths; ++j) {
        const int eighth = kFirstToken / 8 + j;
        const uint32_t mask = rows >> eighth / 2 & 1 ? inside.halves[eighth % 2] : 0u;
        const float* const s = sums + 4 * j;
        words[j][0] = pack_pair<T>(s[0] + bias[0], s[1] + bias[0]) & mask;
        words[j][1] = pack_pair<T>(s[2] + bias[1], s[3] + bias[1]) & mask;
        if (j % 2 == 1) {
            stmatrix_trans(hidden + (eighth - 1) * 8 * kPanelRow,
                           {words[j - 1][0], words[j - 1][1], words[j][0], words[j][1]});
        } else if (j == kEighths - 1) {
            stmatrix_trans(hidden + eighth * 8 * kPanelRow, words[j]);
        }
    }
}

// A warpgroup's products of fc2, added to its sums.
template <class T, int kBlocks>
__device__ __forceinline__ void fc2_products(float (&sums)[Tile<kBlocks>::kFc2Units][28], uint32_t shared, int group) {
    using Tile = Tile<kBlocks>;
    wgmma_fence();
#pragma unroll
    for (int unit = 0; unit < Tile::kFc2Units; ++unit) {
        const int tokens = Tile::kTall ? (group * 2 + unit) * Tile::kFc2Tokens : group * Tile::kFc2Tokens;
        const int channels = Tile::kTall ? 0 : unit * kWidth;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint64_t weights = panel_descriptor(shared + Tile::kFc2 + channels * kPanelRow);
            const uint64_t pixels = panel_descriptor(shared + Tile::kActivated + tokens * kPanelRow);
            Wgmma<T, 56>::run(sums[unit], weights + 2 * k, pixels + 2 * k, true);
        }
    }
    wgmma_commit();
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks < 3 ? 2 : 1)
    feed_forward_sm90a_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
    using Tile = Tile<kBlocks>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const FeedForwardArgs& args = maps.args;
    const TilePlace at = tile_place<kBlocks>(args.plan);
    if (!keeps_branch(args.drop_path, at.image)) {
        copy_x<T, kBlocks>(args, at);
        return;
    }
    const uint32_t base = shared_address(shared), barrier = base + Tile::kBarrier;
    // The same for all threads of a warp; the shuffle lets the compiler know.
    const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0), group = warp / 4;
    const int lane = threadIdx.x % 32,
              hidden_channel = warp % 4 * 16 + lane / 4;  // of fc1's sums; the other one is 8 further on
    const uint32_t hidden_matrix =
        base + Tile::kHidden + panel_offset(lane / 16 * 8 + lane % 8, warp % 4 * 2 + lane / 8 % 2);
    const int last = args.plan.hidden_blocks - 1;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 2);  // two loads at a time
        mbarrier_init_fence();
        load_x<T, kBlocks>(maps, at, base, barrier);
        load_fc1<T, kBlocks>(maps, 0, base, barrier);
    }
    Inside inside{};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = at.column - 1 + half * 8 + lane % 4 * 2 + i;
            if (column >= 0 && column < args.width) inside.halves[half] |= 0xffffu << 16 * i;
        }
    for (int row = 0; row < Tile::kInRows; ++row)
        if (at.row - 1 + row >= 0 && at.row - 1 + row < args.height) inside.rows |= 1u << row;
    __syncthreads();
    mbarrier_wait(barrier, 0);
    normalise<T, kBlocks>(args, shared);
    fence_proxy_async();
    __syncthreads();

    float sums[Tile::kFc2Units][28] = {};
    // fc1 of a block of channels, and fc2 of the last one, which runs while the first sums of fc1 are written.
    const auto products = [&](int block, auto with_fc2) {
        const T* const biases =
            reinterpret_cast<const T*>(shared + Tile::kTables + block % 2 * Tile::kTable + Tile::kFc1Bias);
        const float bias[2] = {to_float(biases[hidden_channel]), to_float(biases[hidden_channel + 8])};
        const auto product = [&](auto unit) {
            constexpr bool kBesideFc2 = decltype(with_fc2)::value && decltype(unit)::value == 0;
            constexpr int kToken = decltype(unit)::value * Tile::kFc1Tokens, kHalf = Tile::kTokens / kGroups;
            float hidden[Tile::kFc1Tokens / 2];
            fc1_product<T, kBlocks>(hidden, base, group * kHalf + kToken);
            if constexpr (kBesideFc2) fc2_products<T, kBlocks>(sums, base, group);
            wgmma_wait<kBesideFc2 ? 1 : 0>(hidden);
            if (group == 0) {
                store_hidden<T, kBlocks, kToken>(hidden, bias, inside, hidden_matrix);
            } else {
                store_hidden<T, kBlocks, kHalf + kToken>(hidden, bias, inside, hidden_matrix);
            }
        };
        product(std::integral_constant<int, 0>{});
        if constexpr (Tile::kFc1Units == 2) product(std::integral_constant<int, 1>{});
    };
    products(0, std::false_type{});
    __syncthreads();
    for (int block = 0;; ++block) {
        if (threadIdx.x == 0) {
            load_fc2<T, kBlocks>(maps, block, base, barrier);
            if (block < last) {
                load_fc1<T, kBlocks>(maps, block + 1, base, barrier);
            } else {
                mbarrier_expect(barrier, 0);
            }
        }
        convolve<T, kBlocks>(shared + Tile::kTables + block % 2 * Tile::kTable, warp, base);
        fence_proxy_async();
        __syncthreads();
        mbarrier_wait(barrier, (block + 1) % 2);
        if (block == last) break;
        products(block + 1, std::true_type{});
#pragma unroll
        for (int unit = 0; unit < Tile::kFc2Units; ++unit) wgmma_wait<0>(sums[unit]);
        __syncthreads();
    }
    fc2_products<T, kBlocks>(sums, base, group);
    const Finish<T, kBlocks> finish(args);
#pragma unroll
    for (int unit = 0; unit < Tile::kFc2Units; ++unit) wgmma_wait<0>(sums[unit]);
    __syncthreads();
    finish(sums, group, hidden_channel, shared);
}

template <class T, int kBlocks>
cudaError_t launch(const FeedForwardArgs& args, DType dtype, cudaStream_t stream) {
    KernelArgs kernel{{}, {}, {}, args};
    const int64_t channels = args.channels, hidden = args.hidden_pad;
    const TensorMapShape x{{channels, args.width, args.height, args.batch, 1},
                           {args.x.token, args.x.token * args.width, args.x.batch, 0},
                           {kWidth, kInColumns, Tile<kBlocks>::kInRows}};
    const TensorMapShape fc1{{channels, hidden, 1, 1, 1}, {channels, 0, 0, 0}, {kWidth, kWidth, 1}};
    const TensorMapShape fc2{{hidden, channels, 1, 1, 1}, {hidden, 0, 0, 0}, {kWidth, kWidth, 1}};
    const auto encode = [&](CUtensorMap& map, const void* tensor, const TensorMapShape& shape) {
        return encode_tensor_map(map, tensor, dtype, shape, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_SWIZZLE_128B);
    };
    if (!encode(kernel.x, args.x.ptr, x) || !encode(kernel.fc1, args.fc1_weight, fc1) ||
        !encode(kernel.fc2, args.fc2_weight, fc2))
        return cudaErrorInvalidValue;
    return launch_kernel(feed_forward_sm90a_kernel<T, kBlocks>, args.plan.blocks, kThreads, Tile<kBlocks>::kBytes,
                         stream, kernel);
}

}  // namespace

bool has_feed_forward_sm90a() { return has_tensor_maps() && capability_of_device() == 90; }

cudaError_t launch_feed_forward_sm90a(const FeedForwardArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<T, float>) {
            return cudaErrorInvalidValue;
        } else {
            switch (args.plan.channel_blocks) {
                case 1: return launch<T, 1>(args, dtype, stream);
                case 2: return launch<T, 2>(args, dtype, stream);
                case 3: return launch<T, 3>(args, dtype, stream);
                default: return cudaErrorInvalidValue;
            }
        }
    });
}

}  // namespace gm
