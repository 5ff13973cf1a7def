// SPDX-License-Identifier: Apache-2.0
// Rows of pixels in shared memory, as all kernels of this folder have them: pixel after pixel, by TMA, swizzled by as
// many bytes as a pixel has. A product may begin at any pixel, which is what the taps of a convolution need.
#pragma once

#include "cuda/common/dispatch.h"
#include "cuda/common/math.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/narrow_conv/args.h"
#include "cuda/narrow_conv/plan.h"

namespace gm::narrow_conv {

template <int kChannels>
struct Pixels {
    static constexpr int kBytes = kChannels * 2;
    static constexpr CUtensorMapSwizzle kSwizzle = kBytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                                   : kBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
    // Bytes of so many pixels, up to where the swizzle begins anew.
    static constexpr int bytes(int pixels) { return (pixels * kBytes + 1023) / 1024 * 1024; }

    // A tensor map of an image (batch, height, width, kChannels); a box has `columns` pixels of `rows` rows.
    static bool encode(CUtensorMap& map, const void* image, int64_t batch, int height, int width, int columns, int rows,
                       DType dtype) {
        const int64_t row = int64_t{width} * kChannels;
        const TensorMapShape shape{
            {kChannels, width, height, batch, 1}, {kChannels, row, row * height, 0}, {kChannels, columns, rows}};
        return encode_tensor_map(map, image, dtype, shape, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, kSwizzle);
    }
};

// From the channels and taps at run time to template arguments: f(type tag, in, out, taps), constants; the
// convolutions of takes_narrow_conv, not for float.
template <class F>
cudaError_t dispatch_narrow_conv(DType dtype, const NarrowConvShape& s, const F& f) {
    const auto is = [&](int in, int out, int taps) {
        return s.in_channels == in && s.out_channels == out && s.taps == taps;
    };
    return dispatch_dtype(dtype, [&](auto tag) {
        using std::integral_constant;
        if constexpr (!std::is_same_v<typename decltype(tag)::type, float>) {
            if (is(32, 32, 3))
                return f(tag, integral_constant<int, 32>{}, integral_constant<int, 32>{}, integral_constant<int, 3>{});
            if (is(16, 32, 4))
                return f(tag, integral_constant<int, 16>{}, integral_constant<int, 32>{}, integral_constant<int, 4>{});
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace gm::narrow_conv
