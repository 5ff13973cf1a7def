// SPDX-License-Identifier: Apache-2.0
// Which scans the sm_90 kernels take. They are built for and run on compute capability 9.0 alone. 10.0 and 12.0 have
// the instructions too, but these kernels have never run there, and built for 12.0 they spill up to 196 bytes.
#pragma once

#include <cstdint>

#include "cuda/scan/sm90/plan.h"

namespace gm {

// Step features, B and C that a block of the forward fetches ahead of use. They wait in registers, which limits the
// rank; GroupMamba's is ceil(channels / 16).
template <int kLanes>
constexpr int kSm90Features = kLanes == 4              ? 3
                              : kLanes == 8            ? 4
                              : kLanes == 16           ? 8
                              : kLanes == kNarrowLanes ? kNarrowRank + 2
                                                       : 16;

// Those of a cross scan's blocks of 32 lanes: beyond kSm90Features<32> steps are products by tensor cores
// (phases/step_products.cuh), and the gradients behind them at any rank. For lower ranks such a forward takes 12%
// longer (128 x 28, rank 8).
constexpr int kProductFeatures = 32;

inline int sm90_features(int lanes) {
    return lanes == 4    ? kSm90Features<4>
           : lanes == 8  ? kSm90Features<8>
           : lanes == 16 ? kSm90Features<16>
                         : kSm90Features<32>;
}

// Parts of the forward's tile. With 4 lanes a part of 56 rows has 4 columns, and 4 columns of 16 channels are only 128
// bytes of each row, a short run for the memory. Two parts take 4% less time at 64 x 56, 20% less at batch 16 or
// token-major. Wider groups have longer runs, and there four blocks of 128 threads an SM hide more latency than two of
// 256.
constexpr int sm90_fwd_parts(int lanes) { return lanes == 4 ? 2 : 1; }

// Why these kernels do not take a scan, or null where they do. It does not depend on strides, so forward and backward
// of one scan agree.
const char* why_not_grouped_scan_sm90(const ScanShape& shape, bool has_z, bool has_norm, DType dtype);
// The same of a cross scan, whose shape is that of its first slice of channels.
const char* why_not_cross_scan_sm90(const ScanShape& shape, DType dtype);

// True where TMA can move an image: its address and strides are multiples of 16 bytes.
inline bool allows_tma(const ImageArg& image, const ScanShape& s) {
    const auto allowed = [](int64_t size, int64_t stride) {
        return size == 1 || (stride > 0 && stride % kTmaUnit == 0);
    };
    return allowed(s.batch, image.batch) && allowed(static_cast<int64_t>(s.height) * s.width, image.token) &&
           allowed(s.groups, image.group) && reinterpret_cast<uintptr_t>(image.ptr) % 16 == 0;
}

// True where this build has the kernels' code for sm_90.
bool grouped_scan_sm90_built();

}  // namespace gm
