// SPDX-License-Identifier: Apache-2.0
// The inputs of the grouped and the cross scan as the entries of both devices see them: sizes, and checks that repeat
// those of the Python layer.
#pragma once

#include "host/tensor.h"

namespace gm {

// What both scans require of the codes of directions and of the tokens between two saved states.
inline void check_path(const std::vector<int64_t>& directions, int64_t chunk) {
    GM_CHECK(chunk >= 1 && chunk <= INT32_MAX, "chunk must be 1 to 2^31 - 1, got ", chunk);
    for (const int64_t code : directions) GM_CHECK(code >= 0 && code <= 3, "a direction must be 0 to 3, got ", code);
}

// States that a forward on `u` saved.
inline void check_states(const Tensor& states, const Shape& expected, const Tensor& u) {
    check_shape(states, "states", expected);
    GM_CHECK(states.scalar_type() == accumulate_type(u.scalar_type()) && states.is_contiguous(),
             "states must be what the forward saved");
    GM_CHECK(same_device(states, u), "states is on another device");
}

struct ScanSizes {
    int64_t batch, height, width, groups, dim, states, rank;  // rank 0: dt holds the step itself
    int64_t tokens() const { return height * width; }
};

inline ScanSizes check_scan(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                            const OptTensor& D, const OptTensor& dt_weight, const OptTensor& dt_bias,
                            const OptTensor& z, const OptTensor& norm_weight, const OptTensor& norm_bias,
                            const OptTensor& gate, const std::vector<int64_t>& directions, int64_t chunk) {
    GM_CHECK(u.dim() == 5, "u must be (batch, H, W, G, D), got ", show(shape_of(u)));
    GM_CHECK(A.dim() == 3, "A must be (G, D, N), got ", show(shape_of(A)));
    GM_CHECK(!dt_weight || dt_weight->dim() == 3, "dt_weight must be (G, D, R)");
    const ScanSizes s{
        u.size(0), u.size(1), u.size(2), u.size(3), u.size(4), A.size(2), dt_weight ? dt_weight->size(2) : 0};
    GM_CHECK(s.states >= 1 && s.states <= 256, "A must have 1 to 256 states, got ", s.states);
    GM_CHECK(s.groups >= 1 && s.dim >= 1, "u must have at least one group and one channel, got ", show(shape_of(u)));
    GM_CHECK(!dt_weight || s.rank >= 1, "dt_weight must have a rank of at least 1");
    GM_CHECK(s.tokens() <= INT32_MAX, "H * W must be below 2^31, got ", s.tokens());
    check_path(directions, chunk);
    GM_CHECK(static_cast<int64_t>(directions.size()) == s.groups, "directions must name one direction a group (",
             s.groups, "), got ", directions.size());
    const Shape per_channel{s.groups, s.dim}, image = shape_of(u);
    Shape tokens(image.begin(), image.end() - 1);
    const auto with = [&](int64_t last) {
        Shape shape = tokens;
        shape.push_back(last);
        return shape;
    };
    check_image(dt, "dt", with(dt_weight ? s.rank : s.dim), u);
    check_image(B, "B", with(s.states), u);
    check_image(C, "C", with(s.states), u);
    if (z) check_image(*z, "z", image, u);
    check_parameter(A, "A", {s.groups, s.dim, s.states}, u);
    check_parameter(D, "D", per_channel, u);
    check_parameter(dt_weight, "dt_weight", {s.groups, s.dim, s.rank}, u);
    check_parameter(dt_bias, "dt_bias", per_channel, u);
    check_parameter(norm_weight, "norm_weight", per_channel, u);
    check_parameter(norm_bias, "norm_bias", per_channel, u);
    GM_CHECK(!norm_bias || norm_weight, "norm_bias needs norm_weight");
    check_parameter(gate, "gate", {s.batch, s.groups, s.dim}, u);
    return s;
}

// The cross scan: `scans` directions of each group.
struct CrossSizes : ScanSizes {
    int64_t scans;
};

inline CrossSizes check_cross_scan(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                   const OptTensor& D, const OptTensor& dt_weight, const OptTensor& dt_bias,
                                   const std::vector<int64_t>& directions, int64_t chunk) {
    GM_CHECK(u.dim() == 5, "u must be (batch, H, W, G, D), got ", show(shape_of(u)));
    GM_CHECK(A.dim() == 4, "A must be (G, K, D, N), got ", show(shape_of(A)));
    GM_CHECK(!dt_weight || dt_weight->dim() == 4, "dt_weight must be (G, K, D, R)");
    const int64_t rank = dt_weight ? dt_weight->size(3) : 0, scans = static_cast<int64_t>(directions.size());
    const CrossSizes s{{u.size(0), u.size(1), u.size(2), u.size(3), u.size(4), A.size(3), rank}, scans};
    GM_CHECK(s.states >= 1 && s.states <= 256, "A must have 1 to 256 states, got ", s.states);
    GM_CHECK(s.groups >= 1 && s.dim >= 1, "u must have at least one group and one channel, got ", show(shape_of(u)));
    GM_CHECK(!dt_weight || s.rank >= 1, "dt_weight must have a rank of at least 1");
    GM_CHECK(s.tokens() <= INT32_MAX, "H * W must be below 2^31, got ", s.tokens());
    check_path(directions, chunk);
    GM_CHECK(s.scans >= 1, "directions must name at least one direction");
    const auto tokens = [&](int64_t last) { return Shape{s.batch, s.height, s.width, s.groups, s.scans, last}; };
    check_image(dt, "dt", tokens(dt_weight ? s.rank : s.dim), u);
    check_image(B, "B", tokens(s.states), u);
    check_image(C, "C", tokens(s.states), u);
    check_parameter(A, "A", {s.groups, s.scans, s.dim, s.states}, u);
    check_parameter(D, "D", {s.groups, s.scans, s.dim}, u);
    check_parameter(dt_weight, "dt_weight", {s.groups, s.scans, s.dim, s.rank}, u);
    check_parameter(dt_bias, "dt_bias", {s.groups, s.scans, s.dim}, u);
    return s;
}

inline Shape cross_states_shape(const CrossSizes& s, int64_t chunk) {
    return {s.groups * s.batch * s.scans * ((s.tokens() + chunk - 1) / chunk) * s.states * s.dim};
}

}  // namespace gm
