// SPDX-License-Identifier: Apache-2.0
// Arguments of the scan kernels for sm_90. They are built for and taken on that architecture alone: on 10.0 and 12.0,
// which have what they need, they were never run, and on 12.0 they spill up to 196 bytes.
#pragma once

#include "cuda/slab.h"

namespace gm {

struct ScanFwdSm90Args {
    CUtensorMap u[2], z[2], y[2];  // along rows, along columns
    ScanFwdArgs scan;
    SlabPlan plan;
    SlabMapKind kind[3];           // of u, z, y
    float* exchange = nullptr;     // exchange_floats(...)
    bool exchange_marked = false;  // absent (words.cuh), by an earlier kernel
};

struct ScanBwdSm90Args {
    CUtensorMap u[2], z[2], dy[2], du[2], dz[2];
    ScanBwdArgs scan;
    SlabPlan plan;
    SlabMapKind kind[5];  // of u, z, dy, du, dz
    float* exchange = nullptr;
    bool exchange_marked = false;  // by none
};

// Step features, B and C that a block of the forward fetches ahead: its registers set the limit of the rank, which is
// ceil(channels / 16) in the field.
template <int kLanes>
constexpr int kSm90Features = kLanes == 4              ? 3
                              : kLanes == 8            ? 4
                              : kLanes == 16           ? 8
                              : kLanes == kNarrowLanes ? kNarrowRank + 2
                                                       : 16;

inline int sm90_features(int lanes) {
    return lanes == 4    ? kSm90Features<4>
           : lanes == 8  ? kSm90Features<8>
           : lanes == 16 ? kSm90Features<16>
                         : kSm90Features<32>;
}

// Parts of the forward's slab. With 4 lanes a part of 56 rows has 4 columns, 128 bytes of 16 channels a row: short runs
// for the memory. Two parts take 4% less time at 64 x 56, 20% less at batch 16 or token-major. Wider groups have longer
// runs, and there four blocks of 128 threads an SM hide more than two of 256.
constexpr int sm90_fwd_parts(int lanes) { return lanes == 4 ? 2 : 1; }

// True for a scan that these kernels take: 16-bit storage, one state, low-rank softplus step, norm and z given, sm_90
// in the machine and in the build. It does not depend on strides: forward and backward of one scan agree.
bool takes_grouped_scan_sm90(const ScanShape& shape, bool has_z, bool has_norm, DType dtype);

// True where the copy engine can move an image: addresses and strides that are multiples of 16 bytes.
inline bool allows_slabs(const ImageArg& image, const ScanShape& s) {
    const auto allowed = [](int64_t size, int64_t stride) {
        return size == 1 || (stride > 0 && stride % kCopyUnit == 0);
    };
    return allowed(s.batch, image.batch) && allowed(static_cast<int64_t>(s.height) * s.width, image.token) &&
           allowed(s.groups, image.group) && reinterpret_cast<uintptr_t>(image.ptr) % 16 == 0;
}

// `args.scan` to the rest of `args`, for images that allow slabs. False where the driver refuses.
bool prepare_grouped_scan_fwd_sm90(DType dtype, ScanFwdSm90Args& args);
bool prepare_grouped_scan_bwd_sm90(DType dtype, ScanBwdSm90Args& args);

// Whether the blocks of the kernel share planes on the current device: share_planes, to be called once `args` are
// prepared and before memory is allocated by the plan.
cudaError_t share_grouped_scan_fwd_sm90(ScanFwdSm90Args& args, DType dtype);
cudaError_t share_grouped_scan_bwd_sm90(ScanBwdSm90Args& args, DType dtype);

bool grouped_scan_sm90_built();
cudaError_t launch_grouped_scan_fwd_sm90(const ScanFwdSm90Args& args, DType dtype, cudaStream_t stream);
cudaError_t launch_grouped_scan_bwd_sm90(const ScanBwdSm90Args& args, DType dtype, cudaStream_t stream);

}  // namespace gm
