// SPDX-License-Identifier: Apache-2.0
#include "ops/layer/token_gemm.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "cuda/common/tuning.h"
#include "cuda/gemm/launch.h"
#include "host/explain.h"
#include "host/stream.h"

namespace gm {
namespace {

bool aligned(std::initializer_list<const Tensor*> tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const Tensor* t) { return reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0; });
}

// Why cuBLAS takes a product of `tokens` tokens a group and not tall_gemm, or null where tall_gemm does.
const char* why_cublas(std::initializer_list<const Tensor*> tensors, int64_t tokens, int64_t in, int64_t out) {
    if (tokens < tuning::kTallGemmTokens && in * out > tuning::kTallGemmWeight)
        return "the tokens are few for so large a weight";
    if (!aligned(tensors)) return "an address is not aligned to 16 bytes";
    return why_not_tall_gemm(dtype_of(**tensors.begin()), in, out);
}

void note_gemm(const char* kernel, const Tensor& x, const Tensor& weight, const char* why_not = nullptr) {
    if (!explains()) return;
    const std::string reason = why_not == nullptr ? "" : message(", not tall_gemm: ", why_not);
    note("tokens ", show(shape_of(x)), " times weight ", show(shape_of(weight)), ": ", kernel, reason);
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
    return (aligned({&out, &x, &weight}) && takes_skinny_gemm(dtype_of(x), in, columns)) ||
           why_cublas({&out, &x, &weight}, x.size(1), in, columns) == nullptr;
}

void token_gemm(const Tensor& out, const Tensor& x, const Tensor& weight, const CudaContext& context) {
    const DType dtype = dtype_of(x);
    const int64_t in = weight.size(2), columns = weight.size(1);
    if (aligned({&out, &x, &weight}) && takes_skinny_gemm(dtype, in, columns)) {
        auto args = gemm_args<SkinnyGemmArgs>(x, weight);
        args.y = out.data_ptr();
        note_gemm("skinny_gemm", x, weight);
        check_cuda(launch_skinny_gemm_fwd(args, dtype, context.stream()), "skinny_gemm");
    } else if (const char* const why = why_cublas({&out, &x, &weight}, x.size(1), in, columns)) {
        note_gemm("cuBLAS", x, weight, why);
        matmul_out(out, x, transposed(weight), context);
    } else {
        auto args = gemm_args<TallGemmArgs>(x, weight);
        args.y = out.data_ptr();
        note_gemm("tall_gemm", x, weight);
        check_cuda(launch_tall_gemm(args, dtype, context.stream()), "tall_gemm");
    }
}

void token_gemm_onto(const Tensor& out, double scale, const OptTensor& bias, const OptTensor& image, const Tensor& x,
                     const Tensor& weight, const CudaContext& context) {
    const Tensor& row = bias ? *bias : out;
    const char* const why = why_cublas({&out, &x, &weight, &row}, x.size(0), weight.size(1), weight.size(0));
    note_gemm(why == nullptr ? "tall_gemm" : "cuBLAS", x, weight, why);
    if (why == nullptr) {
        auto args = gemm_args<TallGemmArgs>(x, weight);
        args.y = out.data_ptr(), args.scale = static_cast<float>(scale);
        if (bias) args.bias = bias->data_ptr();
        if (image || !bias) args.added = (image ? *image : out).data_ptr();
        check_cuda(launch_tall_gemm(args, dtype_of(x), context.stream()), "tall_gemm");
    } else if (bias) {
        matmul_bias_out(out, *bias, x, transposed(weight), context);
    } else {
        matmul_out(out, x, transposed(weight), context, scale, true);
    }
}

// cuBLAS would take twice the time to add both an image and a bias.
bool takes_residual(const Tensor& out, const Tensor& bias, const Tensor& image, const Tensor& x, const Tensor& weight) {
    return image.is_contiguous() && image.numel() == out.numel() &&
           why_cublas({&out, &x, &weight, &bias, &image}, x.size(0), weight.size(1), weight.size(0)) == nullptr;
}

void token_gemm_input(const Tensor& dx, double scale, bool add, const Tensor& dy, const Tensor& weight,
                      const CudaContext& context) {
    const int64_t last = weight.dim() - 1, tokens = dy.size(last - 1);
    const char* const why = why_cublas({&dx, &dy, &weight}, tokens, weight.size(last - 1), weight.size(last));
    note_gemm(why == nullptr ? "tall_gemm" : "cuBLAS", dy, weight, why);
    if (why == nullptr) {
        auto args = gemm_args<TallGemmArgs>(dy, weight);
        std::swap(args.in, args.out);
        args.y = dx.data_ptr(), args.scale = static_cast<float>(scale), args.transposed = true;
        if (add) args.added = args.y;
        check_cuda(launch_tall_gemm(args, dtype_of(dy), context.stream()), "tall_gemm backward");
    } else {
        matmul_out(dx, dy, weight, context, scale, add);
    }
}

bool masks_pads(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& weight) {
    return dy.size(2) == 4 && is_skinny(dx, dy, x, weight);
}

WeightPartials token_gemm_bwd(const Tensor& dx, bool add, const Tensor& dy, const Tensor& x, const Tensor& weight,
                              int64_t used, const CudaContext& context) {
    const DType dtype = dtype_of(x);
    if (!is_skinny(dx, dy, x, weight)) {
        const WeightPartials partials = weight_partials(dy, x, context);
        token_gemm_input(dx, 1., add, dy, weight, context);
        return partials;
    }
    note_gemm("skinny_gemm backward", x, weight);
    auto args = gemm_args<SkinnyGemmArgs>(x, weight);
    args.dy = dy.data_ptr(), args.dx = dx.data_ptr(), args.add = add, args.used = static_cast<int>(used);
    check_cuda(plan_skinny_gemm_bwd(dtype, args), "skinny_gemm backward");
    const Tensor values = empty({x.size(0) * args.parts, dy.size(2), x.size(2)}, ScalarType::Float, x);
    args.dweight = static_cast<float*>(values.data_ptr());
    check_cuda(launch_skinny_gemm_bwd(args, dtype, context.stream()), "skinny_gemm backward");
    return {values, args.parts};
}

}  // namespace gm
