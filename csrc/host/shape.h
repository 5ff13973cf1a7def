// SPDX-License-Identifier: Apache-2.0
// Sizes and strides without an allocation: an entry makes some hundred of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace gm {

// What of std::vector<int64_t> the entries use, for the dimensions of a tensor.
class Shape {
public:
    Shape() = default;
    explicit Shape(size_t count) { resize(count); }
    Shape(std::initializer_list<int64_t> values) : Shape(values.begin(), values.end()) {}
    template <class Iterator>
    Shape(Iterator first, Iterator last) {
        resize(static_cast<size_t>(last - first));
        std::copy(first, last, values_);
    }

    size_t size() const { return count_; }
    int64_t* data() { return values_; }
    const int64_t* data() const { return values_; }
    int64_t* begin() { return values_; }
    int64_t* end() { return values_ + count_; }
    const int64_t* begin() const { return values_; }
    const int64_t* end() const { return values_ + count_; }
    int64_t& operator[](size_t i) { return values_[i]; }
    int64_t operator[](size_t i) const { return values_[i]; }
    int64_t& back() { return values_[count_ - 1]; }
    void push_back(int64_t value) {
        resize(count_ + 1);
        back() = value;
    }

private:
    static constexpr size_t kMaxDims = 8;  // no op here takes tensors of more than 6
    void resize(size_t count) {
        if (count > kMaxDims) {
            throw std::runtime_error("groupmamba: tensors have up to " + std::to_string(kMaxDims) +
                                     " dimensions, got " + std::to_string(count));
        }
        count_ = count;
    }

    int64_t values_[kMaxDims] = {};
    size_t count_ = 0;
};

inline std::string show(const Shape& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
}

}  // namespace gm
