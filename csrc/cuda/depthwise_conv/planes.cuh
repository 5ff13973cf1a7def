// SPDX-License-Identifier: Apache-2.0
// The 3x3 depthwise convolution with bias and GELU by tensor cores, on 64 channels of a tile of an image; each channel
// is a plane in shared memory. The (14, 16) band matrix of three taps, times 16 columns of a plane's rows, gives a
// part of the sums of 14 columns. That makes three products, one for each row of taps, where 9 multiplications an
// element would take most of the time.
//
// A value that is not finite spreads over all 14 columns and not just over its three neighbours, since 0 times it is
// NaN.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/ptx/mma.cuh"

namespace gm {

constexpr int kConvInColumns = 16, kConvOutColumns = 14;  // of a tile
constexpr int kPlanesOfBlock = 64;                        // channels

// Tiles of 14 or 7 rows.
template <bool kTall>
struct ConvPlanes {
    static constexpr int kOutRows = kTall ? 14 : 7, kInRows = kOutRows + 2, kPixels = kInRows * kConvInColumns;
    // Each plane is followed by 16 bytes, so that the same pixels of 8 planes fill all banks.
    static constexpr int kPlane = kPixels * 2 + 16, kBytes = kPlanesOfBlock * kPlane;
    // The taps of each channel in three rows of four, and behind them the biases in float32.
    static constexpr int kTaps = 12, kBias = kPlanesOfBlock * kTaps * 2, kTable = kBias + kPlanesOfBlock * 4;
    // The pixels of the result in the order in which the products leave them: pixel n is column n % 2 + 2 (n / 8 % 7)
    // of row n / 2 % 4 * kRowStep + n / 8 / 7, so that the 8 pixels that a quarter of a warp writes at once differ in
    // the last three bits of n. Rows 14 and 15 (with 7 rows: row 7) are not used.
    static constexpr int kRowStep = kTall ? 4 : 2, kOutPixels = kConvOutColumns * 4 * kRowStep;
    static __device__ __forceinline__ int row_of(int n) { return n / 2 % 4 * kRowStep + n / 8 / 7; }
    static __device__ __forceinline__ int column_of(int n) { return n % 2 + n / 8 % 7 * 2; }
};

// Where in its plane 8 pixels of a row are, in units of 16 bytes. Those of eight rows, adjacent or (tall) every second
// one, fill all banks.
template <bool kTall>
__device__ __forceinline__ int plane_chunk(int row, int half) {
    return (2 * row + half) ^ (row >> 2 & (kTall ? 3 : 1));
}
// The plane of a channel, chosen so that channels 0, 1, 8, 9, 16, 17, 24 and 25 of 32 are in different banks, as 8
// adjacent ones are.
__device__ __forceinline__ int plane_of(int channel) { return (channel & ~7) | ((channel + 2 * (channel >> 3)) & 7); }

// Convolution and GELU of a warp's 8 channels, from planes to a panel of pixels.
template <class T, bool kTall>
__device__ __forceinline__ void convolve(const unsigned char* table, int warp, uint32_t planes,
                                         unsigned char* activated) {
    using Planes = ConvPlanes<kTall>;
    constexpr int kSums = kTall ? 2 : 1;  // even and odd rows
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // The taps (w0, w1), (w2, 0) of a row are bytes 0 to 7. The words of the band matrix A[m][k] = w[k - m] that this
    // lane holds, elements (g, 2 t) and (g, 2 t + 8) with their neighbours, are picked from them; rows 8 and above
    // hold the first of these 8 columns further on.
    const auto picked = [](int d) {  // 0x1076, 0x3210, 0x5432, 0x7654 for -1 to 2: bytes 6 and 7 are 0
        const uint32_t from = static_cast<uint32_t>(d + 1);
        return from < 4 ? (0x1076u + 0x2222u * from) & 0x7777u : 0x7676u;
    };
    const uint32_t near = picked(2 * t - g), far = picked(2 * t + 8 - g);
    // The rows that this lane addresses, with n = lane % 8: 2 n or 2 n + 1, then two further down; or n, n + 1, then n
    // + 2. Rows beyond the last belong to results that are not used.
    const int half = lane / 8 % 2, second = lane / 16;
    const int row = kTall ? lane % 8 * 2 + second : lane % 8 + second;
    const int next = kTall ? (row + 2) % 16 : lane % 8 == 7 ? 1 : lane % 8 + 2;
    uint32_t rows = planes + plane_chunk<kTall>(row, half) * 16, more = planes + plane_chunk<kTall>(next, half) * 16;
    asm volatile("" : "+r"(rows), "+r"(more));  // or all addresses are kept over the loop of hidden channels
    // Results (s, i): row kSums (2 t + i % 2) + s, column g + 8 (i / 2).
    unsigned char* const to = activated + panel_offset(g % 2 + 2 * t + 8 * (g / 2), warp);
    // Half of the channels are written before the other half is computed: all eight at once would be one access
    // instead of two, but take registers that the sums of fc2 need.
    uint32_t out[kSums * 4][2];  // pairs of channels
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const uint32_t plane =
            plane_of(warp * 8 + pair * 2) * Planes::kPlane;  // the plane of the pair's second channel follows
        float sums[2][kSums][4];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int channel = warp * 8 + pair * 2 + c;
            const uint2* const taps = reinterpret_cast<const uint2*>(table + channel * Planes::kTaps * 2);
            const float bias = reinterpret_cast<const float*>(table + Planes::kBias)[channel];
            const float start[4] = {bias, bias, bias, bias};
            uint32_t band[3][4];
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                const uint2 words = taps[i];
                band[i][0] = band[i][3] = __byte_perm(words.x, words.y, near);
                band[i][1] = 0;
                band[i][2] = __byte_perm(words.x, words.y, far);
            }
            uint32_t a[4];
            ldmatrix(a, rows + plane + c * Planes::kPlane);
            if constexpr (kTall) {
                uint32_t b[4];
                ldmatrix(b, more + plane + c * Planes::kPlane);
                warp_mma<T>(sums[c][0], band[0], a[0], a[1], start);
                warp_mma<T>(sums[c][1], band[0], a[2], a[3], start);
                warp_mma<T>(sums[c][0], band[1], a[2], a[3], sums[c][0]);
                warp_mma<T>(sums[c][1], band[1], b[0], b[1], sums[c][1]);
                warp_mma<T>(sums[c][0], band[2], b[0], b[1], sums[c][0]);
                warp_mma<T>(sums[c][1], band[2], b[2], b[3], sums[c][1]);
            } else {
                uint32_t b[2];
                ldmatrix(b, more + plane + c * Planes::kPlane);
                warp_mma<T>(sums[c][0], band[0], a[0], a[1], start);
                warp_mma<T>(sums[c][0], band[1], a[2], a[3], sums[c][0]);
                warp_mma<T>(sums[c][0], band[2], b[0], b[1], sums[c][0]);
            }
        }
#pragma unroll
        for (int s = 0; s < kSums; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t(&words)[2] = out[s * 4 + i];
                words[pair % 2] = pack_pair<T>(gelu<T>(sums[0][s][i]), gelu<T>(sums[1][s][i]));
                const int eighths = i / 2 * 4 + 7 * (i % 2 * kSums + s);
                if (pair % 2 == 1 && (i < 2 || g < kConvOutColumns - 8))
                    *reinterpret_cast<uint2*>(to + eighths * 8 * kPanelRow + pair / 2 * 8) =
                        make_uint2(words[0], words[1]);
            }
    }
}

}  // namespace gm
