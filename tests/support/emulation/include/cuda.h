// SPDX-License-Identifier: Apache-2.0
// Tensor maps of 16-bit tensors, and what csrc/cuda/common/tensor_map.cpp asks the driver for.
#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapL2promotion {
    CU_TENSOR_MAP_L2_PROMOTION_NONE,
    CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
};
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_NONE,
    CU_TENSOR_MAP_SWIZZLE_32B,
    CU_TENSOR_MAP_SWIZZLE_64B,
    CU_TENSOR_MAP_SWIZZLE_128B,
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
    char* base;
    int64_t sizes[5], strides[5], box[5];  // fastest dimension first; in elements
    CUtensorMapSwizzle swizzle;
};

// Refuses what the driver does, as far as csrc/cuda/common/tensor_map.cpp does not, and a swizzled box whose rows are
// not as long as the swizzle is wide, which these kernels have none of.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* steps, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    constexpr int64_t kElement = 2;
    if (rank != 5) return CUDA_ERROR_INVALID_VALUE;
    map->base = static_cast<char*>(base), map->swizzle = swizzle;
    for (int d = 0; d < 5; ++d) {
        map->sizes[d] = static_cast<int64_t>(sizes[d]), map->box[d] = box[d];
        map->strides[d] = d > 0 ? static_cast<int64_t>(steps[d - 1]) / kElement : 1;
    }
    const int64_t width = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : int64_t{16} << swizzle;  // bytes
    return width == 0 || map->box[0] * kElement == width ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
