// SPDX-License-Identifier: Apache-2.0
// Gradients of parameters that all tokens share: partial sums, which ParameterSums adds.
#pragma once

#include "cuda/images/launch.h"
#include "cuda/parameters/launch.h"
#include "host/blas.h"
#include "host/cuda_args.h"
#include "host/stream.h"
#include "ops/layer/parameter_pack.h"

namespace gm {

// Partial products alpha dy^T x over parts of the tokens, for dy (G, T, N) and x (G, T, K), both contiguous. The
// gradient of a small weight is one tile of work with hundreds of thousands of terms, which cuBLAS would run on a few
// multiprocessors. (G * parts, N, K) in the dtype of the images; ParameterSums sums over the parts.
struct WeightPartials {
    Tensor values;
    int64_t parts;
};
WeightPartials weight_partials(const Tensor& dy, const Tensor& x, const CudaContext& context, double alpha = 1.);

// The gradient of a bias: the sum over the rows of a matrix, of its first columns. Images have `rows_of_image` rows
// each, multiplied as `drop_path` says.
Tensor sum_of_columns(ParameterSums& sums, const Tensor& bias, const Tensor& rows, int64_t columns, DType dtype,
                      cudaStream_t stream, const DropPathArg& drop_path, int64_t rows_of_image);

// The pixels of an image (batch, H, W, C) as rows (tokens, C rounded up to kPixelUnit); a copy only where they are not
// stored like that.
class PaddedRows {
public:
    PaddedRows(const Tensor& image, const CudaContext& context);
    const Tensor& rows() const { return rows_; }

private:
    static bool is_padded(const Tensor& image, int64_t step);
    Tensor rows_;
};

}  // namespace gm
