// SPDX-License-Identifier: Apache-2.0
#include "ops/layer/token_gemm.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "cuda/gemm/launch.h"
#include "host/stream.h"

namespace gm {
namespace {

bool aligned(std::initializer_list<const Tensor*> tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const Tensor* t) { return reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0; });
}

// With few tokens, copying a large weight to shared memory takes most of the kernel's time, and cuBLAS is faster: at
// 448 x 7, with 6,272 tokens a group and 50 KB, but not at 348 x 14, with 25,088 tokens and 37 KB.
bool takes_tall(const Tensor& x, int64_t tokens, int64_t in, int64_t out) {
    constexpr int64_t kManyTokens = 1 << 14, kSmallWeight = 1 << 12;  // elements
    return (tokens >= kManyTokens || in * out <= kSmallWeight) && takes_tall_gemm(dtype_of(x), in, out);
}

// x (G, T, K), or (T, K), and weight (G, N, K), or (N, K).
template <class Args>
Args gemm_args(const Tensor& x, const Tensor& weight) {
    const bool one = x.dim() == 2;
    Args args;
    args.x = x.data_ptr(), args.weight = weight.data_ptr();
    args.groups = one ? 1 : static_cast<int>(x.size(0)), args.tokens = x.size(one ? 0 : 1);
    args.in = static_cast<int>(weight.size(one ? 1 : 2)), args.out = static_cast<int>(weight.size(one ? 0 : 1));
    return args;
}

bool is_skinny(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& weight) {
    return aligned({&dx, &dy, &x, &weight}) && takes_skinny_gemm(dtype_of(x), weight.size(2), weight.size(1));
}

}  // namespace

bool has_own_gemm(const Tensor& out, const Tensor& x, const Tensor& weight) {
    const int64_t in = weight.size(2), columns = weight.size(1);
    return aligned({&out, &x, &weight}) &&
           (takes_skinny_gemm(dtype_of(x), in, columns) || takes_tall(x, x.size(1), in, columns));
}

void token_gemm(const Tensor& out, const Tensor& x, const Tensor& weight, const CudaContext& context) {
    const DType dtype = dtype_of(x);
    if (!has_own_gemm(out, x, weight)) {
        matmul_out(out, x, transposed(weight));
    } else if (takes_skinny_gemm(dtype, weight.size(2), weight.size(1))) {
        auto args = gemm_args<SkinnyGemmArgs>(x, weight);
        args.y = out.data_ptr();
        check_cuda(launch_skinny_gemm_fwd(args, dtype, context.stream()), "skinny_gemm");
    } else {
        auto args = gemm_args<TallGemmArgs>(x, weight);
        args.y = out.data_ptr();
        check_cuda(launch_tall_gemm(args, dtype, context.stream()), "tall_gemm");
    }
}

void token_gemm_onto(const Tensor& out, double scale, const OptTensor& bias, const Tensor& x, const Tensor& weight,
                     const CudaContext& context) {
    const DType dtype = dtype_of(x);
    if (aligned({&out, &x, &weight}) && (!bias || aligned({&*bias})) &&
        takes_tall(x, x.size(0), weight.size(1), weight.size(0))) {
        auto args = gemm_args<TallGemmArgs>(x, weight);
        args.y = out.data_ptr(), args.scale = static_cast<float>(scale), args.add = !bias;
        if (bias) args.bias = bias->data_ptr();
        check_cuda(launch_tall_gemm(args, dtype, context.stream()), "tall_gemm");
    } else if (bias) {
        matmul_bias_out(out, *bias, x, transposed(weight));
    } else {
        add_matmul(out, x, transposed(weight), scale);
    }
}

void token_gemm_input(const Tensor& dx, double scale, bool add, const Tensor& dy, const Tensor& weight,
                      const CudaContext& context) {
    const int64_t last = weight.dim() - 1, tokens = dy.size(last - 1);
    if (aligned({&dx, &dy, &weight}) && takes_tall(dy, tokens, weight.size(last - 1), weight.size(last))) {
        auto args = gemm_args<TallGemmArgs>(dy, weight);
        std::swap(args.in, args.out);
        args.y = dx.data_ptr(), args.scale = static_cast<float>(scale), args.add = add, args.transposed = true;
        check_cuda(launch_tall_gemm(args, dtype_of(dy), context.stream()), "tall_gemm backward");
    } else if (add) {
        add_matmul(dx, dy, weight, scale);
    } else {
        matmul_out(dx, dy, weight, scale);
    }
}

bool masks_pads(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& weight) {
    return dy.size(2) == 4 && is_skinny(dx, dy, x, weight);
}

WeightPartials token_gemm_bwd(const Tensor& dx, bool add, const Tensor& dy, const Tensor& x, const Tensor& weight,
                              int64_t used, const CudaContext& context) {
    const DType dtype = dtype_of(x);
    if (!is_skinny(dx, dy, x, weight)) {
        const WeightPartials partials = weight_partials(dy, x);
        token_gemm_input(dx, 1., add, dy, weight, context);
        return partials;
    }
    auto args = gemm_args<SkinnyGemmArgs>(x, weight);
    args.dy = dy.data_ptr(), args.dx = dx.data_ptr(), args.add = add, args.used = static_cast<int>(used);
    check_cuda(plan_skinny_gemm_bwd(dtype, args), "skinny_gemm backward");
    const Tensor values = empty({x.size(0) * args.parts, dy.size(2), x.size(2)}, ScalarType::Float, x);
    args.dweight = static_cast<float*>(values.data_ptr());
    check_cuda(launch_skinny_gemm_bwd(args, dtype, context.stream()), "skinny_gemm backward");
    return {values, args.parts};
}

}  // namespace gm
