// SPDX-License-Identifier: Apache-2.0
// Sizes of the ops of whole layers, and where their forwards put what a backward reads; without torch, see
// host/layout.h. Images between the products are group-major, (G, tokens, channels), with the channels of a group
// padded to a multiple of 8 by zeros (step features, B and C to 4 where padded_features says so), so that every product
// reads aligned rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "cuda/feed_forward/plan.h"
#include "cuda/scan/plan.h"
#include "host/layout.h"

namespace gm {

// Up to 4 features are stored 4 apart, in half the bytes, where products with such rows have a kernel
// (cuda/gemm/skinny_gemm.cu).
inline int64_t padded_features(int64_t features, int64_t inner_pad) {
    return features <= 4 && (inner_pad == 16 || inner_pad == 32) ? 4 : round_up(features, kPixelUnit);
}

struct LayerSizes {
    int64_t batch, height, width, groups, channels, inner, states, rank;
    int64_t hidden;  // of the affinity, 0 without it
    bool merges;     // with out_proj; without it, the scan applies the gate

    // These follow from the others: see layer_sizes_of.
    int64_t dim, dim_pad, inner_pad, features, features_pad, channels_pad;
    int64_t mixed;                 // columns that proj reads, padding included
    int64_t gate_dim, gate_width;  // channels of a group's gate, without and with padding

    int64_t saved_states;  // of a plane; 0 until the chunk is known

    int64_t tokens() const { return batch * height * width; }
    bool gated() const { return hidden > 0; }
    bool gates_scan() const { return gated() && !merges; }
};

inline LayerSizes layer_sizes_of(int64_t batch, int64_t height, int64_t width, int64_t groups, int64_t channels,
                                 int64_t inner, int64_t states, int64_t rank, int64_t hidden, bool merges) {
    LayerSizes s{};
    s.batch = batch, s.height = height, s.width = width, s.groups = groups, s.channels = channels;
    s.inner = inner, s.states = states, s.rank = rank, s.hidden = hidden, s.merges = merges;
    s.channels_pad = round_up(channels, kPixelUnit);
    s.dim = channels / groups, s.dim_pad = round_up(s.dim, kPixelUnit), s.inner_pad = round_up(inner, kPixelUnit);
    s.features = rank + 2 * states, s.features_pad = padded_features(s.features, s.inner_pad);
    s.mixed = groups * (merges ? s.dim_pad : s.inner_pad);
    if (s.gated()) s.gate_dim = merges ? s.dim : inner, s.gate_width = merges ? s.dim : s.inner_pad;
    return s;
}

// Parameters as the kernels read them, in the order of layer_pack.
enum PackedLayer {
    kInProj,
    kConvWeight,
    kConvBias,
    kXProj,
    kDtWeight,
    kDtBias,
    kA,
    kSkip,
    kNormWeight,
    kNormBias,
    kProj,
    kProjBias,
    kOutProj,
    kPackedLayer
};

// All images have a row for each token of each group. Of what a training forward keeps, images, weights and biases of
// products lie in one buffer of the dtype of x (`saved`); gate, pooled, hidden, states and other parameters in one of
// float32 (`saved_float`).
struct LayerPlaces {
    WorkspaceLayout::Piece xn;        // the normed image
    WorkspaceLayout::Piece uz;        // in_proj's result: what is convolved and scanned, and the z gate
    WorkspaceLayout::Piece u;         // convolved, after SiLU: what is scanned
    WorkspaceLayout::Piece features;  // x_proj's result: step features, B and C
    WorkspaceLayout::Piece y;         // the scan's result, after its norm and gates
    WorkspaceLayout::Piece o;         // out_proj's result
    WorkspaceLayout::Piece mixed;     // o * skip_scale * xn * gate, normed: what proj reads
    WorkspaceLayout::Piece gate;      // of the channel affinity, (batch, groups, gate_width)
    WorkspaceLayout::Piece pooled;    // the mean of xn over each image
    WorkspaceLayout::Piece hidden;    // of the affinity, between its two linear layers
    WorkspaceLayout::Piece states;    // of the scan, at the borders of its tiles
    std::array<std::optional<WorkspaceLayout::Piece>, kPackedLayer> parameters;  // with `save` those that are kept
};

// The order of the reservations is the layout of what the forward returns for its backward. The backward computes
// `mixed` again, so it has no place there. Without `save` an image may take the place of an earlier one that is not
// read any more.
inline LayerPlaces reserve_layer(const LayerSizes& s, bool save, WorkspaceLayout& workspace) {
    const auto rows = [&](int64_t width) { return workspace.reserve_image(s.tokens() * s.groups * width); };
    LayerPlaces p;
    p.features = rows(s.features_pad);
    // The second image is written when nothing reads the first one any more.
    const auto one_after_the_other = [&](WorkspaceLayout::Piece& first, int64_t width, WorkspaceLayout::Piece& second,
                                         int64_t second_width) {
        first = rows(save ? width : std::max(width, second_width));
        second = save ? rows(second_width) : first;
    };
    if (s.merges) {
        p.xn = rows(s.dim_pad), p.y = rows(s.inner_pad);
        one_after_the_other(p.u, s.inner_pad, p.o, s.dim_pad);
        p.uz = rows(save ? 2 * s.inner_pad : std::max(2 * s.inner_pad, s.dim_pad));
        if (!save) p.mixed = p.uz;
    } else {
        p.u = rows(s.inner_pad), p.uz = rows(2 * s.inner_pad);
        one_after_the_other(p.xn, s.dim_pad, p.y, s.inner_pad);
    }
    if (s.gated()) {
        p.gate = workspace.reserve_float(s.batch * s.groups * s.gate_width);
        p.pooled = workspace.reserve_float(s.batch * s.channels);
        p.hidden = workspace.reserve_float(s.batch * s.hidden);
    }
    if (!save) return p;
    p.states = workspace.reserve_float(s.batch * s.groups * s.saved_states * s.states * s.inner_pad);
    const int64_t channels = s.groups * s.inner_pad;
    const auto keep = [&](PackedLayer i, int64_t elements) { p.parameters[i] = workspace.reserve_image(elements); };
    keep(kInProj, 2 * channels * s.dim_pad), keep(kXProj, s.groups * s.features_pad * s.inner_pad);
    keep(kProj, s.channels_pad * s.mixed), keep(kProjBias, s.channels_pad);
    if (s.merges) keep(kOutProj, s.groups * s.dim_pad * s.inner_pad);
    const auto keep_float = [&](PackedLayer i, int64_t row) {
        p.parameters[i] = workspace.reserve_float(channels * row);
    };
    keep_float(kA, s.states);
    if (s.inner == s.inner_pad) return p;  // the others are used as they are
    keep_float(kConvWeight, 9), keep_float(kConvBias, 1);
    keep_float(kDtWeight, s.rank), keep_float(kDtBias, 1), keep_float(kSkip, 1);
    keep_float(kNormWeight, 1), keep_float(kNormBias, 1);
    return p;
}

// Whether the feed-forward network keeps what its convolution reads, the widest image of a block. Not where its forward
// may be one kernel, which has that image on the chip alone: to compute it again in the backward costs no more than to
// write it here. `narrow`: images are of 16 bits.
inline bool keeps_hidden(int64_t channels, bool narrow) { return !narrow || channels > kFeedForwardChannels; }

// What is kept then, all of it in the dtype of x.
struct FeedForwardPlaces {
    WorkspaceLayout::Piece hidden;                                      // what the convolution reads
    WorkspaceLayout::Piece fc1_weight, fc1_bias, fc2_weight, fc2_bias;  // as the products read them
};

inline FeedForwardPlaces reserve_feed_forward(int64_t tokens, int64_t channels, int64_t hidden,
                                              WorkspaceLayout& workspace) {
    const int64_t channels_pad = round_up(channels, kPixelUnit), hidden_pad = round_up(hidden, kPixelUnit);
    FeedForwardPlaces p;
    p.hidden = workspace.reserve_image(tokens * hidden_pad);
    p.fc1_weight = workspace.reserve_image(hidden_pad * channels_pad), p.fc1_bias = workspace.reserve_image(hidden_pad);
    p.fc2_weight = workspace.reserve_image(channels_pad * hidden_pad),
    p.fc2_bias = workspace.reserve_image(channels_pad);
    return p;
}

}  // namespace gm
