// SPDX-License-Identifier: Apache-2.0
// Tensor maps of 16-bit tensors.
#pragma once

#include <cstdint>

struct CUtensorMap {
    char* base;
    int64_t sizes[5], strides[5], box[5];  // fastest dimension first; in elements
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE };
