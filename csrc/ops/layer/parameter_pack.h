// SPDX-License-Identifier: Apache-2.0
// Parameters cast, padded and transformed by one launch, and their gradients on the way back.
#pragma once

#include <array>

#include "cuda/parameters/launch.h"
#include "host/cuda_args.h"
#include "host/stream.h"
#include "host/workspace.h"
#include "ops/entries_cuda.h"

namespace gm {

inline bool is_vector_aligned(const void* p, const Tensor& t) {
    return reinterpret_cast<uintptr_t>(p) % (kVec * static_cast<size_t>(t.element_size())) == 0;
}

// Packed parameters that a forward keeps for its backward, which then seldom has any to pack. A place for each in the
// order of add(), none for one that is not kept. They live as long as what else is kept: in 16 bits 2 bytes for each
// element of a product's weight.
struct KeptParameters {
    const Workspace* workspace = nullptr;
    std::vector<std::optional<Workspace::Piece>> places;
    bool written = false;  // by the forward
};

// Parameters in the order of add(). One that needs no change is used as it is; the others, and those that are not
// contiguous, get places in a workspace; kept ones are all written to theirs. Once the workspace is allocated,
// prepare() finds their addresses and launch() writes them, on any stream ordered after the current one.
class ParameterPack {
public:
    ParameterPack(ScalarType image_dtype, Workspace& workspace, KeptParameters kept = {})
        : image_dtype_(image_dtype), workspace_(workspace), kept_(std::move(kept)) {
        entries_.reserve(kMaxPackItems);
    }

    // `t`, seen as (n0, n1, n2), as (n0, w1, w2) in `dtype`: the images' dtype or float32.
    void add(const Tensor& t, const std::array<int64_t, 3>& sizes, int64_t w1, int64_t w2, ScalarType dtype,
             bool negative_exp = false) {
        Entry e{t, sizes, w1, w2, negative_exp, std::nullopt, false};
        if (entries_.size() < kept_.places.size()) e.place = kept_.places[entries_.size()];
        e.kept = e.place.has_value();
        const bool same = !negative_exp && w1 == sizes[1] && w2 == sizes[2] && t.scalar_type() == dtype;
        if (!e.kept && (!same || !t.is_contiguous())) {
            const int64_t count = sizes[0] * w1 * w2;
            e.place = dtype == image_dtype_ ? workspace_.reserve_image(count) : workspace_.reserve_float(count);
        }
        entries_.push_back(e);
    }

    void prepare() {
        for (const Entry& e : entries_) {
            if (!e.place || (e.kept && kept_.written)) continue;
            GM_CHECK(args_.count < kMaxPackItems, "too many parameters for one launch");
            const auto& [n0, n1, n2] = e.sizes;
            PackItem& item = args_.items[args_.count++];
            // A torch.channels_last model has its convolution weights in that format: read in place like any view.
            const std::optional<Shape> strides = view_strides(e.tensor, {n0, n1, n2});
            if (strides) {
                item.from = {e.tensor.data_ptr(), is_float(e.tensor)};
                std::copy(strides->begin(), strides->end(), item.strides);
            } else {
                item.from = param_(e.tensor);
                item.strides[0] = n1 * n2, item.strides[1] = n2, item.strides[2] = 1;
            }
            item.to = {workspace_of(e).address(*e.place), e.place->is_float};
            item.n1 = static_cast<int>(n1), item.n2 = static_cast<int>(n2);
            item.w1 = static_cast<int>(e.w1), item.w2 = static_cast<int>(e.w2);
            item.negative_exp = e.negative_exp;
            item.vectors = e.w2 % kVec == 0;  // places in a workspace are aligned
            item.reads_vectors = item.strides[0] % kVec == 0 && item.strides[1] % kVec == 0 && item.strides[2] == 1 &&
                                 is_vector_aligned(item.from.ptr, e.tensor);
            item.count = n0 * e.w1 * e.w2;
            GM_CHECK(item.count <= INT32_MAX, "a parameter has more than 2^31 elements");
        }
    }

    void launch(DType dtype, cudaStream_t stream) const {
        if (args_.count == 0) return;
        check_cuda(launch_pack_parameters(args_, dtype, stream), "parameters");
    }

    // Parameter i, shaped `shape`, which has n0 * w1 * w2 elements.
    Tensor get(int i, const Shape& shape) const { return get(i, shape, contiguous_strides(shape)); }

    // The same with the last two dimensions swapped.
    Tensor get_transposed(int i, Shape shape) const {
        Shape strides = contiguous_strides(shape);
        const size_t last = shape.size() - 1;
        std::swap(shape[last], shape[last - 1]), std::swap(strides[last], strides[last - 1]);
        return get(i, shape, strides);
    }

private:
    struct Entry {
        Tensor tensor;
        std::array<int64_t, 3> sizes;
        int64_t w1, w2;
        bool negative_exp;
        std::optional<Workspace::Piece> place;  // none where the parameter itself is used
        bool kept;
    };
    const Workspace& workspace_of(const Entry& e) const { return e.kept ? *kept_.workspace : workspace_; }
    Tensor get(int i, const Shape& shape, const Shape& strides) const {
        const Entry& e = entries_[static_cast<size_t>(i)];
        return e.place ? workspace_of(e).get(*e.place, shape, strides) : alias(e.tensor, shape, strides);
    }

    ScalarType image_dtype_;
    Workspace& workspace_;
    KeptParameters kept_;
    std::vector<Entry> entries_;
    PackArgs args_;
    ParamHolder param_;  // copies of parameters whose strides the kernel does not take
};

// Gradients of parameters, queued one by one and computed by one launch.
class ParameterSums {
public:
    ParameterSums() { kept_.reserve(4 * kMaxSumItems); }

    // A gradient like `parameter`, seen as (n0 * inner, n1, n2), from `parts` parts of (inner, w1, w2) for each of n0.
    Tensor add(const Tensor& parameter, const Shape& sizes, const Tensor& from, int64_t w1, int64_t w2,
               int64_t parts = 1, int64_t inner = 1, const OptTensor& scale = std::nullopt) {
        SumItem& item = next(from);
        item.from = {from.data_ptr(), is_float(from)};
        item.inner = static_cast<int>(inner), item.parts = static_cast<int>(parts);
        item.part_stride = inner * w1 * w2;
        if (scale) {
            kept_.push_back(*scale);
            item.scale = static_cast<const float*>(scale->data_ptr());
        }
        return gradient(item, parameter, sizes, w1, w2);
    }

    // The same from rows of partial sums, whose columns from `first` on are (n0, w1, w2).
    Tensor add_rows(const Tensor& parameter, const Shape& sizes, const PartialRows& from, int64_t first, int64_t w1,
                    int64_t w2) {
        SumItem& item = next(from.values);
        item.from = {from.column(first), true};
        item.inner = static_cast<int>(sizes[0]), item.parts = static_cast<int>(from.rows);
        item.part_stride = from.columns;
        return gradient(item, parameter, sizes, w1, w2);
    }

    // The gradient of a vector used twice: columns `first` of one matrix, `more_first` of the other.
    Tensor add_rows(const Tensor& parameter, const PartialRows& from, int64_t first, const PartialRows& more,
                    int64_t more_first) {
        const int64_t size = parameter.numel();
        SumItem& item = next(from.values);
        item.from = {from.column(first), true};
        item.parts = static_cast<int>(from.rows), item.part_stride = from.columns;
        kept_.push_back(more.values);
        item.more = more.column(more_first);
        item.more_parts = static_cast<int>(more.rows), item.more_stride = more.columns;
        return gradient(item, parameter, {1, 1, size}, 1, size);
    }

    void launch(DType dtype, cudaStream_t stream) {
        check_cuda(launch_sum_parameters(args_, dtype, stream), "parameter sums");
    }

private:
    SumItem& next(const Tensor& from) {
        GM_CHECK(args_.count < kMaxSumItems, "too many parameters for one launch");
        kept_.push_back(from);
        return args_.items[args_.count++];
    }

    Tensor gradient(SumItem& item, const Tensor& parameter, const Shape& sizes, int64_t w1, int64_t w2) {
        item.n1 = static_cast<int>(sizes[1]), item.n2 = static_cast<int>(sizes[2]);
        item.w1 = static_cast<int>(w1), item.w2 = static_cast<int>(w2);
        item.count = sizes[0] * sizes[1] * sizes[2];
        GM_CHECK(item.count <= INT32_MAX && item.parts <= INT32_MAX, "a parameter has more than 2^31 elements");
        const Tensor result =
            empty_strided(shape_of(parameter), gradient_strides(parameter), parameter.scalar_type(), kept_.back());
        const std::optional<Shape> strides = view_strides(result, sizes);
        GM_CHECK(strides.has_value(), "a gradient of shape ", show(shape_of(parameter)), " can't be written");
        std::copy(strides->begin(), strides->end(), item.to_strides);
        item.to = {result.data_ptr(), is_float(result)};
        item.vectors = item.n2 % kVec == 0 && w2 % kVec == 0 && item.part_stride % kVec == 0 &&
                       item.to_strides[0] % kVec == 0 && item.to_strides[1] % kVec == 0 && item.to_strides[2] == 1 &&
                       item.more == nullptr && item.scale == nullptr && is_vector_aligned(item.to.ptr, result) &&
                       reinterpret_cast<uintptr_t>(item.from.ptr) % (kVec * sizeof(float)) == 0;
        kept_.push_back(result);
        return result;
    }

    SumArgs args_;
    std::vector<Tensor> kept_;
};

}  // namespace gm
