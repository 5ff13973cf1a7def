// SPDX-License-Identifier: Apache-2.0
// Rows of an image as operands and results of warp_mma, straight from and to device memory.
//
// The order of the terms of a sum, and of the columns of a result, is free. Lane 4 r + q holds row r (and r + 8) of a
// tile of 16 rows: in every window of up to 32 columns the q-th quarter, which of 32 columns is 8 q to 8 q + 7, one
// access of 16 bytes, as four pairs. The i-th pairs of all four lanes q are what warp_mma takes as 8 adjacent columns.
#pragma once

#include "cuda/common/packed.cuh"
#include "cuda/common/ptx/mma.cuh"

namespace gm {

constexpr int kTileRows = 16;

// A lane's part of one row of kWidth columns. Of 4 columns, two lanes hold a pair each and the others zeros.
template <int kWidth>
struct RowPart {
    static constexpr int kWindow = kWidth < 8 ? 8 : kWidth < 32 ? kWidth : 32;
    static constexpr int kWindows = (kWidth + kWindow - 1) / kWindow, kWords = kWindow / 8, kPairs = kWindows * kWords;
    static_assert(kWidth == 4 || (kWidth % 8 == 0 && kWidth % kWindow == 0));
    uint32_t pairs[kPairs];

    static __device__ __forceinline__ bool exists(int column) {
        return kWidth == kWindow * kWindows || column < kWidth;
    }

    // The first of the two columns of a pair of lane q.
    static __device__ __forceinline__ int column(int pair, int q) {
        return pair / kWords * kWindow + q * (kWindow / 4) + pair % kWords * 2;
    }
    template <class T>
    __device__ __forceinline__ void load(const T* row, int q, bool in) {
#pragma unroll
        for (int v = 0; v < kWindows; ++v) {
            const auto words =
                load_packed<2 * kWords>(row + column(v * kWords, q), in && exists(column(v * kWords, q)));
#pragma unroll
            for (int w = 0; w < kWords; ++w) pairs[v * kWords + w] = words.words[w];
        }
    }
    template <class T>
    __device__ __forceinline__ void store(T* row, int q, bool in) const {
        using Access = WordsOf<4 * kWords>;
#pragma unroll
        for (int v = 0; v < kWindows; ++v) {
            Access words;
            memcpy(&words, pairs + v * kWords, sizeof(words));
            if (in && exists(column(v * kWords, q))) *reinterpret_cast<Access*>(row + column(v * kWords, q)) = words;
        }
    }
};

}  // namespace gm
