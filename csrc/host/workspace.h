// SPDX-License-Identifier: Apache-2.0
// Tensors that live and die together, in two allocations: each costs the host as much as a launch.
#pragma once

#include "host/tensor.h"

namespace gm {

// Pieces are reserved first, then allocated, then seen as tensors: those of the images' dtype lie in one buffer, those
// of float32 in another, in the order of their reservation.
class Workspace : public WorkspaceLayout {
public:
    explicit Workspace(ScalarType image_dtype) : image_dtype_(image_dtype) {}

    void allocate(const Tensor& device_of) {
        if (image_elements() > 0) images_ = empty({image_elements()}, image_dtype_, device_of);
        if (float_elements() > 0) floats_ = empty({float_elements()}, ScalarType::Float, device_of);
    }

    // What another workspace with the same reservations held.
    void adopt_images(const Tensor& images, const Tensor& device_of) {
        images_ = adopted(images, "saved", image_elements(), image_dtype_, device_of);
    }
    void adopt_floats(const Tensor& floats, const Tensor& device_of) {
        floats_ = adopted(floats, "saved_float", float_elements(), ScalarType::Float, device_of);
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
    static Tensor adopted(const Tensor& t, const char* name, int64_t elements, ScalarType dtype,
                          const Tensor& device_of) {
        check_shape(t, name, {elements});
        GM_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name, " is not what the forward returned");
        GM_CHECK(same_device(t, device_of), name, " is on another device");
        return t;
    }

    ScalarType image_dtype_;
    Tensor images_, floats_;
};

}  // namespace gm
