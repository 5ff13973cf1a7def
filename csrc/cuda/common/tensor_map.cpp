// SPDX-License-Identifier: Apache-2.0
// The driver's encoder is looked up at run time, so that libgroupmamba does not link libcuda.
#include "cuda/common/tensor_map.h"

#include <cuda_runtime_api.h>

namespace gm {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
    static const Encode encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry)
                                                                             : nullptr;
    }();
    return encoder;
}

}  // namespace

bool has_tensor_maps() { return find_encoder() != nullptr; }

bool encode_tensor_map(CUtensorMap& map, const void* tensor, DType dtype, const TensorMapShape& shape,
                       CUtensorMapL2promotion promotion, CUtensorMapSwizzle swizzle) {
    if (!has_tensor_maps() || dtype == DType::kFloat) return false;
    constexpr int64_t kElement = 2;
    cuuint64_t dims[kMapRank], steps[kMapRank - 1];
    cuuint32_t boxes[kMapRank] = {1, 1, 1, 1, 1}, ones[kMapRank] = {1, 1, 1, 1, 1};
    for (int i = 0; i < kMapRank; ++i) {
        if (shape.sizes[i] < 1 || shape.sizes[i] > INT32_MAX) return false;
        dims[i] = static_cast<cuuint64_t>(shape.sizes[i]);
    }
    for (int i = 0; i < kMapRank - 1; ++i) {
        // Nothing steps along a dimension of size 1: any legal stride will do.
        const int64_t bytes = shape.sizes[i + 1] == 1 ? 16 : shape.strides[i] * kElement;
        if (bytes <= 0 || bytes % 16 != 0 || bytes >= (int64_t{1} << 40)) return false;
        steps[i] = static_cast<cuuint64_t>(bytes);
    }
    for (int i = 0; i < 3; ++i) {
        if (shape.box[i] < 1 || shape.box[i] > kBoxLimit) return false;
        boxes[i] = static_cast<cuuint32_t>(shape.box[i]);
    }
    if (shape.box[0] * kElement % 16 != 0 || reinterpret_cast<uintptr_t>(tensor) % 16 != 0) return false;
    const CUtensorMapDataType type =
        dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return find_encoder()(&map, type, kMapRank, const_cast<void*>(tensor), dims, steps, boxes, ones,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace gm
