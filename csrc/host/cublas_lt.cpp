// SPDX-License-Identifier: Apache-2.0
#include "host/cublas_lt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <array>
#include <map>
#include <memory>
#include <optional>

#include "cuda/common/tuning.h"
#include "host/explain.h"

// Weak as in blas.h.
extern "C" __attribute__((weak)) AOTITorchError torch_get_current_cuda_blas_handle(void** ret_handle);

namespace gm {
namespace {

// The part of cublasLt.h that is used here, the same in CUDA 12 and 13 (tests/build/test_cublas_lt.py compares them
// with the header). The library is the one that torch has loaded, so the toolkit of the build need not have it.
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

    Library() {
        void* loaded = nullptr;
        for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
            if (loaded == nullptr) loaded = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        const auto find = [&](auto& function, const char* name) {
            function =
                loaded == nullptr ? nullptr : reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(loaded, name));
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

const Library& library() {
    static const Library found;
    return found;
}

void check(int status) { GM_CHECK(status == 0, "cuBLASLt: status ", status); }

// A matrix of `rows` rows as cuBLAS sees it, column after column: transposed where its rows are what is adjacent.
struct Matrix {
    int64_t rows = 0, columns = 0, ld = 0, batch = 1, batch_stride = 0;
    bool by_rows = false, fits = false;

    explicit Matrix(const Tensor& t) {
        const int64_t last = t.dim() - 1;
        rows = t.size(last - 1), columns = t.size(last);
        if (last == 2) batch = t.size(0), batch_stride = t.stride(0);
        const int64_t row = t.stride(last - 1), column = t.stride(last);
        by_rows = column == 1 && row >= columns;
        ld = by_rows ? row : column;
        fits = by_rows || (row == 1 && column >= rows);
    }
};

template <class T>
using Owned = std::unique_ptr<T, int (*)(T*)>;

Owned<Layout> layout_of(const Matrix& m, cudaDataType_t type) {
    const Library& lt = library();
    Layout* layout = nullptr;
    check(lt.layout_create(&layout, type, static_cast<uint64_t>(m.by_rows ? m.columns : m.rows),
                           static_cast<uint64_t>(m.by_rows ? m.rows : m.columns), m.ld));
    Owned<Layout> owned(layout, lt.layout_destroy);
    if (m.batch > 1) {
        const int32_t count = static_cast<int32_t>(m.batch);
        check(lt.layout_set(layout, kBatchCount, &count, sizeof(count)));
        check(lt.layout_set(layout, kBatchOffset, &m.batch_stride, sizeof(m.batch_stride)));
    }
    return owned;
}

uint32_t alignment_of(const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p) | 256;
    return static_cast<uint32_t>(address & ~(address - 1));
}

// What the choice of an algorithm depends on.
using Key = std::array<int64_t, 20>;

// The best algorithm without a workspace and without sums in parts, or none. Layouts and alignments of the left and the
// right factor and of the result.
std::optional<Algo> choose(Handle handle, Desc* desc, Layout* const (&layouts)[3], const uint32_t (&alignments)[3]) {
    const Library& lt = library();
    Preference* made = nullptr;
    check(lt.preference_create(&made));
    const Owned<Preference> preference(made, lt.preference_destroy);
    const auto prefer = [&](int attribute, const auto& value) {
        check(lt.preference_set(preference.get(), attribute, &value, sizeof(value)));
    };
    prefer(kMaxWorkspace, uint64_t{0}), prefer(kReductionSchemes, uint32_t{0});
    prefer(kAlignA, alignments[0]), prefer(kAlignB, alignments[1]);
    prefer(kAlignC, alignments[2]), prefer(kAlignD, alignments[2]);
    HeuristicResult best{};
    int count = 0;
    const int status =
        lt.heuristic(handle, desc, layouts[0], layouts[1], layouts[2], layouts[2], preference.get(), 1, &best, &count);
    const bool usable = status == 0 && count > 0 && best.state == 0 && best.workspace_size == 0;
    return usable ? std::optional(best.algo) : std::nullopt;
}

}  // namespace

bool matmul_without_workspace(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, const Tensor* row,
                              bool add, cudaStream_t stream) {
    if (out.numel() < tuning::kNoWorkspaceLeast) return false;
    const bool half = dtype_code(out) == aoti_torch_dtype_float16();
    if (!half && dtype_code(out) != aoti_torch_dtype_bfloat16()) return false;
    const Library& lt = library();
    if (!lt.complete || torch_get_current_cuda_blas_handle == nullptr) return false;
    // Column after column, out is the transposed product: out^T = b^T a^T.
    const Matrix matrices[3] = {Matrix(b), Matrix(a), Matrix(out)};
    const auto& [left, right, result] = matrices;
    if (!left.fits || !right.fits || !result.by_rows || left.rows == 0) return false;

    const cudaDataType_t type = half ? CUDA_R_16F : CUDA_R_16BF;
    Desc* created = nullptr;
    check(lt.desc_create(&created, kCompute32F, CUDA_R_32F));
    const Owned<Desc> desc(created, lt.desc_destroy);
    const auto set = [&](DescAttribute attribute, const auto& value) {
        check(lt.desc_set(created, attribute, &value, sizeof(value)));
    };
    set(kTransA, left.by_rows ? kOpN : kOpT), set(kTransB, right.by_rows ? kOpN : kOpT);
    if (row != nullptr) {
        const void* const bias = row->data_ptr();
        set(kEpilogue, kEpilogueBias), set(kBiasPointer, bias);
    }
    const Owned<Layout> owned[3] = {layout_of(left, type), layout_of(right, type), layout_of(result, type)};
    Layout* const layouts[3] = {owned[0].get(), owned[1].get(), owned[2].get()};
    void* const data[3] = {b.data_ptr(), a.data_ptr(), out.data_ptr()};
    void* handle = nullptr;
    GM_TORCH_CALL(torch_get_current_cuda_blas_handle(&handle));

    Key key{out.get_device_index(), type, row != nullptr, add, result.batch};
    size_t used = 5;
    for (const Matrix& m : matrices)
        for (const int64_t part : {m.rows, m.columns, m.by_rows ? m.ld : -m.ld, m.batch > 1 ? m.batch_stride : 0})
            key[used++] = part;
    uint32_t alignments[3];
    for (int i = 0; i < 3; ++i) key[used++] = alignments[i] = alignment_of(data[i]);
    static_assert(5 + 3 * 4 + 3 == std::tuple_size_v<Key>);
    // What this thread has met. Bounded, for those whose sizes never come again.
    constexpr size_t kMostKeys = 1024;
    thread_local std::map<Key, std::optional<Algo>> met;
    auto found = met.find(key);
    if (found == met.end()) {
        if (met.size() >= kMostKeys) met.clear();
        found = met.emplace(key, choose(handle, created, layouts, alignments)).first;
    }
    if (!found->second) return false;
    note("product ", show(shape_of(a)), " by ", show(shape_of(b)), ": cuBLASLt without a workspace");
    const float factor = static_cast<float>(alpha), of_out = add ? 1.f : 0.f;
    check(lt.matmul(handle, created, &factor, data[0], layouts[0], data[1], layouts[1], &of_out, data[2], layouts[2],
                    data[2], layouts[2], &*found->second, nullptr, 0, stream));
    return true;
}

}  // namespace gm
