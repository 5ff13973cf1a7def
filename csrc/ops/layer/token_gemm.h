// SPDX-License-Identifier: Apache-2.0
// Products of all tokens of an image with a weight for each group: by skinny_gemm or tall_gemm where these are faster,
// else by cuBLAS.
#pragma once

#include "host/cuda_args.h"
#include "ops/layer/token_sums.h"

namespace gm {

// out = x weight^T for x (G, T, K), weight (G, N, K), out (G, T, N), all contiguous.
void token_gemm(const Tensor& out, const Tensor& x, const Tensor& weight, const CudaContext& context);
// True where that is skinny_gemm or tall_gemm and not cuBLAS.
bool has_own_gemm(const Tensor& out, const Tensor& x, const Tensor& weight);

// out += scale * x weight^T, or with a bias, and scale 1, out = [image +] x weight^T + bias, for matrices: x (T, K),
// weight (N, K), out (T, N), bias (N,). The image, (batch, H, W, N), is the residual stream, where takes_residual: else
// it and the bias must be in out before.
void token_gemm_onto(const Tensor& out, double scale, const OptTensor& bias, const OptTensor& image, const Tensor& x,
                     const Tensor& weight, const CudaContext& context);
bool takes_residual(const Tensor& out, const Tensor& bias, const Tensor& image, const Tensor& x, const Tensor& weight);

// dx = scale * dy weight, or with `add` dx += that, for dy (G, T, N) and dx (G, T, K), or matrices.
void token_gemm_input(const Tensor& dx, double scale, bool add, const Tensor& dy, const Tensor& weight,
                      const CudaContext& context);

// The backward of a product: dx = dy weight, or with `add` dx += dy weight, for dy (G, T, N) whose columns from `used`
// on are padding; and dy^T x in parts. The padding must be zeros, unless masks_pads says that the kernel ignores it.
WeightPartials token_gemm_bwd(const Tensor& dx, bool add, const Tensor& dy, const Tensor& x, const Tensor& weight,
                              int64_t used, const CudaContext& context);
bool masks_pads(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& weight);

}  // namespace gm
