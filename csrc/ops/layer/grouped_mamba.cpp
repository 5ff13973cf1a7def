// SPDX-License-Identifier: Apache-2.0
// Sizes, packed parameters and images of the GroupMamba layer on CUDA.
#include "ops/layer/grouped_mamba.h"

#include "ops/layer/drop_path.h"

namespace gm {

LayerSizes layer_sizes(const Tensor& x, const LayerParameters& p, int64_t chunk) {
    GM_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, H, W, C) with elements, got ", show(shape_of(x)));
    GM_CHECK(p.in_proj_weight.dim() == 3 && p.A_log.dim() == 3 && p.dt_weight.dim() == 3, "weights must be (G, ., .)");
    const int64_t groups = p.A_log.size(0), inner = p.A_log.size(1), states = p.A_log.size(2);
    const int64_t rank = p.dt_weight.size(2);
    GM_CHECK(groups >= 1 && x.size(3) % groups == 0, "C must be a multiple of ", groups, ", got ", x.size(3));
    GM_CHECK(inner >= 1 && rank >= 1,
             "A_log must be (G, E, N) and dt_weight (G, E, R) with E and R of at least 1, got ",
             show(shape_of(p.A_log)), " and ", show(shape_of(p.dt_weight)));
    GM_CHECK(states >= 1 && states <= kMaxStates, "A_log must have 1 to ", kMaxStates, " states, got ", states);
    const bool gated = p.fc1_weight.has_value();
    GM_CHECK(p.fc1_bias.has_value() == gated && p.fc2_weight.has_value() == gated && p.fc2_bias.has_value() == gated,
             "fc1_weight, fc1_bias, fc2_weight and fc2_bias go together");
    GM_CHECK(!gated || (p.fc1_weight->dim() == 2 && p.fc1_weight->size(0) >= 1), "fc1_weight must be (hidden, C), got ",
             gated ? show(shape_of(*p.fc1_weight)) : "");
    LayerSizes s = layer_sizes_of(x.size(0), x.size(1), x.size(2), groups, x.size(3), inner, states, rank,
                                  gated ? p.fc1_weight->size(0) : 0, p.out_proj_weight.has_value());
    check_cuda_chunk(s.inner_pad, s.states, chunk);
    s.saved_states = scan_saved_states(s.height, s.width, s.inner_pad, chunk);
    check_parameter(p.norm_weight, "norm_weight", {s.channels}, x);
    check_parameter(p.norm_bias, "norm_bias", {s.channels}, x);
    check_parameter(p.in_proj_weight, "in_proj_weight", {s.groups, 2 * s.inner, s.dim}, x);
    check_parameter(p.conv_weight, "conv_weight", {s.groups, s.inner, 3, 3}, x);
    check_parameter(p.conv_bias, "conv_bias", {s.groups, s.inner}, x);
    check_parameter(p.x_proj_weight, "x_proj_weight", {s.groups, s.features, s.inner}, x);
    check_parameter(p.dt_weight, "dt_weight", {s.groups, s.inner, s.rank}, x);
    check_parameter(p.A_log, "A_log", {s.groups, s.inner, s.states}, x);
    for (const Tensor* t : {&p.dt_bias, &p.D, &p.out_norm_weight, &p.out_norm_bias})
        check_parameter(*t, "dt_bias, D, out_norm_weight and out_norm_bias", {s.groups, s.inner}, x);
    GM_CHECK(s.merges == p.skip_scale.has_value(), "out_proj_weight and skip_scale go together");
    check_parameter(p.out_proj_weight, "out_proj_weight", {s.groups, s.dim, s.inner}, x);
    check_parameter(p.skip_scale, "skip_scale", {1}, x);
    const int64_t mixed = s.groups * (s.merges ? s.dim : s.inner);
    check_parameter(p.proj_weight, "proj_weight", {s.channels, mixed}, x);
    check_parameter(p.proj_bias, "proj_bias", {s.channels}, x);
    if (!gated) return s;
    check_parameter(p.fc1_weight, "fc1_weight", {s.hidden, s.channels}, x);
    check_parameter(p.fc1_bias, "fc1_bias", {s.hidden}, x);
    check_parameter(p.fc2_weight, "fc2_weight", {mixed, s.hidden}, x);
    check_parameter(p.fc2_bias, "fc2_bias", {mixed}, x);
    return s;
}

ParameterPack layer_pack(const LayerParameters& p, const LayerSizes& s, ScalarType dtype, Workspace& workspace,
                         KeptParameters kept) {
    const ScalarType full = ScalarType::Float;
    const int64_t g = s.groups, e = s.inner, e_pad = s.inner_pad;
    ParameterPack pack(dtype, workspace, std::move(kept));
    pack.add(p.in_proj_weight, {2 * g, e, s.dim}, e_pad, s.dim_pad, dtype);
    // Padded copies are float32; parameters that need no padding are used as they are.
    const auto padded = [&](const Tensor& t, int64_t row, bool negative_exp = false) {
        const ScalarType to = e == e_pad && !negative_exp ? t.scalar_type() : full;
        pack.add(t, {g, e, row}, e_pad, row, to, negative_exp);
    };
    padded(p.conv_weight, 9), padded(p.conv_bias, 1);
    pack.add(p.x_proj_weight, {g, s.features, e}, s.features_pad, e_pad, dtype);
    padded(p.dt_weight, s.rank), padded(p.dt_bias, 1), padded(p.A_log, s.states, true), padded(p.D, 1);
    padded(p.out_norm_weight, 1), padded(p.out_norm_bias, 1);
    pack.add(p.proj_weight, {1, s.channels * g, p.proj_weight.size(1) / g}, s.channels_pad * g, s.mixed / g, dtype);
    pack.add(p.proj_bias, {1, 1, s.channels}, 1, s.channels_pad, dtype);
    if (p.out_proj_weight) pack.add(*p.out_proj_weight, {g, s.dim, e}, s.dim_pad, e_pad, dtype);
    return pack;
}

LayerImages layer_images(const LayerSizes& s, const LayerPlaces& p, bool save, const Workspace& workspace) {
    const int64_t tokens = s.tokens(), pixels = s.height * s.width;
    const auto rows = [&](const Workspace::Piece& piece, int64_t k) {
        return workspace.get(piece, {s.groups, tokens, k});
    };
    const auto group_major = [&](const Workspace::Piece& piece, int64_t k) {
        return workspace.get(piece, {s.batch, s.height, s.width, s.groups, k},
                             {pixels * k, s.width * k, k, tokens * k, 1});
    };
    const auto token_major = [&](const Workspace::Piece& piece, int64_t k) {
        return workspace.get(piece, {s.batch, s.height, s.width, s.groups, k});
    };
    LayerImages images;
    images.xn = group_major(p.xn, s.dim_pad);
    images.uz = rows(p.uz, 2 * s.inner_pad), images.u = rows(p.u, s.inner_pad);
    images.features = rows(p.features, s.features_pad);
    if (s.merges) {
        images.y = group_major(p.y, s.inner_pad);
        images.o = group_major(p.o, s.dim_pad);
        if (!save) images.mixed = token_major(p.mixed, s.dim_pad);
    } else {
        // The product takes all groups of a token at once.
        images.y = token_major(p.y, s.inner_pad);
    }
    if (s.gated()) {
        images.gate = workspace.get(p.gate, {s.batch, s.groups, s.gate_width});
        images.pooled = workspace.get(p.pooled, {s.batch, s.channels});
        images.hidden = workspace.get(p.hidden, {s.batch, s.hidden});
    }
    if (save) images.states = workspace.get(p.states, {s.batch * s.groups * s.saved_states * s.states * s.inner_pad});
    return images;
}

Tensor image_of(const Tensor& rows, const LayerSizes& s, int64_t channels, int64_t first) {
    const int64_t k = rows.size(2);
    return alias(rows, {s.batch, s.height, s.width, s.groups, channels},
                 {s.height * s.width * k, s.width * k, k, s.tokens() * k, 1}, first);
}

Tensor rows_of(const Tensor& image, const LayerSizes& s, int64_t channels) {
    return alias(image, {s.groups, s.tokens(), channels});
}

DropPathArg layer_drop_path(const Tensor& x, const LayerSizes& s, const LayerScalars& scalars) {
    GM_CHECK(s.merges || !scalars.drop_path_mask, "drop_path_mask goes with out_proj_weight");
    return drop_path_arg(scalars.drop_path_mask, scalars.drop_path_scale, scalars.residual, s.batch, x);
}

ScanInputs scan_inputs(const ParameterPack& pack, const LayerSizes& s, const LayerImages& images,
                       const LayerScalars& scalars) {
    const Shape channels{s.groups, s.inner_pad};
    ScanInputs in;
    in.u = image_of(images.u, s, s.inner_pad), in.z = image_of(images.uz, s, s.inner_pad, s.inner_pad);
    in.dt = image_of(images.features, s, s.rank);
    in.B = image_of(images.features, s, s.states, s.rank);
    in.C = image_of(images.features, s, s.states, s.rank + s.states);
    in.A = pack.get(kA, {s.groups, s.inner_pad, s.states});
    in.dt_weight = pack.get(kDtWeight, {s.groups, s.inner_pad, s.rank});
    in.dt_bias = pack.get(kDtBias, channels), in.D = pack.get(kSkip, channels);
    in.norm_weight = pack.get(kNormWeight, channels), in.norm_bias = pack.get(kNormBias, channels);
    if (s.gates_scan()) in.gate = images.gate;
    in.directions = scalars.directions;
    in.norm_eps = scalars.norm_eps, in.norm_dim = s.inner, in.chunk = scalars.chunk;
    return in;
}

AffinityArgs affinity_args(const LayerParameters& p, const LayerSizes& s, const LayerImages& images,
                           ParamHolder& param) {
    AffinityArgs args;
    args.batch = static_cast<int>(s.batch), args.dim = static_cast<int>(s.channels);
    args.hidden = static_cast<int>(s.hidden), args.out_dim = static_cast<int>(s.groups * s.gate_dim);
    args.group_dim = static_cast<int>(s.gate_dim), args.group_width = static_cast<int>(s.gate_width);
    args.fc1_weight = param(p.fc1_weight), args.fc1_bias = param(p.fc1_bias);
    args.fc2_weight = param(p.fc2_weight), args.fc2_bias = param(p.fc2_bias);
    args.pooled = static_cast<float*>(images.pooled->data_ptr());
    args.hidden_out = static_cast<float*>(images.hidden->data_ptr());
    args.gate = static_cast<float*>(images.gate->data_ptr());
    return args;
}

}  // namespace gm
