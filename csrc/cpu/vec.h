// SPDX-License-Identifier: Apache-2.0
// Vectors of the native width of one instruction set, and rows of float, double, half and bfloat16 in memory.
//
// Everything below lives in a namespace of its instruction set: an inline function that two sets shared would be kept
// once by the linker, with whichever instructions came first. For the same reason kernels use no standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef GM_CPU_CAPABILITY
#error "compile with -DGM_CPU_CAPABILITY=baseline, avx2 or avx512"
#endif

#define GM_INLINE inline __attribute__((always_inline))

namespace gm::cpu::GM_CPU_CAPABILITY {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define GM_AVX512 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GM_AVX2 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class T, int kBytes>
struct VectorType {
    typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorType<T, kVectorBytes>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
using Bits16 = typename VectorType<uint16_t, kVectorBytes / 2>::type;  // as many lanes as Vec<float>

// The type that arithmetic on T is done in.
template <class T>
struct AccumulateType {
    using type = float;
};
template <>
struct AccumulateType<double> {
    using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

template <class T>
GM_INLINE Vec<T> splat(T value) {
    return value - Vec<T>{};
}

// How many lanes of a vector exist in memory.
struct All {};
struct First {
    int64_t n;
};

// f(offset, All or First) over `size` elements in vectors of T.
template <class T, class F>
GM_INLINE void for_vectors(int64_t size, const F& f) {
    int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) f(i, All{});
    if (i < size) f(i, First{size - i});
}

template <class T>
GM_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <class T>
GM_INLINE void store(T* p, Vec<T> v) {
    std::memcpy(p, &v, sizeof(v));
}

GM_INLINE Vec<float> load(const float* p, All) { return load(p); }
GM_INLINE Vec<double> load(const double* p, All) { return load(p); }
GM_INLINE void store(float* p, Vec<float> v, All) { store(p, v); }
GM_INLINE void store(double* p, Vec<double> v, All) { store(p, v); }

// Lanes that do not exist are read as zero and never written.
#if defined(GM_AVX512)
GM_INLINE __mmask16 lane_mask(First f) { return static_cast<__mmask16>((1u << f.n) - 1); }
GM_INLINE Vec<float> load(const float* p, First f) { return (Vec<float>)_mm512_maskz_loadu_ps(lane_mask(f), p); }
GM_INLINE Vec<double> load(const double* p, First f) {
    return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(f)), p);
}
GM_INLINE void store(float* p, Vec<float> v, First f) { _mm512_mask_storeu_ps(p, lane_mask(f), (__m512)v); }
GM_INLINE void store(double* p, Vec<double> v, First f) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(f)), (__m512d)v);
}
GM_INLINE Bits16 load_bits(const void* p, First f) { return (Bits16)_mm256_maskz_loadu_epi16(lane_mask(f), p); }
GM_INLINE void store_bits(void* p, Bits16 v, First f) { _mm256_mask_storeu_epi16(p, lane_mask(f), (__m256i)v); }
#else
#if defined(GM_AVX2)
GM_INLINE __m256i lane_mask32(First f) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(f.n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GM_INLINE __m256i lane_mask64(First f) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(f.n), _mm256_setr_epi64x(0, 1, 2, 3));
}
GM_INLINE Vec<float> load(const float* p, First f) { return (Vec<float>)_mm256_maskload_ps(p, lane_mask32(f)); }
GM_INLINE Vec<double> load(const double* p, First f) { return (Vec<double>)_mm256_maskload_pd(p, lane_mask64(f)); }
GM_INLINE void store(float* p, Vec<float> v, First f) { _mm256_maskstore_ps(p, lane_mask32(f), (__m256)v); }
GM_INLINE void store(double* p, Vec<double> v, First f) { _mm256_maskstore_pd(p, lane_mask64(f), (__m256d)v); }
#else
GM_INLINE Vec<float> load(const float* p, First f) {
    Vec<float> v{};
    std::memcpy(&v, p, static_cast<size_t>(f.n) * sizeof(float));
    return v;
}
GM_INLINE Vec<double> load(const double* p, First f) {
    Vec<double> v{};
    std::memcpy(&v, p, static_cast<size_t>(f.n) * sizeof(double));
    return v;
}
GM_INLINE void store(float* p, Vec<float> v, First f) { std::memcpy(p, &v, static_cast<size_t>(f.n) * sizeof(float)); }
GM_INLINE void store(double* p, Vec<double> v, First f) {
    std::memcpy(p, &v, static_cast<size_t>(f.n) * sizeof(double));
}
#endif
GM_INLINE Bits16 load_bits(const void* p, First f) {
    Bits16 v{};
    std::memcpy(&v, p, static_cast<size_t>(f.n) * 2);
    return v;
}
GM_INLINE void store_bits(void* p, Bits16 v, First f) { std::memcpy(p, &v, static_cast<size_t>(f.n) * 2); }
#endif

GM_INLINE Bits16 load_bits(const void* p, All) {
    Bits16 v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
GM_INLINE void store_bits(void* p, Bits16 v, All) { std::memcpy(p, &v, sizeof(v)); }

GM_INLINE Vec<float> widen(Bits16 bits, BFloat16) {
    return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

GM_INLINE Bits16 narrow(Vec<float> v, BFloat16) {
    const Vec<uint32_t> u = (Vec<uint32_t>)v;
    const Vec<uint32_t> even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // round to nearest, ties to even
    return __builtin_convertvector(v == v ? even : splat<uint32_t>(0x7fc0), Bits16);
}

#if defined(GM_AVX512)
GM_INLINE Vec<float> widen(Bits16 bits, Half) {
    return (Vec<float>)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(-1), (__m256i)bits);
}
GM_INLINE Bits16 narrow(Vec<float> v, Half) {
    return (Bits16)_mm512_maskz_cvtps_ph(static_cast<__mmask16>(-1), (__m512)v,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(GM_AVX2)
GM_INLINE Vec<float> widen(Bits16 bits, Half) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }
GM_INLINE Bits16 narrow(Vec<float> v, Half) {
    return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
GM_INLINE Vec<float> widen(Bits16 bits, Half) {
    const Vec<uint32_t> u = __builtin_convertvector(bits, Vec<uint32_t>);
    const Vec<uint32_t> magnitude = (u & 0x7fff) << 13;
    const Vec<uint32_t> bias = splat<uint32_t>(112u << 23), least = splat<uint32_t>(113u << 23);
    const Vec<uint32_t> subnormal = (Vec<uint32_t>)((Vec<float>)(magnitude | least) - (Vec<float>)least);
    const Vec<uint32_t> normal = magnitude + bias;
    Vec<uint32_t> result = magnitude >= (1u << 23) ? normal : subnormal;
    result = magnitude >= (31u << 23) ? normal + bias : result;  // infinity and NaN
    return (Vec<float>)(result | ((u & 0x8000) << 16));
}
GM_INLINE Bits16 narrow(Vec<float> v, Half) {
    const Vec<uint32_t> u = (Vec<uint32_t>)v;
    const Vec<uint32_t> magnitude = u & 0x7fffffff;
    const Vec<uint32_t> normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal half at the last bit of the sum.
    const Vec<uint32_t> subnormal = (Vec<uint32_t>)((Vec<float>)magnitude + 0.5f) - (126u << 23);
    Vec<uint32_t> result = magnitude >= (113u << 23) ? normal : subnormal;
    result = magnitude >= 0x477ff000u ? splat<uint32_t>(0x7c00) : result;  // 65520 and above round to infinity
    result = magnitude > 0x7f800000u ? splat<uint32_t>(0x7e00) : result;
    return __builtin_convertvector(result | ((u >> 16) & 0x8000), Bits16);
}
#endif

template <class Lanes>
GM_INLINE Vec<float> load(const Half* p, Lanes lanes) {
    return widen(load_bits(p, lanes), Half{});
}
template <class Lanes>
GM_INLINE Vec<float> load(const BFloat16* p, Lanes lanes) {
    return widen(load_bits(p, lanes), BFloat16{});
}
template <class Lanes>
GM_INLINE void store(Half* p, Vec<float> v, Lanes lanes) {
    store_bits(p, narrow(v, Half{}), lanes);
}
template <class Lanes>
GM_INLINE void store(BFloat16* p, Vec<float> v, Lanes lanes) {
    store_bits(p, narrow(v, BFloat16{}), lanes);
}

// The lanes that exist, zero elsewhere.
GM_INLINE Vec<float> keep(Vec<float> v, All) { return v; }
GM_INLINE Vec<double> keep(Vec<double> v, All) { return v; }
#if defined(GM_AVX512)
GM_INLINE Vec<float> keep(Vec<float> v, First f) { return (Vec<float>)_mm512_maskz_mov_ps(lane_mask(f), (__m512)v); }
#elif defined(GM_AVX2)
GM_INLINE Vec<float> keep(Vec<float> v, First f) {
    return (Vec<float>)_mm256_and_ps((__m256)v, (__m256)lane_mask32(f));
}
#else
GM_INLINE Vec<float> keep(Vec<float> v, First f) {
    for (int i = static_cast<int>(f.n); i < kLanes<float>; ++i) v[i] = 0;
    return v;
}
#endif
GM_INLINE Vec<double> keep(Vec<double> v, First f) {
    for (int i = static_cast<int>(f.n); i < kLanes<double>; ++i) v[i] = 0;
    return v;
}

// Sums over lanes, halves first.
#if defined(GM_AVX512) || defined(GM_AVX2)
GM_INLINE float sum_lanes(__m256 v) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
GM_INLINE double sum_lanes(__m256d v) {
    const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
#endif
#if defined(GM_AVX512)
GM_INLINE float sum(Vec<float> v) {
    constexpr __mmask8 kAll = 255;
    return sum_lanes(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(kAll, (__m512)v, 0),
                                   _mm512_maskz_extractf32x8_ps(kAll, (__m512)v, 1)));
}
GM_INLINE double sum(Vec<double> v) {
    constexpr __mmask8 kAll = 255;
    return sum_lanes(_mm256_add_pd(_mm512_maskz_extractf64x4_pd(kAll, (__m512d)v, 0),
                                   _mm512_maskz_extractf64x4_pd(kAll, (__m512d)v, 1)));
}
#elif defined(GM_AVX2)
GM_INLINE float sum(Vec<float> v) { return sum_lanes((__m256)v); }
GM_INLINE double sum(Vec<double> v) { return sum_lanes((__m256d)v); }
#else
GM_INLINE float sum(Vec<float> v) { return (v[0] + v[2]) + (v[1] + v[3]); }
GM_INLINE double sum(Vec<double> v) { return v[0] + v[1]; }
#endif

}  // namespace gm::cpu::GM_CPU_CAPABILITY
