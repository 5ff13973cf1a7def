// SPDX-License-Identifier: Apache-2.0
#include "host/cublas_lt.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda/common/tuning.h"
#include "host/cublas_lt_api.h"
#include "host/explain.h"
#include "host/stream.h"

// Weak as in blas.h.
extern "C" __attribute__((weak)) AOTITorchError torch_get_current_cuda_blas_handle(void** ret_handle);

namespace gm {
namespace {

using namespace cublas_lt;

std::atomic<int (*)()> wants_choice_by_time{nullptr};

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

// The product: layouts and places of the left and the right factor and of the result.
struct Product {
    Handle handle;
    Desc* desc;
    Layout* layouts[3];
    void* data[3];
    float alpha, of_result;  // what is added of what the result holds
    cudaStream_t stream;

    // Writes its result to `to`.
    int launch(const Algo& algo, void* to) const {
        return library().matmul(handle, desc, &alpha, data[0], layouts[0], data[1], layouts[1], &of_result, data[2],
                                layouts[2], to, layouts[2], &algo, nullptr, 0, stream);
    }
};

void check_timing(cudaError_t error) { check_cuda(error, "timing a product"); }

class Event {
public:
    Event() { check_timing(cudaEventCreate(&event_)); }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(cudaStream_t stream) const { check_timing(cudaEventRecord(event_, stream)); }
    // Milliseconds since `start`, once both have happened.
    float since(const Event& start) const {
        float time = 0.f;
        check_timing(cudaEventSynchronize(event_));
        check_timing(cudaEventElapsedTime(&time, start.event_, event_));
        return time;
    }

private:
    cudaEvent_t event_ = nullptr;
};

// Milliseconds of a few launches; infinite for what does not run.
float time_of(const Product& product, const Algo& algo, void* to, const Event& start, const Event& end) {
    constexpr int kLaunches = 4;
    constexpr float kNever = std::numeric_limits<float>::infinity();
    if (product.launch(algo, to) != 0) return kNever;
    float best = kNever;
    for (int round = 0; round < 2; ++round) {
        start.record(product.stream);
        for (int i = 0; i < kLaunches; ++i) check(product.launch(algo, to));
        end.record(product.stream);
        best = std::min(best, end.since(start));
    }
    return best;
}

// The first of `found`, or another that takes at least 2% less time. What runs beside them, or is queued before, may
// make the times wrong, but no result: that of a product is written anew, and one that is added to `out` is timed with
// other memory for its result, if there is any.
const Algo& fastest(const Product& product, const std::vector<HeuristicResult>& found, const Tensor& out) {
    Tensor scratch = out;
    if (product.of_result != 0.f) {
        const int64_t last = out.dim() - 1, matrix = out.size(last - 1) * out.stride(last - 1);
        try {
            scratch = empty({last == 2 ? (out.size(0) - 1) * out.stride(0) + matrix : matrix}, out.scalar_type(), out);
        } catch (const std::exception&) {
            return found[0].algo;
        }
    }
    const Event start, end;
    std::vector<float> times;
    for (const HeuristicResult& result : found)
        times.push_back(time_of(product, result.algo, scratch.data_ptr(), start, end));
    const size_t least = static_cast<size_t>(std::min_element(times.begin(), times.end()) - times.begin());
    const size_t taken = times[least] < 0.98f * times[0] ? least : 0;
    note("product of ", show(shape_of(out)), " results: algorithm ", taken + 1, " of ", found.size(), " by time");
    return found[taken].algo;
}

bool is_captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream, &status), "the state of a stream");
    return status != cudaStreamCaptureStatusNone;
}

// At most so many algorithms without a workspace and without sums in parts, by cuBLASLt's estimate the fastest first.
// `alignments` as the layouts.
std::vector<HeuristicResult> candidates(const Product& product, const uint32_t (&alignments)[3], size_t most) {
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
    std::vector<HeuristicResult> found(most);
    int count = 0;
    const int status =
        lt.heuristic(product.handle, product.desc, product.layouts[0], product.layouts[1], product.layouts[2],
                     product.layouts[2], preference.get(), static_cast<int>(most), found.data(), &count);
    found.resize(status == 0 ? static_cast<size_t>(count) : 0);
    const auto unusable = [](const HeuristicResult& r) { return r.state != 0 || r.workspace_size != 0; };
    found.erase(std::remove_if(found.begin(), found.end(), unusable), found.end());
    return found;
}

// Of sizes that a thread, or all that time algorithms, have met. Bounded, for those whose sizes never come again.
constexpr size_t kMostKeys = 1024;

// An algorithm, or none where cuBLASLt offers none. Those chosen by time are the process's: another thread takes them.
std::optional<Algo> choose(const Key& key, const Product& product, const uint32_t (&alignments)[3], const Tensor& out) {
    int (*const wanted)() = wants_choice_by_time.load(std::memory_order_relaxed);
    if (wanted == nullptr || is_captured(product.stream) || wanted() == 0) {
        const std::vector<HeuristicResult> found = candidates(product, alignments, 1);
        return found.empty() ? std::nullopt : std::optional(found[0].algo);
    }
    static std::mutex mutex;
    static std::map<Key, std::optional<Algo>> timed;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto met = timed.find(key);
    if (met != timed.end()) return met->second;
    const std::vector<HeuristicResult> found = candidates(product, alignments, 8);
    std::optional<Algo> algo;
    if (!found.empty())
        algo = found.size() > 1 && timed.size() < kMostKeys ? fastest(product, found, out) : found[0].algo;
    if (timed.size() < kMostKeys) timed.emplace(key, algo);
    return algo;
}

}  // namespace

bool matmul_without_workspace(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, const Tensor* row,
                              bool add, cudaStream_t stream) {
    if (out.numel() < tuning::kNoWorkspaceLeast) return false;
    const bool half = dtype_code(out) == aoti_torch_dtype_float16();
    if (!half && dtype_code(out) != aoti_torch_dtype_bfloat16()) return false;
    const Library& lt = library();
    if (!lt.complete || torch_get_current_cuda_blas_handle == nullptr) return false;
    // The choice of an algorithm takes no account of where the row lies.
    if (row != nullptr && reinterpret_cast<uintptr_t>(row->data_ptr()) % 16 != 0) return false;
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
    Product product{nullptr,
                    created,
                    {owned[0].get(), owned[1].get(), owned[2].get()},
                    {b.data_ptr(), a.data_ptr(), out.data_ptr()},
                    static_cast<float>(alpha),
                    add ? 1.f : 0.f,
                    stream};
    GM_TORCH_CALL(torch_get_current_cuda_blas_handle(&product.handle));

    Key key{out.get_device_index(), type, row != nullptr, add, result.batch};
    size_t used = 5;
    for (const Matrix& m : matrices)
        for (const int64_t part : {m.rows, m.columns, m.by_rows ? m.ld : -m.ld, m.batch > 1 ? m.batch_stride : 0})
            key[used++] = part;
    uint32_t alignments[3];
    for (int i = 0; i < 3; ++i) key[used++] = alignments[i] = alignment_of(product.data[i]);
    static_assert(5 + 3 * 4 + 3 == std::tuple_size_v<Key>);
    thread_local std::map<Key, std::optional<Algo>> met;
    auto found = met.find(key);
    if (found == met.end()) {
        if (met.size() >= kMostKeys) met.clear();
        found = met.emplace(key, choose(key, product, alignments, out)).first;
    }
    if (!found->second) return false;
    const int status = product.launch(*found->second, product.data[2]);
    if (status == kInvalidValue || status == kNotSupported) {  // said before anything is queued
        found->second = std::nullopt;
        return false;
    }
    check(status);
    if (explains()) note("product ", show(shape_of(a)), " by ", show(shape_of(b)), ": cuBLASLt without a workspace");
    return true;
}

}  // namespace gm

void groupmamba_choose_by_time(int (*wanted)()) { gm::wants_choice_by_time = wanted; }
