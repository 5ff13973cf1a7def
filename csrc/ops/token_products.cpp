// SPDX-License-Identifier: Apache-2.0
#include "ops/token_products.h"

#include "host/stream.h"

namespace gm {
namespace {

bool is_narrow(const Tensor& x, const Tensor& weight, const Tensor& y) {
    const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; };
    return takes_narrow_product(dtype_of(x), weight.size(2), weight.size(1)) && aligned(x) && aligned(weight) &&
           aligned(y);
}

NarrowProductArgs product_args(const Tensor& x, const Tensor& weight) {
    NarrowProductArgs args;
    args.x = x.data_ptr(), args.weight = weight.data_ptr();
    args.groups = static_cast<int>(x.size(0)), args.tokens = x.size(1);
    args.in = static_cast<int>(weight.size(2)), args.out = static_cast<int>(weight.size(1));
    return args;
}

}  // namespace

void token_product(const Tensor& out, const Tensor& x, const Tensor& weight, const CudaContext& context) {
    if (!is_narrow(x, weight, out)) return matmul_out(out, x, transposed(weight));
    NarrowProductArgs args = product_args(x, weight);
    args.y = out.data_ptr();
    check_cuda(launch_narrow_product_fwd(args, dtype_of(x), context.stream()), "narrow product");
}

WeightPartials token_product_bwd(const Tensor& dx, bool add, const Tensor& dy, const Tensor& x, const Tensor& weight,
                                 const CudaContext& context) {
    if (!is_narrow(x, weight, dy) || reinterpret_cast<uintptr_t>(dx.data_ptr()) % 16 != 0) {
        const WeightPartials partials = weight_partials(dy, x);
        matmul_onto(dx, add ? 1. : 0., dy, weight, 1.);
        return partials;
    }
    const DType dtype = dtype_of(x);
    NarrowProductArgs args = product_args(x, weight);
    args.dy = dy.data_ptr(), args.dx = dx.data_ptr(), args.add = add;
    check_cuda(plan_narrow_product_bwd(dtype, args), "narrow product's backward");
    const Tensor values = empty({x.size(0) * args.parts, dy.size(2), x.size(2)}, ScalarType::Float, x);
    args.dweight = static_cast<float*>(values.data_ptr());
    check_cuda(launch_narrow_product_bwd(args, dtype, context.stream()), "narrow product's backward");
    return {values, args.parts};
}

}  // namespace gm
