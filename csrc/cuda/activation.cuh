// SPDX-License-Identifier: Apache-2.0
// The convolution's activations and their derivatives, by storage type.
//
// float uses the library functions. For 16-bit storage both go through the special-function unit: SiLU by its sigmoid,
// GELU by a fit of the normal distribution whose relative error of 6e-6 vanishes below the rounding of 5e-4.
#pragma once

#include "cuda/math.cuh"

namespace gm {

// Normal distribution function P(X < x), in full relative precision on both tails.
template <class T>
__device__ __forceinline__ float normal_cdf(float x) {
    // log2 P(X < -a): minimax polynomial on [0, 6], falling without bound beyond
    constexpr float kLog2Tail[] = {-9.999952912e-01f, -1.151251078e+00f, -4.584643841e-01f, -5.396007001e-02f,
                                   8.507890627e-03f,  -9.305247222e-04f, 6.159827171e-05f,  -1.834810405e-06f};
    const float a = fabsf(x);
    float p = kLog2Tail[7];
#pragma unroll
    for (int i = 6; i >= 0; --i) p = fmaf(p, a, kLog2Tail[i]);
    const float tail = ex2_approx(p);
    return x < 0.f ? tail : 1.f - tail;
}
template <>
__device__ __forceinline__ float normal_cdf<float>(float x) {
    return 0.5f * erfcf(-0.7071067811865476f * x);
}

template <class T>
__device__ __forceinline__ float normal_density(float x) {
    return 0.3989422804014327f * ex2_approx(-0.5f * kLog2e * x * x);
}
template <>
__device__ __forceinline__ float normal_density<float>(float x) {
    return 0.3989422804014327f * expf(-0.5f * x * x);
}

template <class T, int kCount>
__device__ __forceinline__ void activate(Activation kind, float (&x)[kCount]) {
    if (kind == Activation::kSilu) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= Math<T>::sigmoid(x[i]);
    } else if (kind == Activation::kGelu) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= normal_cdf<T>(x[i]);
    }
}

// x becomes the derivative of the activation at x.
template <class T, int kCount>
__device__ __forceinline__ void activation_slope(Activation kind, float (&x)[kCount]) {
    if (kind == Activation::kSilu) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float sigmoid = Math<T>::sigmoid(x[i]);
            x[i] = sigmoid * fmaf(x[i], 1.f - sigmoid, 1.f);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = fmaf(x[i], normal_density<T>(x[i]), normal_cdf<T>(x[i]));
    }
}

}  // namespace gm
