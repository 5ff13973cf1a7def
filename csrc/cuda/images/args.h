// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels that sum, clear and copy whole images.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

// out[i] = sum over k of in[k * stride + i], i < count; k < parts. Where `channels` is not 0, i counts rows of so many
// elements, which are `pitch` apart in `in`.
struct SumImagesArgs {
    const void* in = nullptr;
    void* out = nullptr;
    int64_t count = 0, stride = 0;
    int parts = 0, channels = 0, pitch = 0;
};

// Zeros in the images whose branch is dropped; each is `bytes` long, all one after another.
struct ClearImagesArgs {
    void* images = nullptr;
    int64_t batch = 0, bytes = 0;  // a multiple of 16, from an address that is one too
    DropPathArg drop_path;
};

// Copies rows of `channels` elements, `stride` apart, to rows of `width` elements, with zeros at the end where that is
// more; the same for several images. `to` begins at a multiple of 16 bytes.
struct CopyRowsArgs {
    const void* from[3] = {};
    void* to[3] = {};
    int images = 1;
    int64_t rows = 0, stride = 0;
    int channels = 0, width = 0;
};

// An image (batch, channels, height, width), of any strides, as blocks of 2 x 2 pixels: (batch, rows, columns, 4 C'),
// C' being 2 for up to 2 channels and 4 for up to 4. `before`: rows, and columns, of blocks before the first of the
// image.
struct PixelBlocksArgs {
    const void* x = nullptr;
    void* out = nullptr;
    int64_t batch = 0, strides[4] = {};
    int channels = 0, height = 0, width = 0, rows = 0, columns = 0, before = 0;
};

}  // namespace gm
