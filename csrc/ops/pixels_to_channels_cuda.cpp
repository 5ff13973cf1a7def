// SPDX-License-Identifier: Apache-2.0
// pixels_to_channels on CUDA: checks, device guard, allocation, launch. Schema and layout: csrc/schemas.cpp.
#include "cuda/images/launch.h"
#include "host/cuda_args.h"
#include "host/stream.h"

namespace gm {
namespace {

Tensor pixels_to_channels(Tensor x, int64_t kernel_size, bool half) {
    const CudaContext context(x);
    GM_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, C, H, W) with elements, got ", show(shape_of(x)));
    GM_CHECK(x.size(1) <= 4, "C must be at most 4, got ", x.size(1));
    GM_CHECK(kernel_size > 0 && kernel_size % 4 == 3, "kernel_size must be 3, 7, 11, ..., got ", kernel_size);
    PixelBlocksArgs args;
    args.batch = x.size(0), args.channels = static_cast<int>(x.size(1));
    const int64_t rows = round_up(x.size(2), 2) / 2 + (kernel_size - 1) / 2,
                  columns = round_up(x.size(3), 2) / 2 + (kernel_size - 1) / 2;
    GM_CHECK(std::max({x.size(2), x.size(3), kernel_size}) < (1 << 29) && args.batch * rows <= INT32_MAX,
             "the image is too large: ", show(shape_of(x)));
    args.height = static_cast<int>(x.size(2)), args.width = static_cast<int>(x.size(3));
    args.rows = static_cast<int>(rows), args.columns = static_cast<int>(columns);
    args.before = static_cast<int>((kernel_size + 1) / 4);
    for (int64_t d = 0; d < 4; ++d) args.strides[d] = x.stride(d);
    const Tensor out = empty({args.batch, rows, columns, 4 * round_up(x.size(1), 2)},
                             half ? ScalarType::Half : ScalarType::BFloat16, x);
    args.x = x.data_ptr(), args.out = out.data_ptr();
    check_cuda(launch_pixel_blocks(args, dtype_of(x), dtype_of(out), context.stream()), "pixels_to_channels");
    return out;
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) { m.impl("pixels_to_channels", TORCH_BOX(&gm::pixels_to_channels)); }
