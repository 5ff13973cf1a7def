// SPDX-License-Identifier: Apache-2.0
// From the storage type at run time to a template argument: dispatch_dtype(dtype, [](auto tag) { using T = typename
// decltype(tag)::type; }).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/args.h"

namespace gm {

template <class T>
struct TypeTag {
    using type = T;
};

template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kHalf: return f(TypeTag<__half>{});
        case DType::kBFloat16: return f(TypeTag<__nv_bfloat16>{});
        default: return f(TypeTag<float>{});
    }
}

}  // namespace gm
