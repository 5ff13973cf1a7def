// SPDX-License-Identifier: Apache-2.0
// Arguments of the scan kernels for sm_90.
#pragma once

#include "cuda/scan/args.h"
#include "cuda/scan/sm90/plan.h"

namespace gm {

struct ScanFwdSm90Args {
    CUtensorMap u[2], z[2], y[2];  // along rows, along columns
    ScanFwdArgs scan;
    SlabPlan plan;
    SlabMapKind kind[3];           // of u, z, y
    float* exchange = nullptr;     // exchange_floats(...)
    bool exchange_marked = false;  // absent (inter_block_state.cuh), by an earlier kernel
};

struct ScanBwdSm90Args {
    CUtensorMap u[2], z[2], dy[2], du[2], dz[2];
    ScanBwdArgs scan;
    SlabPlan plan;
    SlabMapKind kind[5];  // of u, z, dy, du, dz
    float* exchange = nullptr;
    bool exchange_marked = false;  // by none
};

}  // namespace gm
