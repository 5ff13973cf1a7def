// SPDX-License-Identifier: Apache-2.0
// The activations of the convolution and their derivatives, by storage type.
//
// float uses CUDA's math functions. For 16-bit storage both use the special-function unit: SiLU through its sigmoid,
// GELU through a fit of the normal distribution whose relative error is below a tenth of the storage's rounding.
#pragma once

#include <type_traits>

#include "cuda/common/math.cuh"

namespace gm {

// log2 P(X < -a) for a normal X: minimax polynomials that fall without bound beyond their interval. Relative error of
// P: 6e-6 on [0, 6] for half (rounding 5e-4), 1.6e-4 on [0, 5] for bfloat16 (rounding 4e-3).
template <class T>
__device__ __forceinline__ float log2_normal_tail(float a) {
    float p = -1.834810405e-06f;
    p = fmaf(p, a, 6.159827171e-05f);
    p = fmaf(p, a, -9.305247222e-04f);
    p = fmaf(p, a, 8.507890627e-03f);
    p = fmaf(p, a, -5.396007001e-02f);
    p = fmaf(p, a, -4.584643841e-01f);
    p = fmaf(p, a, -1.151251078e+00f);
    return fmaf(p, a, -9.999952912e-01f);
}
template <>
__device__ __forceinline__ float log2_normal_tail<__nv_bfloat16>(float a) {
    float p = -2.699188481e-04f;
    p = fmaf(p, a, 5.297361873e-03f);
    p = fmaf(p, a, -4.631939530e-02f);
    p = fmaf(p, a, -4.669073522e-01f);
    p = fmaf(p, a, -1.147789001e+00f);
    return fmaf(p, a, -1.000228286e+00f);
}

// P(X < x), in relative precision on both tails.
template <class T>
__device__ __forceinline__ float normal_cdf(float x) {
    const float tail = ex2_approx(log2_normal_tail<T>(fabsf(x)));
    return x < 0.f ? tail : 1.f - tail;
}
template <>
__device__ __forceinline__ float normal_cdf<float>(float x) {
    return 0.5f * erfcf(-0.7071067811865476f * x);
}

template <class T>
__device__ __forceinline__ float normal_density(float x) {
    constexpr float kLog2Peak = -1.3257480647361594f;  // log2(1 / sqrt(2 pi))
    return ex2_approx(fmaf(-0.5f * kLog2e * x, x, kLog2Peak));
}
template <>
__device__ __forceinline__ float normal_density<float>(float x) {
    return 0.3989422804014327f * expf(-0.5f * x * x);
}

template <class T>
__device__ __forceinline__ float gelu(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return x * normal_cdf<T>(x);
    } else {  // x P(X < x) = max(x, 0) - |x| P(X < -|x|)
        const float a = fabsf(x), tail = ex2_approx(log2_normal_tail<T>(a));
        // inf * 0 is NaN; half overflows within reach, bfloat16 where float does
        const float factor = std::is_same_v<T, __half> ? fminf(a, 3.4e38f) : a;
        return fmaf(-factor, tail, fmaxf(x, 0.f));
    }
}

template <class T, int kCount>
__device__ __forceinline__ void activate(Activation kind, float (&x)[kCount]) {
    if (kind == Activation::kSilu) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= Math<T>::sigmoid(x[i]);
    } else if (kind == Activation::kGelu) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = gelu<T>(x[i]);
    }
}

// x becomes the derivative of the activation at x, y the activation; not for kNone.
template <class T, int kCount>
__device__ __forceinline__ void activation_slope(Activation kind, float (&x)[kCount], float (&y)[kCount]) {
    if (kind == Activation::kSilu) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float sigmoid = Math<T>::sigmoid(x[i]);
            y[i] = x[i] * sigmoid;
            x[i] = sigmoid * fmaf(x[i], 1.f - sigmoid, 1.f);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float cdf = normal_cdf<T>(x[i]);
            y[i] = x[i] * cdf;
            x[i] = fmaf(x[i], normal_density<T>(x[i]), cdf);
        }
    }
}

}  // namespace gm
