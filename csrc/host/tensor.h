// SPDX-License-Identifier: Apache-2.0
// What an op entry needs of LibTorch, all of it stable ABI: tensor alias, checks that print values, allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/layout.h"
#include "host/shape.h"

// The message of the thread's last error in torch. Weak: torch before 2.13 does not export it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace gm {

using Tensor = torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

template <class... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// GM_CHECK(n > 0, "n must be positive, got ", n): raised in Python as RuntimeError. The Python layer has already turned
// what a user can get wrong into a TypeError or ValueError; these repeat the invariant for callers of the raw op.
#define GM_CHECK(condition, ...)                                                                 \
    do {                                                                                         \
        if (!(condition)) throw std::runtime_error("groupmamba: " + ::gm::message(__VA_ARGS__)); \
    } while (0)

// What torch says of the call that failed, or `otherwise` where it does not tell.
inline std::string torch_error(const std::string& otherwise) {
    const bool told = &torch_exception_get_what_without_backtrace != nullptr;
    const char* const what = told ? torch_exception_get_what_without_backtrace() : nullptr;
    return what != nullptr && *what != '\0' ? what : otherwise;
}

// Checks a call of torch's C interface.
#define GM_TORCH_CALL(call) GM_CHECK((call) == 0, ::gm::torch_error(#call " failed"))

inline Shape shape_of(const Tensor& t) {
    const auto sizes = t.sizes();
    return Shape(sizes.begin(), sizes.end());
}

inline bool has_shape(const Tensor& t, const Shape& shape) {
    const auto sizes = t.sizes();
    return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

// torch's codes, which compare in a tenth of the time of ScalarType and Device.
inline int32_t dtype_code(const Tensor& t) {
    int32_t code = 0;
    GM_TORCH_CALL(aoti_torch_get_dtype(t.get(), &code));
    return code;
}

inline bool is_float(const Tensor& t) { return dtype_code(t) == aoti_torch_dtype_float32(); }

inline bool same_device(const Tensor& a, const Tensor& b) {
    int32_t types[2] = {}, indices[2] = {};
    GM_TORCH_CALL(aoti_torch_get_device_type(a.get(), &types[0]));
    GM_TORCH_CALL(aoti_torch_get_device_type(b.get(), &types[1]));
    GM_TORCH_CALL(aoti_torch_get_device_index(a.get(), &indices[0]));
    GM_TORCH_CALL(aoti_torch_get_device_index(b.get(), &indices[1]));
    return types[0] == types[1] && indices[0] == indices[1];
}

inline void check_shape(const Tensor& t, const char* name, const Shape& expected) {
    GM_CHECK(has_shape(t, expected), name, " must have shape ", show(expected), ", got ", show(shape_of(t)));
}

// A parameter: dtype of the image tensors or float32, same device.
inline void check_parameter(const Tensor& t, const char* name, const Shape& expected, const Tensor& image) {
    check_shape(t, name, expected);
    GM_CHECK(dtype_code(t) == dtype_code(image) || is_float(t), name,
             " must have the dtype of the image tensors or float32");
    GM_CHECK(same_device(t, image), name, " is on another device");
}

inline void check_parameter(const OptTensor& t, const char* name, const Shape& expected, const Tensor& image) {
    if (t) check_parameter(*t, name, expected, image);
}

inline void check_image(const Tensor& t, const char* name, const Shape& expected, const Tensor& image) {
    check_shape(t, name, expected);
    GM_CHECK(dtype_code(t) == dtype_code(image), name, " has another dtype than the first image tensor");
    GM_CHECK(same_device(t, image), name, " is on another device");
}

inline Tensor empty_strided(const Shape& sizes, const Shape& strides, ScalarType dtype, const Tensor& device_of) {
    AtenTensorHandle handle = nullptr;
    int32_t device_type = 0, device_index = 0, dtype_code = 0;
    GM_TORCH_CALL(aoti_torch_get_device_type(device_of.get(), &device_type));
    GM_TORCH_CALL(aoti_torch_get_device_index(device_of.get(), &device_index));
    dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    const AOTITorchError error =
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype_code,
                                 device_type, device_index, &handle);
    // Python makes torch's own error of the words "out of memory" (registry.py).
    if (error != 0) {
        const char* const device = device_type == aoti_torch_device_type_cuda() ? "CUDA out" : "Out";
        GM_CHECK(false, torch_error(message(device, " of memory. Tried to allocate a tensor of shape ", show(sizes))));
    }
    return Tensor(handle);
}

inline Tensor empty(const Shape& sizes, ScalarType dtype, const Tensor& device_of) {
    return empty_strided(sizes, contiguous_strides(sizes), dtype, device_of);
}

inline Tensor contiguous_copy(const Tensor& t) {
    Tensor copy = empty(shape_of(t), t.scalar_type(), t);
    torch::stable::copy_(copy, t);
    return copy;
}

// The gradient of an optional input that was not given.
inline Tensor empty_absent(ScalarType dtype, const Tensor& device_of) { return empty({0}, dtype, device_of); }

inline Tensor empty_like_or_absent(const OptTensor& t, const Tensor& image) {
    return t ? empty(shape_of(*t), t->scalar_type(), image) : empty_absent(image.scalar_type(), image);
}

// State, step, norm and partial sums: float32, or float64 for float64.
inline ScalarType accumulate_type(ScalarType dtype) {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// True when `t` (batch, H, W, G, D) stores each group's image as a whole: (G, batch, H, W, D) in memory.
inline bool is_group_major(const Tensor& t) { return is_group_major(t.sizes(), t.strides()); }

// An image (batch, H, W, G, D) stored group-major.
inline Tensor empty_group_major(const Shape& sizes, const Tensor& like) {
    return empty_strided(sizes, group_major_strides(sizes), like.scalar_type(), like);
}

// (batch, H, W, G, D) or (batch, H, W, C) with its last size replaced by `channels`, in the order of dimensions of
// `like`: group-major in, group-major out.
inline Tensor empty_image(const Tensor& like, int64_t channels) {
    Shape sizes = shape_of(like);
    sizes.back() = channels;
    return is_group_major(like) ? empty_group_major(sizes, like) : empty(sizes, like.scalar_type(), like);
}

inline Tensor empty_image_like(const Tensor& like) { return empty_image(like, like.size(like.dim() - 1)); }

// The strides by which `t` reads as `sizes`, of as many elements; none where only a copy could.
inline std::optional<Shape> view_strides(const Tensor& t, const Shape& sizes) {
    if (t.is_contiguous()) return contiguous_strides(sizes);
    const auto from = t.sizes(), steps = t.strides();
    Shape strides(sizes.size());
    size_t at = sizes.size();
    for (size_t d = from.size(); d-- > 0;) {
        // One stride walks dimension d and those before it that follow suit; as many of `sizes` must make them up.
        const int64_t step = steps[d];
        int64_t count = from[d], seen = 1;
        for (; d > 0 && (from[d - 1] == 1 || steps[d - 1] == count * step); --d) count *= from[d - 1];
        for (; at > 0 && (seen < count || sizes[at - 1] == 1); --at) {
            strides[at - 1] = seen * step;
            seen *= sizes[at - 1];
        }
        if (seen != count) return std::nullopt;
    }
    return strides;
}

inline Shape strides_of(const Tensor& t) {
    const auto strides = t.strides();
    return Shape(strides.begin(), strides.end());
}

// The strides of a gradient of `t`.
inline Shape gradient_strides(const Tensor& t) { return gradient_strides(shape_of(t), strides_of(t)); }

// Another view of the storage of `t`, `offset` elements behind its first.
inline Tensor alias(const Tensor& t, const Shape& sizes, const Shape& strides, int64_t offset = 0) {
    AtenTensorHandle handle = nullptr;
    GM_TORCH_CALL(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                 strides.data(), offset, &handle));
    return Tensor(handle);
}

inline Tensor alias(const Tensor& t, const Shape& sizes) { return alias(t, sizes, contiguous_strides(sizes)); }

// (batch, H, W, C) whose pixels are C rounded up to kPixelUnit channels apart; a kernel that writes it puts zeros
// there.
inline Tensor empty_padded_image(int64_t batch, int64_t height, int64_t width, int64_t channels, const Tensor& like) {
    const int64_t step = round_up(channels, kPixelUnit);
    const Tensor whole = empty({batch, height, width, step}, like.scalar_type(), like);
    return alias(whole, {batch, height, width, channels}, {height * width * step, width * step, step, 1});
}

// True when one stride (of W) walks all tokens of an image in row-major order and channels are adjacent.
inline bool is_canonical_image(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    const bool channels_adjacent = t.size(last) <= 1 || t.stride(last) == 1;
    const bool rows_collapse = t.size(1) <= 1 || t.size(2) <= 1 || t.stride(1) == t.size(2) * t.stride(2);
    return channels_adjacent && rows_collapse;
}

// An image tensor whose tokens are walked by `token_stride`; a copy only where the strides do not allow that.
inline Tensor canonical_image(const Tensor& t) {
    if (is_canonical_image(t)) return t;
    Tensor copy = empty_image_like(t);
    torch::stable::copy_(copy, t);
    return copy;
}

struct ImageStrides {  // in elements
    int64_t batch = 0, token = 0, group = 0;
};

inline ImageStrides image_strides(const Tensor& t) {
    // With one column the token stride is that of H; with one token it does not matter.
    const int64_t token = t.size(2) > 1 ? t.stride(2) : t.stride(1);
    return {t.stride(0), token, t.dim() == 5 ? t.stride(3) : 0};
}

}  // namespace gm
