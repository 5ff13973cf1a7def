// SPDX-License-Identifier: Apache-2.0
// The 3x3 depthwise convolution of fwd_sm90a.cu, with bias and GELU, on 64 hidden channels of a tile in shared memory:
// products with weights on diagonals, as depthwise_conv/tensor_cores.cuh has them.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/feed_forward/tile.cuh"

namespace gm::feed_forward {

// A warp's 8 channels, from the panel of hidden pixels to the panel of activated ones. Row r of the first finishes row
// r - 2 of the second, while the products of row r + 1 are on their way. Of 16 pixels of a row the last two read
// across its end, and do not count.
template <class T, int kBlocks>
__device__ __forceinline__ void convolve(const unsigned char* table, int warp, uint32_t shared) {
    using Tile = Tile<kBlocks>;
    constexpr int kOutRows = Tile::kOutRows;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // The weights of channel g on the diagonal: bytes of the row's words (w0, w1), (w2, 0), of which 6 and 7 are 0.
    uint32_t diagonals[3][3];
    const uint2* const taps = reinterpret_cast<const uint2*>(table + (warp * 8 + g) * Tile::kTaps * 2);
    const uint32_t first = g / 2 != t ? 0x7676 : g % 2 == 0 ? 0x7610 : 0x1076;
    const uint32_t step = g / 2 != t ? 0 : g % 2 == 0 ? 0x0022 : 0x2200;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const uint2 row = taps[i];
#pragma unroll
        for (int j = 0; j < 3; ++j) diagonals[i][j] = __byte_perm(row.x, row.y, first + j * step);
    }
    const float2 both = reinterpret_cast<const float2*>(table + Tile::kConvBias)[warp * 4 + t];
    const float bias[4] = {both.x, both.y, both.x, both.y};
    const uint32_t outer_pixel = shared + Tile::kHidden + panel_offset(lane % 16 + lane / 16 * 2, warp),
                   inner_pixel = shared + Tile::kHidden + panel_offset(lane % 16 + 1, warp),
                   result = shared + Tile::kActivated + panel_offset(lane % 16, warp);

    float above[4], level[4], y[4];
#pragma unroll
    for (int row = 0; row <= Tile::kInRows; ++row) {
        float done[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) done[k] = y[k];
        if (row < Tile::kInRows) {
            const bool ends = row >= 2, goes_on = row >= 1 && row <= kOutRows, begins = row < kOutRows;
            uint32_t outer[4], inner[2];
            ldmatrix(outer, outer_pixel + row * kRowBytes);
            ldmatrix(inner, inner_pixel + row * kRowBytes);
            if (ends) warp_mma<T>(y, outer, diagonals[2][0], diagonals[2][2], above);
            if (goes_on) warp_mma<T>(above, outer, diagonals[1][0], diagonals[1][2], level);
            if (begins) warp_mma<T>(level, outer, diagonals[0][0], diagonals[0][2], bias);
            if (ends) warp_mma<T>(y, inner, diagonals[2][1], y);
            if (goes_on) warp_mma<T>(above, inner, diagonals[1][1], above);
            if (begins) warp_mma<T>(level, inner, diagonals[0][1], level);
        }
        if (row >= 3) {
            activate<T>(Activation::kGelu, done);
            stmatrix(result + (row - 3) * kRowBytes, {pack_pair<T>(done[0], done[1]), pack_pair<T>(done[2], done[3])});
        }
    }
}

}  // namespace gm::feed_forward
