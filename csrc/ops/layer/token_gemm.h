// SPDX-License-Identifier: Apache-2.0
// Products of all tokens of an image with a weight a group: by kernels of our own where weights are narrow, else by
// the library.
#pragma once

#include "host/cuda_args.h"
#include "ops/layer/token_sums.h"

namespace gm {

// out = x weight^T for x (G, T, K), weight (G, N, K), out (G, T, N), all contiguous.
void token_product(const Tensor& out, const Tensor& x, const Tensor& weight, const CudaContext& context);
// True where that is a kernel of our own, not the library's.
bool has_own_product(const Tensor& out, const Tensor& x, const Tensor& weight);

// out += scale * x weight^T, or with a bias out = x weight^T + bias, for matrices: x (T, K), weight (N, K), out (T, N),
// bias (N,).
void token_product_onto(const Tensor& out, double scale, const OptTensor& bias, const Tensor& x, const Tensor& weight,
                        const CudaContext& context);

// dx = scale * dy weight, or with `add` that and what is there, for dy (G, T, N) and dx (G, T, K), or matrices.
void token_product_input(const Tensor& dx, double scale, bool add, const Tensor& dy, const Tensor& weight,
                         const CudaContext& context);

// The product backwards: dx = dy weight, or with `add` dx += dy weight, for dy (G, T, N) whose columns from `used` on
// are pads; and dy^T x in parts. Unless masks_pads says that the kernel leaves the pads out, they must be zeros.
WeightPartials token_product_bwd(const Tensor& dx, bool add, const Tensor& dy, const Tensor& x, const Tensor& weight,
                                 int64_t used, const CudaContext& context);
bool masks_pads(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& weight);

}  // namespace gm
