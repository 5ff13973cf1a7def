// SPDX-License-Identifier: Apache-2.0
// Tensors that live and die together, in two allocations: each costs the host as much as a launch.
#pragma once

#include "host/tensor.h"

namespace gm {

// Pieces are reserved first, then allocated, then seen as tensors: those of the images' dtype lie in one buffer, those
// of float32 in another, in the order of their reservation.
class Workspace {
public:
    struct Piece {
        int64_t offset = -1;  // in its buffer, in elements
        bool is_float = false;
    };

    explicit Workspace(ScalarType image_dtype) : image_dtype_(image_dtype) {}

    Piece reserve_image(int64_t elements) { return {take(image_end_, elements), false}; }
    Piece reserve_float(int64_t elements) { return {take(float_end_, elements), true}; }

    void allocate(const Tensor& device_of) {
        if (image_end_ > 0) images_ = empty({image_end_}, image_dtype_, device_of);
        if (float_end_ > 0) floats_ = empty({float_end_}, ScalarType::Float, device_of);
    }

    // What another workspace with the same reservations held.
    void adopt_images(const Tensor& images, const Tensor& device_of) {
        images_ = adopted(images, "saved", image_end_, image_dtype_, device_of);
    }
    void adopt_floats(const Tensor& floats, const Tensor& device_of) {
        floats_ = adopted(floats, "saved_float", float_end_, ScalarType::Float, device_of);
    }

    const Tensor& images() const { return images_; }
    const Tensor& floats() const { return floats_; }

    void* address(const Piece& piece) const {
        const Tensor& buffer = piece.is_float ? floats_ : images_;
        return static_cast<char*>(buffer.data_ptr()) + piece.offset * static_cast<int64_t>(buffer.element_size());
    }
    Tensor get(const Piece& piece, const Shape& sizes, const Shape& strides) const {
        return alias(piece.is_float ? floats_ : images_, sizes, strides, piece.offset);
    }
    Tensor get(const Piece& piece, const Shape& sizes) const { return get(piece, sizes, contiguous_strides(sizes)); }

private:
    // At least 256 bytes: enough for every vector access, TMA and matrix products.
    static constexpr int64_t kAlignment = 128;

    static int64_t take(int64_t& end, int64_t elements) {
        const int64_t offset = end;
        end += round_up(elements, kAlignment);
        return offset;
    }

    static Tensor adopted(const Tensor& t, const char* name, int64_t elements, ScalarType dtype,
                          const Tensor& device_of) {
        check_shape(t, name, {elements});
        GM_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name, " is not what the forward returned");
        GM_CHECK(same_device(t, device_of), name, " is on another device");
        return t;
    }

    ScalarType image_dtype_;
    Tensor images_, floats_;
    int64_t image_end_ = 0, float_end_ = 0;
};

}  // namespace gm
