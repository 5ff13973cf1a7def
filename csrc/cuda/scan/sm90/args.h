// SPDX-License-Identifier: Apache-2.0
// Arguments of the scan kernels for sm_90.
#pragma once

#include "cuda/scan/args.h"
#include "cuda/scan/sm90/plan.h"

namespace gm {

struct ScanFwdSm90Args {
    CUtensorMap u[2], z[2], y[2];  // [0] along rows, [1] along columns
    ScanFwdArgs scan;
    TilePlan plan;
    TileMapKind kind[3];                     // of u, z, y
    float* inter_block_state = nullptr;      // inter_block_floats(...) floats
    bool inter_block_state_cleared = false;  // an earlier kernel has marked it "not ready"
};

struct ScanBwdSm90Args {
    CUtensorMap u[2], z[2], dy[2], du[2], dz[2];
    ScanBwdArgs scan;
    TilePlan plan;
    TileMapKind kind[5];  // of u, z, dy, du, dz
    float* inter_block_state = nullptr;
    bool inter_block_state_cleared = false;  // no kernel does that for the backward
};

}  // namespace gm
