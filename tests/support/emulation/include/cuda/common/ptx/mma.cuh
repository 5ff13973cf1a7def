// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/mma.cuh: what the scan takes of it, products of TF32 by a warp.
#pragma once

#include <cuda_runtime_api.h>

namespace gm {

inline float to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

inline void warp_mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1, const float (&c)[4]) {
    emulation::Warp& warp = *emulation::self().warp;
    const int lane = static_cast<int>(emulation::self().lane), row = lane / 4, column = lane % 4;
    const float own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < 6; ++i) {  // tensor cores do not see the last 13 bits
        warp.factors[lane][i] = __uint_as_float(__float_as_uint(own[i]) & 0xffffe000u);
        if (own[i] != own[i]) warp.factors[lane][i] = own[i];
    }
    emulation::wait(warp.barrier);
    for (int i = 0; i < 4; ++i) {
        d[i] = c[i];
        for (int k = 0; k < 8; ++k)
            d[i] += warp.factors[row * 4 + k % 4][k / 4 * 2 + i / 2] *
                    warp.factors[(2 * column + i % 2) * 4 + k % 4][4 + k / 4];
    }
    emulation::wait(warp.barrier);
}

}  // namespace gm
