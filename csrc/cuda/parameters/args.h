// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels that pack parameters and add up their gradients.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

// Sums over the rows of partial sums, segment by segment. The columns are those of the targets, in this order; target
// i is (segments, counts[i]).
constexpr int kReduceTargets = 3;
struct ReduceArgs {
    const float* partials = nullptr;  // (segments, rows, row_stride)
    int64_t segments = 1, rows = 0, row_stride = 0, columns = 0;
    float factor = 1.f;
    ParamOut targets[kReduceTargets];
    int64_t counts[kReduceTargets] = {};
};

// Parameters (n0, n1, n2), of any strides, copied to (n0, w1, w2) with zeros in the padding: the products that follow
// then read aligned rows in the dtype of the images.
struct PackItem {
    ParamArg from;
    int64_t strides[3] = {};  // of `from`, in elements
    ParamOut to;
    int n1 = 1, n2 = 1, w1 = 1, w2 = 1;
    bool negative_exp = false;  // A = -exp(A_log)
    bool vectors = false;       // rows of kVec elements are written at once, and read at once where reads_vectors
    bool reads_vectors = false;
    int64_t count = 0;    // n0 * w1 * w2
    int first_block = 0;  // set by the launcher
};
constexpr int kMaxPackItems = 16;
struct PackArgs {
    PackItem items[kMaxPackItems];
    int count = 0;
};

// The way back for gradients: sums over parts, without the padding. Element (i0, j, i1, i2) of the result, j < inner,
// is
//   sum over part of from[(i0 * parts + part) * part_stride + (j * w1 + i1) * w2 + i2]
//     [+ sum over part of more[part * more_stride + i]] [* scale[.]],  where i is the number of the element
struct SumItem {
    ParamArg from;
    const float *more = nullptr, *scale = nullptr;
    ParamOut to;
    int64_t to_strides[3] = {};  // of (i0 * inner + j, i1, i2), in elements
    int n1 = 1, n2 = 1, w1 = 1, w2 = 1, inner = 1;
    int parts = 1, more_parts = 0;
    bool vectors = false;  // kVec elements of a row are adjacent and aligned to their size; no more and no scale
    int64_t part_stride = 0, more_stride = 0;
    int64_t count = 0;  // of the result
    int first_block = 0;
};
constexpr int kMaxSumItems = 20;
struct SumArgs {
    SumItem items[kMaxSumItems];
    int count = 0;
};

// Sums over the rows of a matrix (rows, columns); each block leaves a row of partial sums.
struct ColumnSumArgs {
    const void* x = nullptr;
    int64_t rows = 0, row_stride = 0;
    int columns = 0, blocks = 0;
    DropPathArg drop_path;  // what the rows of an image are multiplied by
    int64_t rows_of_image = 1;
    float* partials = nullptr;  // (blocks, columns)
};

}  // namespace gm
