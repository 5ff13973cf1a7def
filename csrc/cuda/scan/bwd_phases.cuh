// SPDX-License-Identifier: Apache-2.0
// What a thread of the portable backward (bwd.cu) computes of its tokens in each phase of a tile. README.md derives it.
#pragma once

#include "cuda/scan/tile.cuh"

namespace gm {

// Rows of the backward's ChannelTable.
enum BwdTableRow { kBias, kSkip, kNormWeight, kNormBias, kGate, kBwdTableRows };

// The table of a block's channels.
template <class T>
__device__ __forceinline__ void fill_table(const ScanBwdArgs& args, const ThreadCoord& coord,
                                           ChannelTable<kBwdTableRows>& table) {
    const ScanShape& s = args.shape;
    table.fill(s.dim, [&](int c, float(&row)[kBwdTableRows]) {
        const int64_t i = static_cast<int64_t>(coord.group) * s.param_dim + c;
        row[kBias] = load_param_or<T>(args.dt_bias, i, 0.f) / Math<T>::kStepUnit;
        row[kSkip] = load_param_or<T>(args.D, i, 0.f);
        row[kNormWeight] = load_param_or<T>(args.norm_weight, i, 1.f);
        row[kNormBias] = load_param_or<T>(args.norm_bias, i, 0.f);
        row[kGate] = load_param_or<T>(args.gate, static_cast<int64_t>(coord.batch) * s.groups * s.dim + i, 1.f);
    });
}

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

// A warp's rows of partial sums (ScanPartialRow), `dim` floats apart, from the thread's first channel on.
struct PartialRows {
    float* const partials;
    const int& valid;
    const int& dim;
    const bool writes;  // one chunk of the warp does

    __device__ __forceinline__ void add(int64_t row, const float (&sum)[kVec], bool first_time) const {
        if (!writes) return;
        float* const p = partials + row * dim;
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (j < valid) p[j] = first_time ? sum[j] : p[j] + sum[j];
    }
    // Writes row `to`: `unit` times the warp's total of a parked sum.
    template <class Parked>
    __device__ __forceinline__ void finish(const Parked& parked, const int& lanes, int row, int64_t to,
                                           float unit) const {
        float sum[kVec];
        parked.get(row, sum);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] = unit * chunk_sum(sum[j], lanes);
        add(to, sum, true);
    }
};

// Writes the sums over the channels of each token, `unit` times `sum`, by one lane a token.
template <class T, int kTokens>
struct TokenSums {
    const ThreadCoord& coord;
    const int& lanes;

    __device__ __forceinline__ void operator()(float (&sum)[kTokens], float unit, const Plane<T>& out,
                                               const Path<kTokens>& path, int i) const {
        lane_sums(sum, lanes);
#pragma unroll
        for (int k = 0; k < kTokens; ++k)
            if (k < path.count && coord.lane() == (k & (lanes - 1)))
                out.at(path.token[k])[i] = from_float<T>(unit * sum[k]);
    }
};

// States h of a tile and the one that enters the chunk, by way of state n, from the one that was saved before the tile.
template <bool kAligned, class T, int kTokens>
__device__ __forceinline__ void states_of_tile(const ThreadCoord& coord, ScanExchange& exchange, int& buffer,
                                               const Plane<const T>& u, const Plane<const T>& B,
                                               const Path<kTokens>& path, int n, const float (&A)[kVec],
                                               const float (&step)[kTokens][kVec], const float* saved,
                                               float (&h)[kTokens][kVec], float (&entering)[kVec]) {
    float carry[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) carry[j] = j < coord.valid ? saved[j] : 0.f;
    tile_states<T>(
        coord, exchange, buffer, A, step, [&](int k) { return Math<T>::kStepUnit * to_float(B.at(path.token[k])[n]); },
        [&](int k) { return load4<kAligned>(u.at(path.token[k]), coord.valid); }, carry, h, entering);
}

// Adds the part of state n to y; n == 0 is the first.
template <class T, bool kSingle, int kTokens>
__device__ __forceinline__ void add_outputs(const Plane<const T>& C, const Path<kTokens>& path, int n,
                                            const float (&h)[kTokens][kVec], float (&y)[kTokens][kVec]) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const float c = to_float(C.at(path.token[k])[n]);
#pragma unroll
        for (int j = 0; j < kVec; ++j) y[k][j] = kSingle || n == 0 ? c * h[k][j] : fmaf(c, h[k][j], y[k][j]);
    }
}

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

// dy comes in as C . h of the thread's tokens and becomes the gradient of y, 0 for tokens past the end: the output
// again, then dout through gates and norm. Stores dz and adds to the parked sums for gate and norm. (The order of the
// first lines keeps the 16-bit kernels within their registers.)
template <class T, bool kAligned, int kTokens, class Parked>
__device__ __forceinline__ void through_gates_and_norm(const ScanShape& s, const ThreadCoord& coord, bool has_norm,
                                                       bool has_z, const ChannelTable<kBwdTableRows>& table,
                                                       const Plane<const T>& dout, const Plane<const T>& z,
                                                       const Plane<T>& dz_out, const Path<kTokens>& path,
                                                       Parked&& parked, const Plane<const T>& u,
                                                       float (&dy)[kTokens][kVec]) {
    const int &c0 = coord.channel, &valid = coord.valid, &lanes = coord.lanes;
    const float inverse_dim = 1.f / s.norm_dim;
    const int normed_channels = min(valid, s.norm_dim - c0);
    float inverse_std[kTokens];
    normalise<T, kAligned>(s, coord, has_norm, table, path, u, dy, inverse_std);
    float norm_weight[kVec], norm_bias[kVec], gate[kVec], product[kVec], total[kVec];
    table.get(kNormWeight, c0, norm_weight);
    table.get(kNormBias, c0, norm_bias);
    table.get(kGate, c0, gate);
    // A part of the tokens at a time: the derivatives of all of them would not fit beside the states.
    constexpr int kPart = 4;
    parked.get(kRowProduct, product);
    parked.get(kRowSum, total);
#pragma unroll
    for (int k0 = 0; k0 < kTokens; k0 += kPart) {
        float dnormed[kPart][kVec], moments[2 * kPart] = {};
#pragma unroll
        for (int i = 0; i < kPart && k0 + i < kTokens; ++i) {
            const int k = k0 + i;
            const bool real = k < path.count;
            const Vec4<T> gv = load4<kAligned>(dout.at(path.token[k]) + c0, real ? valid : 0);
            float dz[kVec];
            Vec4<T> zv = {};
            if (has_z) zv = load4<kAligned>(z.at(path.token[k]) + c0, valid);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float g = to_float(gv.v[j]), normed = real ? dy[k][j] : 0.f;
                float gated = g;
                if (has_z) {
                    const float x = to_float(zv.v[j]), sigmoid = Math<T>::sigmoid(x), silu = x * sigmoid;
                    gated = g * silu;
                    dz[j] =
                        g * gate[j] * fmaf(normed, norm_weight[j], norm_bias[j]) * fmaf(silu, 1.f - sigmoid, sigmoid);
                }
                product[j] = fmaf(gated, normed, product[j]);
                total[j] += gated;
                dnormed[i][j] = gated * gate[j] * norm_weight[j];
                moments[2 * i] += dnormed[i][j];
                moments[2 * i + 1] = fmaf(dnormed[i][j], normed, moments[2 * i + 1]);
            }
            if (has_z && real) store4<kAligned>(dz_out.at(path.token[k]) + c0, dz, valid);
        }
        if (has_norm) lane_sums(moments, lanes);
#pragma unroll
        for (int i = 0; i < kPart && k0 + i < kTokens; ++i) {
            const int k = k0 + i;
            // Channels that the norm does not count get no part of its means. With A = 0 they would sum it
            // over all tokens without decay, and du may overflow float16 there: one channel's norm has a
            // factor of 316.
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                if (has_norm)
                    dnormed[i][j] = inverse_std[k] *
                                    (dnormed[i][j] - inverse_dim * fmaf(dy[k][j], moments[2 * i + 1], moments[2 * i]));
                dy[k][j] = k < path.count && j < normed_channels ? dnormed[i][j] : 0.f;
            }
        }
    }
    parked.put(kRowProduct, product);
    parked.put(kRowSum, total);
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

// The gradients of the steps through the softplus, and what is complete with the last state: du, dbias, and ddt where
// dt holds the steps. The gradients of the steps become 0 for tokens past the end.
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

// The gradients of step feature r and of its weights w, from those of the steps.
template <class T, int kTokens>
__device__ __forceinline__ void feature_gradients(const Plane<const T>& dt, const Path<kTokens>& path, int r,
                                                  const float (&dstep)[kTokens][kVec], const float (&w)[kVec],
                                                  float (&ddt)[kTokens], float (&dw)[kVec]) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const float d = to_float(dt.at(path.token[k])[r]);
        ddt[k] = 0.f;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            ddt[k] = fmaf(dstep[k][j], w[j], ddt[k]);
            dw[j] = fmaf(dstep[k][j], d, dw[j]);
        }
    }
}

// The same for all of them: those of the features are written, those of the weights added to the warp's rows from
// `row` on.
template <class T, int kTokens>
__device__ __forceinline__ void all_feature_gradients(const StepWeight<T>& weight, const Plane<const T>& dt,
                                                      const Plane<T>& ddt_out, const Path<kTokens>& path, int rank,
                                                      const float (&dstep)[kTokens][kVec],
                                                      const TokenSums<T, kTokens>& write_token_sums,
                                                      const PartialRows& partial, int row, int lanes, bool first_time) {
    for (int r = 0; r < rank; ++r) {
        float w[kVec], dw[kVec] = {}, ddt[kTokens];
        weight.get(r, w);
        feature_gradients(dt, path, r, dstep, w, ddt, dw);
        write_token_sums(ddt, 1.f, ddt_out, path, r);
#pragma unroll
        for (int j = 0; j < kVec; ++j) dw[j] = chunk_sum(dw[j], lanes) / Math<T>::kStepUnit;
        partial.add(row + r, dw, first_time);
    }
}

}  // namespace gm
