// SPDX-License-Identifier: Apache-2.0
// The backward of the depthwise convolution by tensor cores, sm_90, 16-bit storage: what a warp does with a row. Shared
// by bwd_sm90.cu, whose rows come from memory, and ../feed_forward/bwd_sm90a.cu, which computes them.
//
//   pre = bias + conv(x);  g = dy act'(pre);  dx = conv^T(g);  dweight = x g, dbias = sum of g
//
// Row r of x finishes row r - 1 of pre and g, and with it row r - 2 of dx. A warp computes 16 columns of g from 18 of x
// and owns the 14 inner ones of dx, so that no warp waits for another's g. The sums over pixels of dweight are products
// of x at two taps, channels by pixels, and g, pixels by channels; they are on the diagonals of the result. g is
// rounded to 16 bits for the products, as x and dy are.
#pragma once

#include "cuda/common/packed.cuh"
#include "cuda/depthwise_conv/tensor_cores.cuh"

namespace gm {

// kRowsAtOnce rows of x, then as many of dy, in shared memory; and of results, y and then dx.
template <int kOctets, int kRowsAtOnce>
struct ConvBwdRows {
    using Row = PixelRow<kOctets>;
    static constexpr int kRows = kRowsAtOnce;
    static constexpr int kTiles = kConvSm90Warps / kOctets, kColumns = kTiles * kConvBwdSm90Columns;
    // Behind a row of x there are 64 ones.
    static constexpr int kOnes = (kColumns + 4) * Row::kPixel, kX = Row::bytes((kOnes + 128) / Row::kPixel);
    static constexpr int kDy = Row::bytes(kColumns + 2), kOut = Row::bytes(kColumns), kStage = kRows * (kX + kDy);
    static constexpr int kResults = 2 * kRows * kOut;
    // Behind a row of results: where the computed pixels go that are not the warp's own, as far from their place as is
    // a multiple of 8, so that they keep to their banks.
    static __device__ __forceinline__ int aside(int pixel) { return kColumns / 8 * 8 + (pixel & 7); }
    static_assert(kOut >= (kColumns / 8 * 8 + 8) * Row::kPixel);

    // Writes the ones behind the rows of x at `rows`.
    static __device__ __forceinline__ void write_ones(unsigned char* rows, uint32_t ones, int thread) {
        if (thread >= kRows * 8) return;
        *reinterpret_cast<uint4*>(rows + thread / 8 * kX + kOnes + thread % 8 * 16) =
            make_uint4(ones, ones, ones, ones);
    }
};

// What a lane addresses, in rows at `rows` and results at `results`.
template <class Rows>
struct ConvBwdLane {
    using Row = typename Rows::Row;
    int number;       // in its warp
    float in_sum[2];  // of the warp's 16 pixels it has lane / 4 and + 8: 1 where they are its own and in the image
    uint32_t x_outer, x_inner, dy_pixel, result;  // of x the pixels at the outer taps, and at the inner one; y, then dx
    // The same for x as channels by pixels, where the pixels at the inner tap are followed by ones.
    uint32_t outer_channels, inner_channels;

    ConvBwdLane() = default;
    template <class Place>
    __device__ __forceinline__ ConvBwdLane(const Place& at, int width, uint32_t rows, uint32_t results) {
        const int lane = at.lane, g = lane / 4;
        number = lane;
        const bool own[2] = {g > 0, g < 7};
#pragma unroll
        for (int i = 0; i < 2; ++i) in_sum[i] = own[i] && at.column - 1 + g + 8 * i < width ? 1.f : 0.f;
        asm volatile("" : "+f"(in_sum[0]), "+f"(in_sum[1]));  // kept, or each row would make them anew
        const int pixel = at.tile * kConvBwdSm90Columns + lane % 16;
        x_outer = rows + Row::offset(pixel + lane / 16 * 2, at.octet);
        x_inner = rows + Row::offset(pixel + 1, at.octet);
        dy_pixel = rows + Rows::kRows * Rows::kX + Row::offset(pixel, at.octet);
        const int to = lane % 16 == 0 || lane % 16 == 15 ? Rows::aside(pixel - 1) : pixel - 1;
        result = results + lane / 16 * Rows::kRows * Rows::kOut + Row::offset(to, at.octet);
        const int x_pixel = at.tile * kConvBwdSm90Columns + lane % 8 + lane / 16 * 8, second = lane / 8 % 2;
        outer_channels = rows + Row::offset(x_pixel + second * 2, at.octet);
        inner_channels = rows + (second == 1 ? Rows::kOnes + lane % 8 * 16 : Row::offset(x_pixel + 1, at.octet));
    }
};

// What a warp keeps while it goes down the rows.
struct ConvBwdWalk {
    float pre_above[4], pre_level[4], dx_above[4], dx_level[4];
    // Rows of x as channels by pixels: at the outer taps, and at the inner one with ones below it.
    uint32_t outer_above[4], inner_above[4], outer_level[4], inner_level[4];
    // By row of the tap, 16 by 8 channels: of the two outer taps, and of the inner one and, below, of the bias.
    float douter[3][4] = {}, dinner[3][4] = {};
    float dx_sum[2] = {};

    // Above an image.
    __device__ __forceinline__ void begin_image(const float (&bias)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pre_above[i] = pre_level[i] = bias[i], dx_above[i] = dx_level[i] = 0.f;
            outer_above[i] = inner_above[i] = outer_level[i] = inner_level[i] = 0;
        }
    }

    // Row i of those at `stage`; its results go to `half` of theirs. Without has_dx no row of dx is whole.
    template <class T, Activation kActivation, class Rows>
    __device__ __forceinline__ void row(const ConvBwdLane<Rows>& lane, uint32_t stage, int i, uint32_t half,
                                        bool has_dx, const uint32_t (&diagonals)[3][3], const float (&bias)[4]) {
        const int number = lane.number;
        float slope[4] = {1.f, 1.f, 1.f, 1.f}, y[4] = {};
        if constexpr (kActivation != Activation::kNone) {
            uint32_t outer[4], inner[2];
            ldmatrix(outer, lane.x_outer + stage + i * Rows::kX);
            ldmatrix(inner, lane.x_inner + stage + i * Rows::kX);
            add_taps<T>({&slope, &pre_above, &pre_level}, {&pre_above, &pre_level, &bias}, outer, inner, diagonals,
                        {2, 1, 0}, [] {});
            activation_slope<T>(kActivation, slope, y);
        }
        Packed<T, 4> dy;
        ldmatrix(dy.words, lane.dy_pixel + stage + i * Rows::kDy);
        float gradient[4];
        dy.widen(gradient);
#pragma unroll
        for (int k = 0; k < 4; ++k) gradient[k] *= slope[k];
        const uint32_t level[2] = {pack_pair<T>(gradient[0], gradient[1]), pack_pair<T>(gradient[2], gradient[3])};
        // g at the pixels to the right and to the left. The outermost two get what does not matter.
        const int right = (number + 4) % 32, left = (number + 28) % 32;
        const uint32_t sides[4] = {__shfl_sync(kFullWarp, number / 4 == 0 ? level[1] : level[0], right),
                                   __shfl_sync(kFullWarp, level[1], right), __shfl_sync(kFullWarp, level[0], left),
                                   __shfl_sync(kFullWarp, number / 4 == 7 ? level[0] : level[1], left)};
        // x as channels by pixels, g as pixels by channels.
        uint32_t outer_below[4], inner_below[4];
        ldmatrix_trans(outer_below, lane.outer_channels + stage + i * Rows::kX);
        ldmatrix_trans(inner_below, lane.inner_channels + stage + i * Rows::kX);
        const uint32_t g0 = movmatrix_trans(number / 4 > 0 ? level[0] : 0),
                       g1 = movmatrix_trans(number / 4 < 7 ? level[1] : 0);
        float dx[4];
        const float none[4] = {};
        const auto products = [&] {
            warp_mma<T>(douter[0], outer_above, g0, g1, douter[0]);
            warp_mma<T>(dinner[0], inner_above, g0, g1, dinner[0]);
            warp_mma<T>(douter[1], outer_level, g0, g1, douter[1]);
            warp_mma<T>(dinner[1], inner_level, g0, g1, dinner[1]);
            warp_mma<T>(douter[2], outer_below, g0, g1, douter[2]);
            warp_mma<T>(dinner[2], inner_below, g0, g1, dinner[2]);
        };
        add_taps<T>({&dx, &dx_above, &dx_level}, {&dx_above, &dx_level, &none}, sides, level, diagonals, {0, 1, 2},
                    products);
        if (has_dx) {
#pragma unroll
            for (int k = 0; k < 4; ++k) dx_sum[k % 2] = fmaf(lane.in_sum[k / 2], dx[k], dx_sum[k % 2]);
        }
        const uint32_t results[4] = {pack_pair<T>(y[0], y[1]), pack_pair<T>(y[2], y[3]), pack_pair<T>(dx[0], dx[1]),
                                     pack_pair<T>(dx[2], dx[3])};
        stmatrix(lane.result + half + i * Rows::kOut, results);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            outer_above[k] = outer_level[k], outer_level[k] = outer_below[k];
            inner_above[k] = inner_level[k], inner_level[k] = inner_below[k];
        }
    }

    // Writes the warp's sums as its part of a row of args.partials.
    template <class Place>
    __device__ __forceinline__ void leave_sums(const ConvBwdArgs& args, const Place& at) const {
        const ConvShape& s = args.shape;
        const int g = at.lane / 4, t = at.lane % 4;
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
                taps[0] = of_channel(douter[i], 0);
                taps[1] = of_channel(dinner[i], 0);
                taps[2] = of_channel(douter[i], 1);
            }
            out[params * kConvTaps + param + g] = of_channel(dinner[2], 1);
        }
        if (args.sums > kConvTaps + 1) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float sum = dx_sum[j];
#pragma unroll
                for (int apart = 4; apart < 32; apart *= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
                if (g == 0) out[params * (kConvTaps + 1) + param + 2 * t + j] = sum;
            }
        }
    }
};

}  // namespace gm
