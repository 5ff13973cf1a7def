// SPDX-License-Identifier: Apache-2.0
// Tensor maps: how TMA (sm_90 and newer) finds a box of a tensor.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

constexpr int kMapRank = 5;
constexpr int kBoxLimit = 256;  // elements of a box in each dimension

struct TensorMapShape {
    int64_t sizes[kMapRank];        // fastest dimension first; its elements are adjacent
    int64_t strides[kMapRank - 1];  // of the other dimensions, in elements
    int64_t box[3];                 // of the first three
};

// False where this driver encodes no tensor maps.
bool has_tensor_maps();

// A map of a 16-bit tensor, or false where TMA can't move it: its address and strides must be multiples of 16 bytes.
// Elements outside the tensor are read as 0.
bool encode_tensor_map(CUtensorMap& map, const void* tensor, DType dtype, const TensorMapShape& shape,
                       CUtensorMapL2promotion promotion, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE);

}  // namespace gm
