// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

struct __half {
    _Float16 value;
};
struct alignas(4) __half2 {
    __half x, y;
};
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
