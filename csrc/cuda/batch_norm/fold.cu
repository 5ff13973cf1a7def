// SPDX-License-Identifier: Apache-2.0
// A BatchNorm of fixed statistics folded into the convolution before it, in one launch:
//
//   scale = norm_weight / sqrt(variance + eps);  folded = weight scale;  bias = norm_bias - mean scale
//
// The weight of the convolution may have any strides; the folded one is channels-last, in the dtype of the images.
#include "cuda/batch_norm/launch.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/math.cuh"

namespace gm {
namespace {

constexpr int kThreads = 256;

// One thread for each element of the result, in the order of its memory.
template <class T>
__global__ void __launch_bounds__(kThreads) batch_norm_fold_kernel(const __grid_constant__ FoldArgs args) {
    begin_kernel();
    const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int taps = args.folded_taps, channels = args.folded_channels;
    if (element >= int64_t{args.out} * taps * taps * channels) return;
    const int64_t row = element / channels, tap_row = row / taps;
    const int channel = static_cast<int>(element - row * channels), column = static_cast<int>(row - tap_row * taps);
    const int out = static_cast<int>(tap_row / taps), line = static_cast<int>(tap_row - int64_t{out} * taps);

    const float scale = load_param<T>(args.norm_weight, out) / sqrtf(load_param<T>(args.variance, out) + args.eps);
    // Where blocks of 2 x 2 pixels are channels, the kernel's taps begin with the second pixel of the first block.
    int c = channel, h = line, w = column;
    if (args.blocks) {
        const int of_pixel = channels / 4, pixel = channel / of_pixel;
        c = channel - pixel * of_pixel, h = 2 * line + pixel / 2 - 1, w = 2 * column + pixel % 2 - 1;
    }
    float value = 0.f;
    if (c < args.channels && h >= 0 && w >= 0)
        value = load_param<T>(args.weight,
                              out * args.strides[0] + c * args.strides[1] + h * args.strides[2] + w * args.strides[3]);
    static_cast<T*>(args.folded)[element] = from_float<T>(value * scale);
    if (row == int64_t{out} * taps * taps && channel == 0)
        static_cast<T*>(args.bias)[out] =
            from_float<T>(fmaf(-load_param<T>(args.mean, out), scale, load_param<T>(args.norm_bias, out)));
}

}  // namespace

cudaError_t launch_batch_norm_fold(const FoldArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t elements = int64_t{args.out} * args.folded_taps * args.folded_taps * args.folded_channels;
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(batch_norm_fold_kernel<typename decltype(tag)::type>, (elements + kThreads - 1) / kThreads,
                             kThreads, 0, stream, args);
    });
}

}  // namespace gm
