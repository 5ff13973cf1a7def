// SPDX-License-Identifier: Apache-2.0
// Parameters cast, padded and transformed by one launch, and their gradients on the way back.
#pragma once

#include "cuda/launch.h"
#include "host/blas.h"
#include "host/cuda_args.h"
#include "host/stream.h"

namespace gm {

// Parameters in the order of add(). One that needs no change is used as it is; the others, and those that are not
// contiguous, lie in one buffer of the images' dtype and one of float32.
class ParameterPack {
public:
    explicit ParameterPack(ScalarType image_dtype) : image_dtype_(image_dtype) {}

    // `t`, seen as (n0, n1, n2), as (n0, w1, w2) in `dtype`: the images' dtype or float32.
    void add(const Tensor& t, const Shape& sizes, int64_t w1, int64_t w2, ScalarType dtype, bool negative_exp = false) {
        Entry e{t, sizes, w1, w2, dtype, negative_exp, -1};
        const bool same = !negative_exp && w1 == sizes[1] && w2 == sizes[2] && t.scalar_type() == dtype;
        if (!same || !t.is_contiguous()) {
            int64_t& end = dtype == ScalarType::Float ? float_end_ : low_end_;
            e.offset = end;
            end += round_up(sizes[0] * w1 * w2, 16);
        }
        entries_.push_back(e);
    }

    // Allocates the buffers and fills them.
    void pack(const Tensor& device_of, DType dtype, cudaStream_t stream) {
        low_ = empty({low_end_}, image_dtype_, device_of);
        full_ = empty({float_end_}, ScalarType::Float, device_of);
        PackArgs args;
        ParamHolder param;
        for (const Entry& e : entries_) {
            if (e.offset < 0) continue;
            GM_CHECK(args.count < kMaxPackItems, "too many parameters for one launch");
            PackItem& item = args.items[args.count++];
            const Tensor to = view_of(e);
            // A model in torch.channels_last has its convolutions' weights so: read in place like any view.
            const std::optional<Shape> strides = view_strides(e.tensor, e.sizes);
            if (strides) {
                item.from = {e.tensor.data_ptr(), e.tensor.scalar_type() == ScalarType::Float};
            } else {
                item.from = param(e.tensor);
            }
            const Shape steps = strides ? *strides : contiguous_strides(e.sizes);
            std::copy(steps.begin(), steps.end(), item.strides);
            item.to = {to.data_ptr(), e.dtype == ScalarType::Float};
            item.n1 = static_cast<int>(e.sizes[1]), item.n2 = static_cast<int>(e.sizes[2]);
            item.w1 = static_cast<int>(e.w1), item.w2 = static_cast<int>(e.w2);
            item.negative_exp = e.negative_exp;
            item.count = e.sizes[0] * e.w1 * e.w2;
        }
        check_cuda(launch_pack_parameters(args, dtype, stream), "parameters");
    }

    // Parameter i, shaped `shape`, which has n0 * w1 * w2 elements.
    Tensor get(int i, const Shape& shape) const {
        const Entry& e = entries_[static_cast<size_t>(i)];
        if (e.offset < 0) return alias(e.tensor, shape);
        return alias(e.dtype == ScalarType::Float ? full_ : low_, shape, contiguous_strides(shape), e.offset);
    }

private:
    struct Entry {
        Tensor tensor;
        Shape sizes;
        int64_t w1, w2;
        ScalarType dtype;
        bool negative_exp;
        int64_t offset;  // in its buffer; -1 where the parameter itself is used
    };
    Tensor view_of(const Entry& e) const {
        const Shape shape{e.sizes[0], e.w1, e.w2};
        return alias(e.dtype == ScalarType::Float ? full_ : low_, shape, contiguous_strides(shape), e.offset);
    }

    ScalarType image_dtype_;
    Tensor low_, full_;
    int64_t low_end_ = 0, float_end_ = 0;
    std::vector<Entry> entries_;
};

// Gradients of parameters, queued one by one and computed by one launch.
class ParameterSums {
public:
    // A gradient like `parameter`, seen as (n0 * inner, n1, n2), from `parts` parts of (inner, w1, w2) for each of n0.
    Tensor add(const Tensor& parameter, const Shape& sizes, const Tensor& from, int64_t w1, int64_t w2,
               int64_t parts = 1, int64_t inner = 1, const OptTensor& add = std::nullopt,
               const OptTensor& scale = std::nullopt) {
        GM_CHECK(args_.count < kMaxSumItems, "too many parameters for one launch");
        Tensor gradient = empty(shape_of(parameter), parameter.scalar_type(), from);
        kept_.push_back(from), kept_.push_back(gradient);
        SumItem& item = args_.items[args_.count++];
        item.from = {from.data_ptr(), from.scalar_type() == ScalarType::Float};
        if (add) {
            kept_.push_back(*add);
            item.add = {add->data_ptr(), add->scalar_type() == ScalarType::Float};
        }
        if (scale) {
            kept_.push_back(*scale);
            item.scale = static_cast<const float*>(scale->data_ptr());
        }
        item.to = {gradient.data_ptr(), gradient.scalar_type() == ScalarType::Float};
        item.n1 = static_cast<int>(sizes[1]), item.n2 = static_cast<int>(sizes[2]);
        item.w1 = static_cast<int>(w1), item.w2 = static_cast<int>(w2);
        item.inner = static_cast<int>(inner), item.parts = static_cast<int>(parts);
        item.count = sizes[0] * sizes[1] * sizes[2];
        return gradient;
    }

    void launch(DType dtype, cudaStream_t stream) {
        check_cuda(launch_sum_parameters(args_, dtype, stream), "parameter sums");
    }

private:
    SumArgs args_;
    std::vector<Tensor> kept_;
};

}  // namespace gm
