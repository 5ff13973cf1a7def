// SPDX-License-Identifier: Apache-2.0
// Large products of 16-bit matrices by cuBLASLt without a workspace.
//
// With a workspace, as torch calls it, cuBLAS hands out tiles by a counter that a memset clears first. Between kernels
// that follow one another without a pause the memset and its two gaps take some 7 us, a fifth of the products of a
// small stage. Without a workspace tiles are assigned beforehand, by kernels that take the same time.
//
// Of the algorithms that cuBLASLt offers for a product the first is taken, or, where Python says so, the fastest: each
// is timed when a product of new sizes comes, unless it is being captured. A choice stays.
#pragma once

#include <cuda_runtime_api.h>

#include "host/tensor.h"

namespace gm {

// out = alpha * a @ b [+ row], or with `add` out += that, of matrices or batches of them; `row`, without `add`, has one
// element for each column of out. False, and nothing done, where this is not the better way or cuBLASLt not at hand.
bool matmul_without_workspace(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, const Tensor* row,
                              bool add, cudaStream_t stream);

}  // namespace gm

// For Python, by ctypes: what says whether algorithms are to be timed. It is called by any thread, within an op, and
// may take the interpreter's lock, which torch lets go of while an op runs.
extern "C" __attribute__((visibility("default"))) void groupmamba_choose_by_time(int (*wanted)());
