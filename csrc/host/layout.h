// SPDX-License-Identifier: Apache-2.0
// Sizes and strides of what the entries allocate, without torch. groupmamba_ext/layouts.py repeats them for its fake
// kernels, and `_C` (csrc/module.cpp) reports them to the tests that compare both.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/shape.h"

namespace gm {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// cuBLAS' products are several times slower where rows of channels do not start at multiples of 16 bytes, or are not
// multiples of them long.
constexpr int64_t kPixelUnit = 8;

inline Shape contiguous_strides(const Shape& sizes) {
    Shape strides(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
    return strides;
}

// Of an image (batch, H, W, G, D) stored group-major, (G, batch, H, W, D) in memory.
inline Shape group_major_strides(const Shape& sizes) {
    const Shape s = contiguous_strides({sizes[3], sizes[0], sizes[1], sizes[2], sizes[4]});
    return {s[1], s[2], s[3], s[0], s[4]};
}

// True when an image (batch, H, W, G, D) of these strides stores each group's image as a whole.
template <class Sizes, class Strides>
bool is_group_major(const Sizes& sizes, const Strides& strides) {
    return sizes.size() == 5 && sizes[3] > 1 && strides[3] > strides[2] && (sizes[0] <= 1 || strides[3] > strides[0]);
}

// Of a result of the size and in the order of dimensions of an image: group-major in, group-major out.
inline Shape image_result_strides(const Shape& sizes, const Shape& strides) {
    return is_group_major(sizes, strides) ? group_major_strides(sizes) : contiguous_strides(sizes);
}

// Of the gradient of a parameter, which autograd would copy into any others: those of torch.channels_last where the
// parameter has them, else contiguous ones.
inline Shape gradient_strides(const Shape& sizes, const Shape& strides) {
    const Shape dense = contiguous_strides(sizes);
    const auto are = [&](const Shape& expected) {
        for (size_t i = 0; i < sizes.size(); ++i)
            if (sizes[i] != 1 && strides[i] != expected[i]) return false;
        return true;
    };
    if (sizes.size() != 4 || std::count(sizes.begin(), sizes.end(), 0) > 0 || are(dense)) return dense;
    const Shape s = contiguous_strides({sizes[0], sizes[2], sizes[3], sizes[1]});
    const Shape last{s[0], s[3], s[1], s[2]};
    return are(last) ? last : dense;
}

// Where tensors that live and die together are to lie in two buffers: those of the images' dtype in one, those of
// float32 in another, in the order of their reservation.
class WorkspaceLayout {
public:
    struct Piece {
        int64_t offset = -1;  // in its buffer, in elements
        bool is_float = false;
    };

    Piece reserve_image(int64_t elements) { return {take(image_elements_, elements), false}; }
    Piece reserve_float(int64_t elements) { return {take(float_elements_, elements), true}; }

    int64_t image_elements() const { return image_elements_; }
    int64_t float_elements() const { return float_elements_; }

    // At least 256 bytes: enough for every vector access, TMA and matrix products.
    static constexpr int64_t kAlignment = 128;

private:
    static int64_t take(int64_t& end, int64_t elements) {
        const int64_t offset = end;
        end += round_up(elements, kAlignment);
        return offset;
    }

    int64_t image_elements_ = 0, float_elements_ = 0;
};

}  // namespace gm
