// SPDX-License-Identifier: Apache-2.0
// What the forwards of the scan that run on every GPU do with a channel's parameters and a token's y.
#pragma once

#include "cuda/scan/tile.cuh"

namespace gm {

// Rows of the forward's ChannelTable. The gate is folded into the norm's scale and shift.
enum FwdTableRow { kFwdBias, kFwdSkip, kFwdScale, kFwdShift, kFwdA, kFwdTableRows };

// The table of a block's channels; A of the only state, or 0.
template <class T, bool kSingle>
__device__ __forceinline__ void fill_table(const ScanFwdArgs& args, const ThreadCoord& coord,
                                           ChannelTable<kFwdTableRows>& table) {
    const ScanShape& s = args.shape;
    table.fill(s.dim, [&](int c, float(&row)[kFwdTableRows]) {
        const int64_t i = static_cast<int64_t>(coord.group) * s.param_dim + c;
        const int64_t gate_index = static_cast<int64_t>(coord.batch) * s.groups * s.dim + i;
        const float gate = load_param_or<T>(args.gate, gate_index, 1.f);
        row[kFwdBias] = load_param_or<T>(args.dt_bias, i, 0.f) / Math<T>::kStepUnit;
        row[kFwdSkip] = load_param_or<T>(args.D, i, 0.f);
        row[kFwdScale] = gate * load_param_or<T>(args.norm_weight, i, 1.f);
        row[kFwdA] = kSingle ? load_param<T>(args.A, i) : 0.f;
        row[kFwdShift] = gate * load_param_or<T>(args.norm_bias, i, 0.f);
    });
}

// y of a thread's tokens through norm and gates, stored.
template <class T, bool kAligned, int kTokens>
__device__ __forceinline__ void finish_outputs(const ScanShape& s, const ThreadCoord& coord, bool has_norm, bool has_z,
                                               const ChannelTable<kFwdTableRows>& table, const Plane<const T>& z,
                                               const Plane<T>& y_out, const Path<kTokens>& path,
                                               float (&y)[kTokens][kVec]) {
    const int c0 = coord.channel, valid = coord.valid, lanes = coord.lanes;
    float scale[kVec], shift[kVec];
    table.get(kFwdScale, c0, scale);
    table.get(kFwdShift, c0, shift);
    if (has_norm) {
        const float inverse_dim = 1.f / s.norm_dim;
        const int normed = min(valid, s.norm_dim - c0);
        float mean[kTokens], variance[kTokens];
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            mean[k] = 0.f;
#pragma unroll
            for (int j = 0; j < kVec; ++j) mean[k] += y[k][j];
        }
        lane_sums(mean, lanes);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            variance[k] = 0.f;
            mean[k] = mean_of(mean[k], s.norm_dim, inverse_dim);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                y[k][j] = j < normed ? y[k][j] - mean[k] : 0.f;
                variance[k] = fmaf(y[k][j], y[k][j], variance[k]);
            }
        }
        lane_sums(variance, lanes);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const float inverse_std = Math<T>::rsqrt(fmaf(variance[k], inverse_dim, s.norm_eps));
#pragma unroll
            for (int j = 0; j < kVec; ++j) y[k][j] = fmaf(y[k][j] * inverse_std, scale[j], shift[j]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < kTokens; ++k)
#pragma unroll
            for (int j = 0; j < kVec; ++j) y[k][j] *= scale[j];
    }
    if (has_z) {
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const Vec4<T> zv = load4<kAligned>(z.at(path.token[k]) + c0, valid);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float x = to_float(zv.v[j]);
                y[k][j] *= x * Math<T>::sigmoid(x);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
        if (k < path.count) store4<kAligned>(y_out.at(path.token[k]) + c0, y[k], valid);
}

}  // namespace gm
