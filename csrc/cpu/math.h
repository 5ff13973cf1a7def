// SPDX-License-Identifier: Apache-2.0
// exp, softplus, sigmoid, SiLU and GELU on vectors: polynomials of about 1 ulp for float, libm lane by lane for double.
// Polynomials are minimax fits of the relative error; overflow, underflow and NaN come out as they do from libm.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace gm::cpu::GM_CPU_CAPABILITY {

// V is Vec<float> or Vec<double> below, Lane<V> its float or double.
template <class V>
using Lane = std::remove_reference_t<decltype(V{}[0])>;

// a > b ? a : b, and a < b ? a : b: b where one of them is NaN.
#if defined(GM_AVX512)
GM_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm512_maskz_max_ps(static_cast<__mmask16>(-1), (__m512)a, (__m512)b);
}
GM_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm512_maskz_min_ps(static_cast<__mmask16>(-1), (__m512)a, (__m512)b);
}
#elif defined(GM_AVX2)
GM_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
GM_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
#else
GM_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
GM_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
#endif
GM_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

GM_INLINE Vec<float> absolute(Vec<float> a) { return (Vec<float>)((Vec<uint32_t>)a & 0x7fffffffu); }
GM_INLINE Vec<double> absolute(Vec<double> a) { return (Vec<double>)((Vec<uint64_t>)a & 0x7fffffffffffffffu); }

GM_INLINE float square_root(float a) { return __builtin_sqrtf(a); }
GM_INLINE double square_root(double a) { return __builtin_sqrt(a); }

// p * 2^n for integral n in [-252, 252].
GM_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
#if defined(GM_AVX512)
    return (Vec<float>)_mm512_maskz_scalef_ps(static_cast<__mmask16>(-1), (__m512)p, (__m512)n);
#else
    const Vec<int32_t> i = __builtin_convertvector(n, Vec<int32_t>);
    const Vec<int32_t> half = i >> 1;  // in two steps: 2^n itself need not be a float
    return p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((i - half + 127) << 23);
#endif
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// x = n ln(2) + r with integral n and |r| <= ln(2) / 2; ln(2) is split so that n * kLn2High is exact.
GM_INLINE void split_exponent(Vec<float> x, Vec<float>& n, Vec<float>& r) {
    constexpr float kLog2e = 1.44269502f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    x = maximum(splat(-104.0f), minimum(splat(89.0f), x));  // e^89 overflows, e^-104 underflows
    n = (x * kLog2e + kRound) - kRound;
    r = (x - n * kLn2High) - n * kLn2Low;
}

// 2^n e^r
GM_INLINE Vec<float> join_exponent(Vec<float> n, Vec<float> r) {
    Vec<float> p = r * 0x1.6a2352p-10f + 0x1.123a6cp-7f;
    p = p * r + 0x1.5558f4p-5f;
    p = p * r + 0x1.555490p-3f;
    p = p * r + 0x1.fffffcp-2f;
    return scale_by_power(p * (r * r) + r + 1.0f, n);
}

GM_INLINE Vec<float> exp(Vec<float> x) {
    Vec<float> n, r;
    split_exponent(x, n, r);
    return join_exponent(n, r);
}

// 2^x for |x| < 126, in place.
template <int kCount>
GM_INLINE void exp2(Vec<float> (&x)[kCount]) {
    constexpr float kPower[] = {0x1.5f3e52p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.0f};
    Vec<float> n[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) n[k] = (x[k] + kRound) - kRound;
    for (int k = 0; k < kCount; ++k) x[k] -= n[k];
    for (int k = 0; k < kCount; ++k) p[k] = splat(0x1.41fbbcp-13f);
#pragma GCC unroll 6
    for (const float c : kPower) {
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + c;
    }
    for (int k = 0; k < kCount; ++k) x[k] = scale_by_power(p[k], n[k]);
}

// log(1 + t) for t in [0, 1], t + t^2 P(t): also accurate relative to a tiny t.
GM_INLINE Vec<float> log1p_unit(Vec<float> t) {
    Vec<float> p = t * -0x1.b2f560p-9f + 0x1.4b0820p-6f;
    p = p * t + -0x1.d86312p-5f;
    p = p * t + 0x1.b579bap-4f;
    p = p * t + -0x1.3a7a80p-3f;
    p = p * t + 0x1.935ca0p-3f;
    p = p * t + -0x1.ff26e2p-3f;
    p = p * t + 0x1.554df0p-2f;
    p = p * t + -0x1.ffffd2p-2f;
    return p * (t * t) + t;
}

// The standard normal distribution at -a for 0 <= a <= 14, over exp(-a^2 / 2): k P(k), k = 1 / (1 + 0.3 a).
GM_INLINE Vec<float> normal_tail(Vec<float> a) {
    const Vec<float> k = 1.0f / (a * 0.3f + 1.0f);
    Vec<float> p = k * -0x1.51b86ep-6f + 0x1.cc4a7cp-4f;
    p = p * k + -0x1.d31500p-3f;
    p = p * k + 0x1.885be8p-3f;
    p = p * k + -0x1.4498bap-4f;
    p = p * k + 0x1.8973dep-4f;
    p = p * k + 0x1.413b34p-4f;
    p = p * k + 0x1.c37db8p-4f;
    p = p * k + 0x1.e9c536p-4f;
    p = p * k + 0x1.ea3c88p-4f;
    return p * k;
}

template <class F>
GM_INLINE Vec<double> each_lane(Vec<double> x, const F& f) {
    Vec<double> result = x;
    for (int i = 0; i < kLanes<double>; ++i) result[i] = f(x[i]);
    return result;
}
GM_INLINE Vec<double> exp(Vec<double> x) {
    return each_lane(x, [](double v) { return __builtin_exp(v); });
}
GM_INLINE Vec<double> log1p_unit(Vec<double> t) {
    return each_lane(t, [](double v) { return __builtin_log1p(v); });
}

template <class V>
GM_INLINE V sigmoid(V x) {
    return Lane<V>(1) / (Lane<V>(1) + exp(-x));
}

template <class V>
GM_INLINE V silu(V x) {
    return x / (Lane<V>(1) + exp(-x));
}

template <class V>
GM_INLINE V softplus(V x) {
    return maximum(x, V{}) + log1p_unit(exp(-absolute(x)));
}

// softplus and its derivative, the sigmoid.
template <class V>
GM_INLINE V softplus(V x, V& derivative) {
    const V e = exp(-absolute(x));
    derivative = (x < Lane<V>(0) ? e : splat(Lane<V>(1))) / (Lane<V>(1) + e);
    return maximum(x, V{}) + log1p_unit(e);
}

// The standard normal distribution at x and its density, without cancellation in the lower tail.
GM_INLINE void normal(Vec<float> x, Vec<float>& distribution, Vec<float>& density) {
    const Vec<float> a = minimum(splat(15.0f), absolute(x));
    // exp(-a^2 / 2) with a^2 as an exact high part and the rest: a rounded square would cost half its ulp.
    const Vec<float> high = (Vec<float>)((Vec<uint32_t>)a & 0xfffff000u);
    Vec<float> n, r;
    split_exponent(high * high * -0.5f, n, r);
    const Vec<float> bell = join_exponent(n, r + (a - high) * (a + high) * -0.5f);
    const Vec<float> tail = bell * normal_tail(a);
    distribution = x < 0.0f ? tail : 1.0f - tail;
    density = bell * 0.3989422804f;
}
GM_INLINE void normal(Vec<double> x, Vec<double>& distribution, Vec<double>& density) {
    distribution = each_lane(x, [](double v) { return 0.5 * __builtin_erfc(v * -0.70710678118654752440); });
    density = exp(x * x * -0.5) * 0.39894228040143267794;
}

// x times the standard normal distribution. The tail is 2^p(|x|): one polynomial, one power, no division; its relative
// error grows where it no longer shows in the sum, as that of 1 + erf does. In steps over several vectors, since a
// polynomial is one long chain of dependent operations.
template <int kCount>
GM_INLINE void gelu(Vec<float> (&x)[kCount]) {
    constexpr float kTail[] = {0x1.1f1ae0p-21f, -0x1.06d3e4p-17f, 0x1.fb4f40p-15f, -0x1.e85d3ep-13f, -0x1.52b744p-14f,
                               0x1.cc946ep-8f,  -0x1.adf6a2p-5f,  -0x1.d63aecp-2f, -0x1.26aed6p+0f,  -1.0f};
    Vec<float> a[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) a[k] = minimum(splat(8.0f), absolute(x[k]));
    for (int k = 0; k < kCount; ++k) p[k] = splat(-0x1.053ca8p-26f);
#pragma GCC unroll 10
    for (const float c : kTail) {
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * a[k] + c;
    }
    exp2(p);
    for (int k = 0; k < kCount; ++k) x[k] = maximum(x[k], Vec<float>{}) - a[k] * p[k];
}
template <int kCount>
GM_INLINE void gelu(Vec<double> (&x)[kCount]) {
    for (Vec<double>& v : x) {
        v *= each_lane(v, [](double t) { return 0.5 * __builtin_erfc(t * -0.70710678118654752440); });
    }
}

template <int kCount, class V>
GM_INLINE void silu(V (&x)[kCount]) {
    for (V& v : x) v = silu(v);
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
