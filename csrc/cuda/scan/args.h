// SPDX-License-Identifier: Apache-2.0
// Arguments of the scan kernels.
#pragma once

#include <cstdint>

#include "cuda/common/args.h"

namespace gm {

// Directions are the codes of csrc/schemas.cpp: bit 0 reverses the path, bit 1 makes it column-major.
constexpr int kMaxGroups = 4096;  // two bits each in the kernel's parameters

struct ScanShape {
    int64_t batch;
    int height, width, groups, dim, states, rank;  // rank 0: dt holds the step itself
    int scans;  // scans of each group of the images, one after another; the kernel's groups are these, on sm_90 once
                // for each slice of the channels
    int param_dim;  // channels between the parameters of two groups: dim; more in a slice of channels, fewer where dim
                    // is padded
    int norm_dim;   // channels that LayerNorm counts: D, or fewer where the others are padding
    int lanes;      // lanes that share a token, a power of two up to 32
    int threads;    // threads of a block
    bool softplus;
    bool aligned;  // every image-sized tensor allows aligned 4-channel accesses, and D is a multiple of 4
    float norm_eps;
    uint32_t directions[kMaxGroups / 16];
};

struct ScanFwdArgs {
    ScanShape shape;
    ImageArg u, dt, B, C, z, y;
    ParamArg A, D, dt_weight, dt_bias, norm_weight, norm_bias, gate;
    float* states = nullptr;  // (batch, G, num_chunks, N, D), or null
    float* carry = nullptr;   // (batch, G, 2, N, D) scratch, needed for N > 1 without states
    int chunk = 0;            // tokens between saved states
    int64_t num_chunks = 0;
};

struct ScanBwdArgs {
    ScanShape shape;
    ImageArg dy, u, dt, B, C, z;   // inputs
    ImageArg du, ddt, dB, dC, dz;  // gradients
    ParamArg A, D, dt_weight, dt_bias, norm_weight, norm_bias, gate;
    const float* states = nullptr;
    float* carry = nullptr;  // (batch, G, 2, N, D) scratch for N > 1
    float* partials =
        nullptr;  // (batch, parts, G, rows, D), one part a warp or, on sm_90, a block; rows: ScanPartialRow
    int chunk = 0;
    int64_t num_chunks = 0;
};

// Second stage of the backward's parameter sums.
struct ScanReduceArgs {
    const float* partials = nullptr;  // (batch, parts, G, rows, D), see ScanPartialRow
    int64_t batch = 0;
    int parts = 0, groups = 0, dim = 0, param_dim = 0, states = 0, rank = 0;
    int scans = 0;        // 0, or groups are so many scans of the first `dim` channels, then those of the next
    int state_parts = 0;  // those that hold sums for A: the first ones
    ParamArg norm_weight, norm_bias, gate;
    ParamOut dA, dD, ddt_bias, ddt_weight, dnorm_weight, dnorm_bias, dgate;
};

}  // namespace gm
