// SPDX-License-Identifier: Apache-2.0
// Tensors to the plain arguments of the CUDA launchers.
#pragma once

#include "cuda/common/args.h"
#include "cuda/scan/plan.h"
#include "host/tensor.h"

namespace gm {

inline DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::kFloat;
        case ScalarType::Half: return DType::kHalf;
        case ScalarType::BFloat16: return DType::kBFloat16;
        default: break;
    }
    GM_CHECK(false, "the CUDA kernels take float32, float16 and bfloat16");
    return DType::kFloat;
}

// For a scan of `dim` channels a group: the kernels save states that many tokens apart.
inline void check_cuda_chunk(int64_t dim, int64_t states, int64_t chunk) {
    GM_CHECK(dim <= kMaxScanDim, "the CUDA scan takes up to ", kMaxScanDim, " channels a group, got ", dim);
    const int expected = scan_chunk(dim, states);
    GM_CHECK(chunk == expected, "on CUDA chunk must be ", expected, " for ", dim, " channels of ", states,
             " states, got ", chunk);
}

// `t` must be canonical (see canonical_image).
inline ImageArg image_arg(const Tensor& t) {
    const ImageStrides s = image_strides(t);
    GM_CHECK(s.token >= 0 && s.token * static_cast<int64_t>(t.element_size()) <= UINT32_MAX,
             "the CUDA kernels take tokens up to 4 GB apart, got a stride of ", s.token, " elements");
    return {t.data_ptr(), s.batch, s.token, s.group};
}

// Holds contiguous copies of parameters, where copies are needed, until the launch is queued.
class ParamHolder {
public:
    ParamArg operator()(const OptTensor& t) {
        if (!t) return {};
        if (t->is_contiguous()) return {t->data_ptr(), is_float(*t)};
        kept_.push_back(contiguous_copy(*t));
        return {kept_.back().data_ptr(), is_float(*t)};
    }

private:
    std::vector<Tensor> kept_;
};

inline ParamOut param_out(const Tensor& t, const OptTensor& input) {
    if (!input) return {};
    return {t.data_ptr(), is_float(t)};
}

// True when every access to `count` adjacent channels of `image` is aligned to its size.
inline bool allows_vectors(const ImageArg& image, int64_t element_size, int64_t count = kVec) {
    if (image.ptr == nullptr) return true;
    const bool strides = image.batch % count == 0 && image.token % count == 0 && image.group % count == 0;
    return strides && reinterpret_cast<uintptr_t>(image.ptr) % (count * element_size) == 0;
}

}  // namespace gm
