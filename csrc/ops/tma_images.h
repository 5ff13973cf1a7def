// SPDX-License-Identifier: Apache-2.0
// Images of a scan that TMA moves: copies of those that it can't move.
#pragma once

#include <algorithm>
#include <iterator>
#include <vector>

#include "cuda/images/launch.h"
#include "cuda/scan/sm90/select.h"
#include "host/cuda_args.h"
#include "host/explain.h"
#include "host/stream.h"
#include "host/tensor.h"

namespace gm {

// Widens the scan to channels that TMA can move. For images that it can't move it makes copies whose pixels are a
// multiple of kTmaUnit channels apart, token by token where the image is stored so, else group by group.
class TmaImages {
public:
    TmaImages(const char* op, ScanShape& shape, const CudaContext& context)
        : op_(op), shape_(shape), context_(context), dim_(shape.dim) {
        shape.dim = static_cast<int>(round_up(shape.dim, kTmaUnit));
    }
    // Replaces images that are read by copies that start() fills.
    void read(const std::vector<Tensor*>& images) {
        for (Tensor* image : images) {
            if (is_canonical_image(*image) && allows_tma(image_arg(*image), shape_)) continue;
            note(op_,
                 ": copies an image that TMA can't move: its address and strides, or the channels of a group, are no "
                 "multiples of 16 bytes");
            const Tensor place = place_like(*image);
            read_.push_back({*image, place});
            places_.push_back(place.data_ptr());
            *image = place;
        }
    }
    void start() const { run(read_, shape_.dim); }
    // Where a kernel writes the image that finish() copies to `image`: over the copy `read`, tile by tile, if that is
    // ours.
    ImageArg write(const Tensor& image, const Tensor& read) {
        if (allows_tma(image_arg(image), shape_)) return image_arg(image);
        const bool over = std::find(places_.begin(), places_.end(), read.data_ptr()) != places_.end();
        written_.push_back({over ? read : place_like(image), image});
        return image_arg(written_.back().from);
    }
    void finish() const { run(written_, dim_); }

private:
    struct Copy {
        Tensor from, to;
    };

    // Elements between the rows of an image (batch, H, W, G, D), one row for each group of a token, where all rows are
    // equally far apart, in the order of tokens or of groups; else 0.
    static int64_t pitch(const Tensor& image, bool by_groups) {
        const ImageStrides s = image_strides(image);
        const int64_t batch = image.size(0), tokens = image.size(1) * image.size(2), groups = image.size(3);
        if (!is_canonical_image(image) || tokens == 1) return 0;
        const int64_t row = by_groups || groups == 1 ? s.token : s.group, token = by_groups ? row : groups * row;
        const bool even = s.token == token && (batch == 1 || s.batch == tokens * token) &&
                          (groups == 1 || s.group == (by_groups ? batch * tokens * row : row));
        return even && row >= image.size(4) ? row : 0;
    }
    static bool places_by_groups(const Tensor& image) { return pitch(image, false) == 0; }

    Tensor place_like(const Tensor& image) const {
        const int64_t batch = image.size(0), height = image.size(1), width = image.size(2), groups = image.size(3);
        const bool by_groups = places_by_groups(image);
        const int64_t pixel = by_groups ? shape_.dim : groups * shape_.dim, row = width * pixel, plane = height * row;
        const Tensor wide = empty({batch, height, width, groups, shape_.dim}, image.scalar_type(), image);
        return alias(wide, shape_of(image), {plane, row, pixel, by_groups ? batch * plane : shape_.dim, 1});
    }

    // Copies to rows of `width` channels, in as few launches as the images allow.
    void run(const std::vector<Copy>& copies, int width) const {
        CopyRowsArgs args;
        args.images = 0;
        const auto launch = [&] {
            if (args.images > 0)
                check_cuda(launch_copy_rows(args, dtype_of(copies[0].to), context_.stream()), "copying channels");
            args.images = 0;
        };
        for (const auto& [from, to] : copies) {
            const bool by_groups = places_by_groups(from);
            const int64_t stride = pitch(from, by_groups);
            const bool aligned = reinterpret_cast<uintptr_t>(to.data_ptr()) % 16 == 0;
            if (stride == 0 || pitch(to, by_groups) != width || !aligned) {
                Tensor place = to;
                torch::stable::copy_(place, from);
                continue;
            }
            if (args.images == static_cast<int>(std::size(args.to)) || stride != args.stride) launch();
            args.from[args.images] = from.data_ptr(), args.to[args.images] = to.data_ptr(), ++args.images;
            args.rows = from.size(0) * from.size(1) * from.size(2) * from.size(3);
            args.stride = stride, args.width = width, args.channels = dim_;
        }
        launch();
    }

    const char* op_;
    const ScanShape& shape_;
    const CudaContext& context_;
    int dim_;  // channels that exist
    std::vector<const void*> places_;
    std::vector<Copy> read_, written_;
};

}  // namespace gm
