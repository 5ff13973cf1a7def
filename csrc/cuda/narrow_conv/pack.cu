// SPDX-License-Identifier: Apache-2.0
// The weight of a convolution between few channels as conv_sm90a.cu has it in shared memory: (taps of a row; 16-byte
// chunks of input channels; taps of a column K-1, ..., 0, K-1, ..., 1; output channels; 8 input channels).
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/math.cuh"
#include "cuda/narrow_conv/launch.h"
#include "cuda/narrow_conv/plan.h"

namespace gm {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) narrow_conv_pack_kernel(const __grid_constant__ NarrowConvPackArgs args) {
    begin_kernel();
    const int i = blockIdx.x * kThreads + threadIdx.x, taps = args.taps, blocks = 2 * taps - 1;
    if (i >= narrow_conv_packed(args.in_channels, args.out_channels, taps)) return;
    const int low = i % 8, row = i / 8, column = row % args.out_channels, block = row / args.out_channels;
    const int chunk = block / blocks;
    // A thread of the kernel has columns 8 j + 2 q [+ 1] of each 32, j = 0 to 3: they are its 8 adjacent channels.
    const int out = column / 32 * 32 + column / 2 % 4 * 8 + column / 8 % 4 * 2 + column % 2;
    const int in = chunk % (args.in_channels / 8) * 8 + low;
    const int y = taps - 1 - block % blocks % taps, x = chunk / (args.in_channels / 8);
    const int64_t place =
        args.transposed ? in * args.strides[0] + out * args.strides[1] + (taps - 1 - y) * args.strides[2] +
                              (taps - 1 - x) * args.strides[3]
                        : out * args.strides[0] + in * args.strides[1] + y * args.strides[2] + x * args.strides[3];
    static_cast<T*>(args.packed)[i] = from_float<T>(load_param<T>(args.weight, place));
}

}  // namespace

cudaError_t launch_narrow_conv_pack(const NarrowConvPackArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t count = narrow_conv_packed(args.in_channels, args.out_channels, args.taps);
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(narrow_conv_pack_kernel<typename decltype(tag)::type>, div_up(count, kThreads), kThreads,
                             0, stream, args);
    });
}

}  // namespace gm
