// SPDX-License-Identifier: Apache-2.0
// Tensors to the plain arguments of the CPU kernels, parameter rows both ways, and threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/params.h"
#include "host/tensor.h"

namespace gm::cpu {

inline DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::kFloat;
        case ScalarType::Double: return DType::kDouble;
        case ScalarType::Half: return DType::kHalf;
        case ScalarType::BFloat16: return DType::kBFloat16;
        default: break;
    }
    GM_CHECK(false, "the CPU kernels take float32, float64, float16 and bfloat16");
    return DType::kFloat;
}

// f(T{}) for the element type of `t`.
template <class F>
void with_element_type(const Tensor& t, const F& f) {
    switch (dtype_of(t)) {
        case DType::kFloat: return f(float{});
        case DType::kDouble: return f(double{});
        case DType::kHalf: return f(torch::headeronly::Half{});
        case DType::kBFloat16: return f(torch::headeronly::BFloat16{});
    }
}

// `t` must be canonical (see canonical_image).
inline ConstImage const_image(const Tensor& t) {
    const ImageStrides s = image_strides(t);
    return {t.data_ptr(), s.batch, s.token, s.group};
}
inline Image image(const Tensor& t) {
    const ImageStrides s = image_strides(t);
    return {t.data_ptr(), s.batch, s.token, s.group};
}

inline int64_t padded_row(int64_t channels) { return (channels + kRowUnit - 1) / kRowUnit * kRowUnit; }

// The channels of a scan in tiles, one a thread where images are fewer than threads, at most `most` of them.
struct ChannelTiles {
    int64_t dim, width, count;

    ChannelTiles(int64_t channels, int64_t images, int64_t most) : dim(channels) {
        const int64_t threads = torch::stable::get_num_threads();
        const int64_t wanted = std::clamp<int64_t>((threads + images - 1) / images, 1, most);
        width = padded_row((dim + wanted - 1) / wanted);
        count = (dim + width - 1) / width;
    }
    int64_t size(int64_t tile) const { return std::min(width, dim - tile * width); }
    // The most bytes that a tile needs, `bytes`(channels): a narrow one holds more tokens at once than a wide one, and
    // may need more.
    template <class F>
    int64_t scratch(const F& bytes) const {
        return std::max<int64_t>(bytes(size(0)), bytes(size(count - 1)));
    }
};

class AlignedMemory {
public:
    explicit AlignedMemory(size_t bytes) : bytes_(bytes), data_(::operator new(bytes, kAlignment)) {}
    AlignedMemory(AlignedMemory&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
    AlignedMemory& operator=(AlignedMemory&&) = delete;
    ~AlignedMemory() { ::operator delete(data_, kAlignment); }
    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    static constexpr std::align_val_t kAlignment{64};
    size_t bytes_;
    void* data_;
};

// What a row of a parameter holds after its last channel: zeros, or that channel's value once more. A zero there makes
// NaN of an infinity that all channels of a real row take well: steps of -inf, which mask a token, times dt_weight.
enum class RowPad { kZero, kLastChannel };

// Parameters as rows that vectors of any width can read: float (double for double images).
class ParameterRows {
public:
    explicit ParameterRows(const Tensor& image) : wide_(dtype_of(image) == DType::kDouble) {}

    // (groups, channels, rows) -> (groups, rows, padded_row(channels)).
    const void* operator()(const Tensor& t, int64_t groups, int64_t channels, int64_t rows,
                           RowPad pad = RowPad::kZero) {
        return wide_ ? transpose<double>(t, groups, channels, rows, pad)
                     : transpose<float>(t, groups, channels, rows, pad);
    }
    // The same of an absent parameter: every channel has `value`.
    const void* operator()(const OptTensor& t, int64_t groups, int64_t channels, double value) {
        if (t) return (*this)(*t, groups, channels, int64_t{1});
        return wide_ ? constant<double>(groups, channels, value) : constant<float>(groups, channels, value);
    }

private:
    template <class A>
    A* rows_of_zeros(int64_t count) {
        kept_.emplace_back(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(A));
        A* data = static_cast<A*>(kept_.back().data());
        std::fill(data, data + count, A(0));
        return data;
    }

    template <class A>
    const void* transpose(const Tensor& t, int64_t groups, int64_t channels, int64_t rows, RowPad pad) {
        const int64_t padded = padded_row(channels);
        A* out = rows_of_zeros<A>(groups * rows * padded);
        const Tensor in = t.is_contiguous() ? t : contiguous_copy(t);
        with_element_type(in, [&](auto element) {
            const auto* from = static_cast<const decltype(element)*>(in.data_ptr());
            for (int64_t g = 0; g < groups; ++g) {
                for (int64_t r = 0; r < rows; ++r) {
                    A* row = out + (g * rows + r) * padded;
                    const auto* column = from + g * channels * rows + r;
                    for (int64_t c = 0; c < channels; ++c) row[c] = static_cast<A>(column[c * rows]);
                    if (pad == RowPad::kLastChannel) std::fill(row + channels, row + padded, row[channels - 1]);
                }
            }
        });
        return out;
    }

    template <class A>
    const void* constant(int64_t groups, int64_t channels, double value) {
        const int64_t padded = padded_row(channels);
        A* out = rows_of_zeros<A>(groups * padded);
        for (int64_t g = 0; g < groups; ++g) std::fill(out + g * padded, out + g * padded + channels, A(value));
        return out;
    }

    bool wide_;
    std::vector<AlignedMemory> kept_;
};

// Sums of parameter gradients in double: `stages` partial arrays of `size`, added in order.
class PartialSums {
public:
    PartialSums(int64_t stages, int64_t size)
        : stages_(stages), size_(size), partials_(static_cast<size_t>(std::max<int64_t>(stages * size, 1)) * 8) {}

    double* data() const { return static_cast<double*>(partials_.data()); }

    std::vector<double> total() const { return total(0, stages_); }
    std::vector<double> total(int64_t first, int64_t count) const {
        std::vector<double> sums(size_, 0.0);
        for (int64_t s = first; s < first + count; ++s) {
            const double* part = data() + s * size_;
            for (int64_t i = 0; i < size_; ++i) sums[i] += part[i];
        }
        return sums;
    }

private:
    int64_t stages_, size_;
    AlignedMemory partials_;
};

// Rows [first, first + rows) of each group's `group_rows` rows of sums into the contiguous `grad` from element `offset`
// on: (groups, channels, rows).
inline void store_sums(const double* sums, int64_t group_rows, int64_t first, const Tensor& grad, int64_t groups,
                       int64_t channels, int64_t rows, int64_t offset = 0) {
    const int64_t padded = padded_row(channels);
    with_element_type(grad, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(grad.data_ptr()) + offset;
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t r = 0; r < rows; ++r) {
                    const double sum = sums[(g * group_rows + first + r) * padded + c];
                    if constexpr (std::is_same_v<T, double>) {
                        *to++ = sum;
                    } else {
                        *to++ = static_cast<T>(static_cast<float>(sum));
                    }
                }
            }
        }
    });
}

// Scratch of the current thread, kept between calls unless it is large.
class ThreadScratch {
public:
    explicit ThreadScratch(int64_t bytes) {
        constexpr int64_t kKept = 4 << 20;
        static thread_local std::unique_ptr<AlignedMemory> kept;
        std::unique_ptr<AlignedMemory>& memory = bytes <= kKept ? kept : own_;
        if (!memory || memory->bytes() < static_cast<size_t>(bytes)) {
            memory = std::make_unique<AlignedMemory>(static_cast<size_t>(bytes));
        }
        data_ = memory->data();
    }
    void* data() const { return data_; }

private:
    std::unique_ptr<AlignedMemory> own_;
    void* data_;
};

// f(item, scratch) for items [0, items), each with about `elements` of work, on torch's threads. Which thread runs an
// item never changes its result.
template <class F>
void for_items(int64_t items, int64_t elements, int64_t scratch_bytes, const F& f) {
    constexpr int64_t kLeastElements = 16384;  // below that a thread costs more than it saves
    const int64_t grain = std::max<int64_t>(1, kLeastElements / std::max<int64_t>(elements, 1));
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
        const ThreadScratch scratch(scratch_bytes);
        for (int64_t item = begin; item < end; ++item) f(item, scratch.data());
    });
}

}  // namespace gm::cpu
