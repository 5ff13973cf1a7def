// SPDX-License-Identifier: Apache-2.0
// Matrix products by cuBLAS: large ones of 16 bits as cublas_lt.h has them, all others as torch calls it, through the C
// interface of the stable ABI, without a dispatcher in between.
#pragma once

#include "host/cublas_lt.h"
#include "host/stream.h"
#include "host/tensor.h"

// CPU builds of torch do not export these. They are weak, so that one libgroupmamba loads under both.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_bmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                             AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_baddbmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                 AtenTensorHandle batch1, AtenTensorHandle batch2,
                                                                 double beta, double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                            AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
}

namespace gm {

// The last two dimensions swapped.
inline Tensor transposed(const Tensor& t) {
    Shape sizes = shape_of(t), strides(sizes.size());
    for (size_t i = 0; i < strides.size(); ++i) strides[i] = t.stride(static_cast<int64_t>(i));
    const size_t last = sizes.size() - 1;
    std::swap(sizes[last], sizes[last - 1]), std::swap(strides[last], strides[last - 1]);
    return alias(t, sizes, strides);
}

// out = alpha * a @ b, or with `add` out += that, for matrices or batches of them.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b, const CudaContext& context,
                       double alpha = 1., bool add = false) {
    if (matmul_without_workspace(out, a, b, alpha, nullptr, add, context.stream())) return;
    if (alpha == 1. && !add) {
        const auto plain = out.dim() == 2 ? &aoti_torch_cuda_mm_out : &aoti_torch_cuda_bmm_out;
        GM_TORCH_CALL(plain(out.get(), a.get(), b.get()));
    } else {
        const auto onto = out.dim() == 2 ? &aoti_torch_cuda_addmm_out : &aoti_torch_cuda_baddbmm_out;
        GM_TORCH_CALL(onto(out.get(), out.get(), a.get(), b.get(), add ? 1. : 0., alpha));
    }
}

// out = a @ b + row, for matrices; row has as many elements as out has columns.
inline void matmul_bias_out(const Tensor& out, const Tensor& row, const Tensor& a, const Tensor& b,
                            const CudaContext& context) {
    if (matmul_without_workspace(out, a, b, 1., &row, false, context.stream())) return;
    GM_TORCH_CALL(aoti_torch_cuda_addmm_out(out.get(), row.get(), a.get(), b.get(), 1., 1.));
}

}  // namespace gm
