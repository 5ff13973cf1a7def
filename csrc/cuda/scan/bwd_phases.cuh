// SPDX-License-Identifier: Apache-2.0
// What a thread of the portable backward (bwd.cu) computes of its tokens in each phase of a tile. README.md derives it.
#pragma once

#include "cuda/scan/tile.cuh"

namespace gm {

// Rows of the backward's ChannelTable.
enum BwdTableRow { kBias, kSkip, kNormWeight, kNormBias, kGate, kBwdTableRows };

// Each thread's sums for the parameters, kept in shared memory between the phases that add to them: the rows of
// ScanPartialRow, and dA of the one state of kSingle.
constexpr int kParkedA = kFixedRows, kParkedRows = kFixedRows + 1;
template <int kThreads>
struct ParkedSums {
    float4 (&sums)[kParkedRows][kThreads];

    __device__ __forceinline__ void put(int row, const float (&sum)[kVec]) const {
        sums[row][threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    __device__ __forceinline__ void get(int row, float (&sum)[kVec]) const {
        const float4 v = sums[row][threadIdx.x];
        sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
    }
};

// y comes in without the skip, as C . h, and becomes normalised; inverse_std becomes that of each token.
template <class T, bool kAligned, int kTokens>
__device__ __forceinline__ void normalise(const ScanShape& s, const ThreadCoord& coord, bool has_norm,
                                          const ChannelTable<kBwdTableRows>& table, const Path<kTokens>& path,
                                          const Plane<const T>& u, float (&y)[kTokens][kVec],
                                          float (&inverse_std)[kTokens]) {
    const int c0 = coord.channel, valid = coord.valid, lanes = coord.lanes;
    float skip[kVec];
    table.get(kSkip, c0, skip);
    const float inverse_dim = 1.f / s.norm_dim;
    const int normed_channels = min(valid, s.norm_dim - c0);
    float m1[kTokens], m2[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const Vec4<T> uv = load4<kAligned>(u.at(path.token[k]), valid);
        inverse_std[k] = 1.f;
        m1[k] = m2[k] = 0.f;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            y[k][j] = fmaf(skip[j], to_float(uv.v[j]), y[k][j]);
            m1[k] += y[k][j];
        }
    }
    if (has_norm) {  // (y - mean) / std
        lane_sums(m1, lanes);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const float mean = mean_of(m1[k], s.norm_dim, inverse_dim);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                y[k][j] = j < normed_channels ? y[k][j] - mean : 0.f;
                m2[k] = fmaf(y[k][j], y[k][j], m2[k]);
            }
        }
        lane_sums(m2, lanes);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            inverse_std[k] = Math<T>::rsqrt(fmaf(m2[k], inverse_dim, s.norm_eps));
#pragma unroll
            for (int j = 0; j < kVec; ++j) y[k][j] *= inverse_std[k];
        }
    }
}

// The aggregate (P, local) of the adjoint over a thread's tokens, from the last one to the first, and dC.
template <class T, int kTokens>
__device__ __forceinline__ void start_adjoints(const Plane<const T>& C, const Path<kTokens>& path, int n,
                                               const float (&A)[kVec], const float (&step)[kTokens][kVec],
                                               const float (&h)[kTokens][kVec], const float (&dy)[kTokens][kVec],
                                               float (&P)[kVec], float (&local)[kVec], float (&dC)[kTokens]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) P[j] = 1.f, local[j] = 0.f;
#pragma unroll
    for (int k = kTokens - 1; k >= 0; --k) {
        const float c = to_float(C.at(path.token[k])[n]);
        dC[k] = 0.f;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float decay = Math<T>::decay(step[k][j], A[j]);
            local[j] = decay * fmaf(c, dy[k][j], local[j]);
            P[j] *= decay;
            dC[k] = fmaf(dy[k][j], h[k][j], dC[k]);
        }
    }
}

// The gradients by way of state n, from the last token to the first: `adjoint` comes in as what reaches the last one
// from behind. du and dstep are sums over the states, of which n == 0 is the first.
template <class T, bool kSingle, bool kAligned, int kTokens>
__device__ __forceinline__ void state_gradients(
    const ThreadCoord& coord, const Plane<const T>& u, const Plane<const T>& B, const Plane<const T>& C,
    const Plane<T>& du_out, const Path<kTokens>& path, int n, const float (&A)[kVec],
    const float (&step)[kTokens][kVec], const float (&h)[kTokens][kVec], const float (&entering)[kVec],
    const float (&dy)[kTokens][kVec], const float (&skip)[kVec], float (&adjoint)[kVec], float (&du)[kTokens][kVec],
    float (&dstep)[kTokens][kVec], float (&dA)[kVec], float (&dskip)[kVec], float (&dB)[kTokens]) {
    const int c0 = coord.channel, valid = coord.valid;
#pragma unroll
    for (int k = kTokens - 1; k >= 0; --k) {
        const float b = Math<T>::kStepUnit * to_float(B.at(path.token[k])[n]);
        const float c = to_float(C.at(path.token[k])[n]);
        const Vec4<T> uv = load4<kAligned>(u.at(path.token[k]), valid);
        dB[k] = 0.f;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float x = to_float(uv.v[j]), g = fmaf(c, dy[k][j], adjoint[j]);
            const float decay = Math<T>::decay(step[k][j], A[j]);
            const float through = g * decay * (k > 0 ? h[k > 0 ? k - 1 : 0][j] : entering[j]);
            const float ds = fmaf(Math<T>::kStepUnit * A[j], through, g * (b * x)), gs = g * step[k][j];
            dA[j] = fmaf(through, step[k][j], dA[j]);
            dstep[k][j] = kSingle || n == 0 ? ds : dstep[k][j] + ds;
            du[k][j] = fmaf(gs, b, kSingle || n == 0 ? skip[j] * dy[k][j] : du[k][j]);
            dB[k] = fmaf(gs, x, dB[k]);
            adjoint[j] = decay * g;
            if (kSingle || n == 0) dskip[j] = fmaf(dy[k][j], x, dskip[j]);
        }
        if (kSingle && k < path.count) store4<kAligned>(du_out.at(path.token[k]) + c0, du[k], valid);
    }
}

// The gradients of the steps through the softplus, and what is complete with the last state: du, and ddt where dt holds
// the steps.
template <class T, bool kSingle, bool kAligned, int kTokens>
__device__ __forceinline__ void finish_steps(const ScanShape& s, const ThreadCoord& coord, const Plane<T>& du_out,
                                             const Plane<T>& ddt_out, const Path<kTokens>& path,
                                             const float (&step)[kTokens][kVec], const float (&du)[kTokens][kVec],
                                             float (&dstep)[kTokens][kVec], float (&dbias)[kVec]) {
    const int c0 = coord.channel, valid = coord.valid;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        if (!kSingle && k < path.count) store4<kAligned>(du_out.at(path.token[k]) + c0, du[k], valid);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            if (s.softplus) dstep[k][j] = Math<T>::through_softplus(dstep[k][j], step[k][j]);
            if (k >= path.count) dstep[k][j] = 0.f;
            dbias[j] += dstep[k][j];
        }
        if (s.rank == 0 && k < path.count) {
            float ddt[kVec];
#pragma unroll
            for (int j = 0; j < kVec; ++j) ddt[j] = dstep[k][j] / Math<T>::kStepUnit;
            store4<kAligned>(ddt_out.at(path.token[k]) + c0, ddt, valid);
        }
    }
}

}  // namespace gm
