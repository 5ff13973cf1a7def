// SPDX-License-Identifier: Apache-2.0
// Every number that was fitted to one GPU, an H100 or H200 of 132 multiprocessors, and not derived from the sizes or
// the device. They decide how fast kernels are, through block counts in which order partial sums of parameter gradients
// are added, and which convolutions round float32 weights to bfloat16; nothing else. To tune for another GPU, measure
// each of them anew (bench/run.py). What follows from the registers of one architecture stands beside the kernel:
// norm_resident in layer_norm/plan.h, and the second argument of each __launch_bounds__.
#pragma once

#include <cstdint>

namespace gm::tuning {

constexpr int64_t kMultiprocessors = 132;

// LayerNorm: what a block does once, tables of parameters and sums over its threads, in units of a step's time; and it
// leaves a row for the second stage of the sums. With fewer blocks than kNormFewBlocks, strips become shorter than
// kNormEnoughTokens, where that row is already an eighth of the traffic.
constexpr int64_t kNormOnce = 2, kNormFewBlocks = 1024, kNormEnoughTokens = 16;

// Depthwise convolution, forward: with fewer threads than kConvManyThreads, some four waves, strips of 14 rows balance
// the load; with fewer than kConvFewThreads, less than one wave, latency counts and strips go down to 2 rows.
constexpr int64_t kConvManyThreads = 1 << 18, kConvFewThreads = 3 << 14;
// Backward: small images share a block of up to kConvEnoughTokens while there are kConvEnoughBlocks, two waves; with
// fewer blocks than kConvFewBlocks images are split by rows.
constexpr int64_t kConvEnoughBlocks = 768, kConvFewBlocks = 1024, kConvEnoughTokens = 384;
// By tensor cores, with fewer blocks than multiprocessors, or where much of a block has no pixels, the threads of the
// other kernel are faster.
constexpr int64_t kConvSm90Blocks = kMultiprocessors;
constexpr double kConvSm90Filled = 0.6;
// What one of its blocks does once, in units of a row's time.
constexpr double kConvSm90Once = 16;

// BatchNorm: at most as many blocks as take least time, whole rounds or nearly so of the four, five and three that an
// SM has registers for.
constexpr int64_t kBatchNormFwdSums = 4 * kMultiprocessors, kBatchNormApply = 9 * kMultiprocessors,
                  kBatchNormBwdBlocks = 6 * kMultiprocessors;

// The feed-forward network in one kernel: tiles for three quarters of the multiprocessors, 70% of their pixels inside
// the image.
constexpr int64_t kFeedForwardTiles = 96;
constexpr double kFeedForwardFilled = 0.7;

// tall_gemm: with fewer tokens a group, copying a weight of more elements to shared memory takes most of its time, and
// cuBLAS is faster: at 448 x 7, with 6,272 tokens and 50 KB, but not at 348 x 14, with 25,088 tokens and 37 KB.
constexpr int64_t kTallGemmTokens = 1 << 14, kTallGemmWeight = 1 << 12;

// Products of so many results, or more, go to cuBLASLt without a workspace: smaller ones take no memset as torch calls
// them.
constexpr int64_t kNoWorkspaceLeast = 1 << 22;

// Weight gradients: parts whose tiles of 64 x 64 fill the GPU twice. Where both sides are long, tensor cores are the
// limit, which larger tiles keep busier than those of 64 x 128 that cuBLAS takes to fill the GPU with fewer parts:
// there parts whose tiles of 128 x 128 fill it once (25,088 tokens: 1,392 x 352 in 4 parts 40 us, in 2 51; 352 x 352 in
// 14 parts 16.7 us, in 8 17.8). Sums over columns: two blocks an SM.
constexpr int64_t kWeightTile = 64, kWeightTiles = 2 * kMultiprocessors;
constexpr int64_t kLongSide = 256, kLongTile = 128, kLongTiles = kMultiprocessors;
constexpr int64_t kColumnSumBlocks = 2 * kMultiprocessors;

// Blocks that share a plane of the scan, in units of a tile's time: what a tile waits for the others for each doubling
// of the team; what is paid once, a cooperative launch and, outside a layer's forward, clearing the memory for the
// states; how much longer a tile takes where more images are read at once than the L2 cache holds, from kShareCached of
// its size on, rising over kShareRise of it.
constexpr double kShareWaits = 0.09, kShareOnce = 1., kShareLost = 0.65, kShareCached = 0.4, kShareRise = 1.2;

}  // namespace gm::tuning
