// SPDX-License-Identifier: Apache-2.0
// Conversions, 4-channel accesses and the scalar functions of the scan, by storage type.
//
// float storage uses CUDA's accurate math functions (errors of an ulp or two against float64). half and bfloat16 use
// the special-function unit directly; its errors (under 1e-5 relative, see softplus) vanish below their rounding of
// 1e-3.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/args.h"
#include "cuda/common/ptx/special.cuh"
#include "cuda/common/vec.h"

namespace gm {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

// Four adjacent channels as stored, moved in one access where alignment allows.
template <class T>
struct alignas(sizeof(T) * kVec) Vec4 {
    T v[kVec];
};

// kAligned: every access is aligned and a thread has either 4 channels or none; else element by element.
template <bool kAligned, class T>
__device__ __forceinline__ Vec4<T> load4(const T* p, int valid) {
    Vec4<T> out = {};
    if constexpr (kAligned) {
        if (valid > 0) out = *reinterpret_cast<const Vec4<T>*>(p);
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (j < valid) out.v[j] = p[j];
    }
    return out;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store4(T* p, const float (&x)[kVec], int valid) {
    if constexpr (kAligned) {
        Vec4<T> out;
#pragma unroll
        for (int j = 0; j < kVec; ++j) out.v[j] = from_float<T>(x[j]);
        if (valid > 0) *reinterpret_cast<Vec4<T>*>(p) = out;
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            if (j < valid) p[j] = from_float<T>(x[j]);
    }
}

// Two 16-bit values of a 32-bit word at once: half the instructions of four single conversions.
__device__ __forceinline__ void to_floats(const Vec4<__nv_bfloat16>& in, float (&out)[kVec]) {
    const uint2 w = reinterpret_cast<const uint2&>(in);
    out[0] = __uint_as_float(w.x << 16), out[1] = __uint_as_float(w.x & 0xffff0000u);
    out[2] = __uint_as_float(w.y << 16), out[3] = __uint_as_float(w.y & 0xffff0000u);
}
__device__ __forceinline__ void to_floats(const Vec4<__half>& in, float (&out)[kVec]) {
    const float2 low = __half22float2(reinterpret_cast<const __half2*>(&in)[0]);
    const float2 high = __half22float2(reinterpret_cast<const __half2*>(&in)[1]);
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
}
__device__ __forceinline__ void to_floats(const Vec4<float>& in, float (&out)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[j] = in.v[j];
}

template <class T>
__device__ __forceinline__ float load_param(const ParamArg& p, int64_t i) {
    return p.is_float ? static_cast<const float*>(p.ptr)[i] : to_float(static_cast<const T*>(p.ptr)[i]);
}

// kCount elements from `first` on, all on their way at once: element by element each would have its own branch, and
// wait for the one before. 0 where `in` is false.
template <class T, int kCount>
__device__ __forceinline__ void load_params(const ParamArg& p, int64_t first, bool in, float (&out)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = 0.f;
    if (!in) return;
    if (p.is_float) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) out[j] = static_cast<const float*>(p.ptr)[first + j];
    } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) out[j] = to_float(static_cast<const T*>(p.ptr)[first + j]);
    }
}

// `fallback` where the parameter is absent.
template <class T>
__device__ __forceinline__ float load_param_or(const ParamArg& p, int64_t i, float fallback) {
    return p.ptr == nullptr ? fallback : load_param<T>(p, i);
}

// By what the branch of an image is multiplied.
__device__ __forceinline__ float drop_path_factor(const DropPathArg& drop_path, int64_t image) {
    return drop_path.mask == nullptr ? 1.f : drop_path.mask[image] * drop_path.scale;
}
__device__ __forceinline__ bool keeps_branch(const DropPathArg& drop_path, int64_t image) {
    return drop_path.mask == nullptr || drop_path.mask[image] != 0.f;
}

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// sum / count, given 1 / count, rounded once: the error of the reciprocal would be multiplied by mean / deviation.
__device__ __forceinline__ float mean_of(float sum, float count, float inverse) {
    const float mean = sum * inverse;
    return fmaf(fmaf(-mean, count, sum), inverse, mean);
}

// Steps and decays. For 16-bit storage the step is kept in units of ln 2, s' = s / ln 2, so that both special
// functions work in base 2: s' = max(x', 0) + lg2(1 + 2^-|x'|) with x' = x / ln 2 (dt_weight and dt_bias contain the
// factor), and exp(s A) = 2^(s' A). kStepUnit is the unit.
template <class T>
struct Math {  // 16-bit storage
    static constexpr float kStepUnit = kLn2;
    static __device__ __forceinline__ float decay(float step, float A) { return ex2_approx(step * A); }
    // for steps down to 1e-3 the rounding of 1 + e costs 6e-5 relative
    static __device__ __forceinline__ float softplus(float x) {
        return fmaxf(x, 0.f) + lg2_approx(1.f + ex2_approx(-fabsf(x)));
    }
    // g times d softplus / dx, from softplus' value s: g (1 - exp(-s)). The difference loses digits where s is small:
    // 6e-8 of g.
    static __device__ __forceinline__ float through_softplus(float g, float step) {
        return fmaf(-g, ex2_approx(-step), g);
    }
    static __device__ __forceinline__ float sigmoid(float x) { return rcp_approx(1.f + ex2_approx(-kLog2e * x)); }
    static __device__ __forceinline__ float rsqrt(float x) { return rsqrt_approx(x); }
};

template <>
struct Math<float> {
    static constexpr float kStepUnit = 1.f;
    static __device__ __forceinline__ float decay(float step, float A) { return expf(step * A); }
    static __device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
    static __device__ __forceinline__ float through_softplus(float g, float step) { return -g * expm1f(-step); }
    static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
    static __device__ __forceinline__ float rsqrt(float x) { return 1.f / sqrtf(x); }
};

// Makes the compiler forget what it knows of these values, so that it computes what depends on them again: the decays
// exp(step A), kept in registers over all phases of the scan's backward, would take 28 of them.
__device__ __forceinline__ void hide(float (&x)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) forget(x[j]);
}

}  // namespace gm
