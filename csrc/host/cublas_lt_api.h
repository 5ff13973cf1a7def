// SPDX-License-Identifier: Apache-2.0
// The part of cublasLt.h that cublas_lt.cpp uses, the same in CUDA 12 and 13; tests/build/test_cublas_lt.py compares it
// with the header. The library is torch's, so the toolkit of the build need not have it.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>

#include <array>
#include <cstdint>
#include <type_traits>

namespace gm::cublas_lt {

using Handle = void*;
struct Desc;
struct Layout;
struct Preference;
using Algo = std::array<uint64_t, 8>;
struct HeuristicResult {
    Algo algo;
    size_t workspace_size;
    int state;
    float waves_count;
    int reserved[4];
};
enum : int { kCompute32F = 68 };
enum : int { kInvalidValue = 7, kNotSupported = 15 };
enum : int32_t { kOpN = 0, kOpT = 1 };
enum DescAttribute : int { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8 };
enum : uint32_t { kEpilogueBias = 4 };
enum LayoutAttribute : int { kBatchCount = 5, kBatchOffset = 6 };
enum PreferenceAttribute : int { kMaxWorkspace = 1, kReductionSchemes = 3, kAlignA = 5, kAlignB, kAlignC, kAlignD };

struct Library {
    int (*desc_create)(Desc**, int compute, cudaDataType_t scale) = nullptr;
    int (*desc_destroy)(Desc*) = nullptr;
    int (*desc_set)(Desc*, int, const void*, size_t) = nullptr;
    int (*layout_create)(Layout**, cudaDataType_t, uint64_t rows, uint64_t columns, int64_t ld) = nullptr;
    int (*layout_destroy)(Layout*) = nullptr;
    int (*layout_set)(Layout*, int, const void*, size_t) = nullptr;
    int (*preference_create)(Preference**) = nullptr;
    int (*preference_destroy)(Preference*) = nullptr;
    int (*preference_set)(Preference*, int, const void*, size_t) = nullptr;
    int (*heuristic)(Handle, Desc*, Layout* a, Layout* b, Layout* c, Layout* d, Preference*, int wanted,
                     HeuristicResult*, int* found) = nullptr;
    int (*matmul)(Handle, Desc*, const void* alpha, const void* a, Layout*, const void* b, Layout*, const void* beta,
                  const void* c, Layout*, void* d, Layout*, const Algo*, void* workspace, size_t,
                  cudaStream_t) = nullptr;
    bool complete = true;

    // Looked up among what libgroupmamba needs, which is torch's: another may be loaded beside it.
    Library() {
        static const char here = 0;
        Dl_info info{};
        void* const own = dladdr(&here, &info) == 0 ? nullptr : dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
        const auto find = [&](auto& function, const char* name) {
            function = own == nullptr ? nullptr : reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(own, name));
            complete = complete && function != nullptr;
        };
        find(desc_create, "cublasLtMatmulDescCreate"), find(desc_destroy, "cublasLtMatmulDescDestroy");
        find(desc_set, "cublasLtMatmulDescSetAttribute");
        find(layout_create, "cublasLtMatrixLayoutCreate"), find(layout_destroy, "cublasLtMatrixLayoutDestroy");
        find(layout_set, "cublasLtMatrixLayoutSetAttribute");
        find(preference_create, "cublasLtMatmulPreferenceCreate");
        find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
        find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
        find(heuristic, "cublasLtMatmulAlgoGetHeuristic"), find(matmul, "cublasLtMatmul");
    }
};

}  // namespace gm::cublas_lt
