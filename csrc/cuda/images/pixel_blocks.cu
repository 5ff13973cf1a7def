// SPDX-License-Identifier: Apache-2.0
// An image of few channels as blocks of 2 x 2 pixels, each block's pixels one after another as channels, with zeros
// around the image and behind the channels of a pixel: cast, padded and put in order in one read and one write.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/packed.cuh"
#include "cuda/images/launch.h"

namespace gm {
namespace {

constexpr int kThreads = 128;

// A block of threads writes one row of blocks of pixels.
template <class In, class T, int kChannels>
__global__ void __launch_bounds__(kThreads) pixel_blocks_kernel(const __grid_constant__ PixelBlocksArgs args) {
    begin_kernel();
    const int64_t image = blockIdx.x / static_cast<unsigned>(args.rows);
    const int row = static_cast<int>(blockIdx.x - image * args.rows);
    const In* const from = static_cast<const In*>(args.x) + image * args.strides[0];
    T* const to = static_cast<T*>(args.out) + int64_t{blockIdx.x} * args.columns * 4 * kChannels;
    for (int column = threadIdx.x; column < args.columns; column += kThreads) {
        float values[4 * kChannels];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int h = 2 * (row - args.before) + i / 2, w = 2 * (column - args.before) + i % 2;
            const bool in = h >= 0 && h < args.height && w >= 0 && w < args.width;
            const In* const pixel = from + h * args.strides[2] + w * args.strides[3];
#pragma unroll
            for (int c = 0; c < kChannels; ++c)
                values[i * kChannels + c] = in && c < args.channels ? to_float(pixel[c * args.strides[1]]) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < 4 * kChannels; i += 8)
            store_packed<8>(to + int64_t{column} * 4 * kChannels + i, values + i, true);
    }
}

}  // namespace

cudaError_t launch_pixel_blocks(const PixelBlocksArgs& args, DType in, DType out, cudaStream_t stream) {
    return dispatch_dtype(out, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<T, float>) {
            return cudaErrorInvalidValue;
        } else {
            return dispatch_dtype(in, [&](auto in_tag) {
                using In = typename decltype(in_tag)::type;
                return launch_kernel(args.channels > 2 ? pixel_blocks_kernel<In, T, 4> : pixel_blocks_kernel<In, T, 2>,
                                     args.batch * args.rows, kThreads, 0, stream, args);
            });
        }
    });
}

}  // namespace gm
