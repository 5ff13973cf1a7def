// SPDX-License-Identifier: Apache-2.0
// The GroupMamba layer on CUDA in two ops: grouped_mamba, from the image to the scan, and grouped_merge, from there to
// the layer's output. Each queues the kernels of the other ops and torch's matrix products from one call, so that a
// small layer does not wait for the host. Images are group-major between the products, (G, tokens, channels), with the
// channels of a group padded to a multiple of 8 by zeros: every product then reads aligned rows.
#include "ops/entries_cuda.h"
#include "ops/parameter_pack.h"

namespace gm {
namespace {

constexpr int64_t kUnit = 8;  // 16 bytes of a 16-bit type

// Order of the parameters in the packs.
enum CoreParameter { kInProj, kConvWeight, kConvBias, kXProj, kDtWeight, kDtBias, kA, kSkip, kNormWeight, kNormBias };
enum MergeParameter { kOutProj, kProj, kProjBias };

struct LayerSizes {
    int64_t batch, height, width, groups, dim, inner, states, rank;
    int64_t dim_pad, inner_pad, features, features_pad;
    int64_t image_tokens() const { return batch * height * width; }
};

// (G, T, K) rows as the image (batch, H, W, G, K), from channel `first` on.
Tensor image_of(const Tensor& rows, const LayerSizes& s, int64_t channels, int64_t first = 0) {
    const int64_t k = rows.size(2);
    return alias(rows, {s.batch, s.height, s.width, s.groups, channels},
                 {s.height * s.width * k, s.width * k, k, s.image_tokens() * k, 1}, first);
}

struct CoreParameters {
    Tensor in_proj_weight, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A_log, D, out_norm_weight,
        out_norm_bias;
};

LayerSizes layer_sizes(const Tensor& x, const CoreParameters& p) {
    GM_CHECK(x.dim() == 4 && x.is_contiguous(), "x must be a contiguous (batch, H, W, C), got ", show(shape_of(x)));
    GM_CHECK(p.in_proj_weight.dim() == 3 && p.A_log.dim() == 3 && p.dt_weight.dim() == 3, "weights must be (G, ., .)");
    LayerSizes s{};
    s.batch = x.size(0), s.height = x.size(1), s.width = x.size(2);
    s.groups = p.A_log.size(0), s.inner = p.A_log.size(1), s.states = p.A_log.size(2), s.rank = p.dt_weight.size(2);
    GM_CHECK(s.groups >= 1 && x.size(3) % s.groups == 0, "C must be a multiple of ", s.groups, ", got ", x.size(3));
    s.dim = x.size(3) / s.groups;
    s.dim_pad = round_up(s.dim, kUnit), s.inner_pad = round_up(s.inner, kUnit);
    s.features = s.rank + 2 * s.states, s.features_pad = round_up(s.features, kUnit);
    check_parameter(p.in_proj_weight, "in_proj_weight", {s.groups, 2 * s.inner, s.dim}, x);
    check_parameter(p.conv_weight, "conv_weight", {s.groups, s.inner, 3, 3}, x);
    check_parameter(p.conv_bias, "conv_bias", {s.groups, s.inner}, x);
    check_parameter(p.x_proj_weight, "x_proj_weight", {s.groups, s.features, s.inner}, x);
    check_parameter(p.dt_weight, "dt_weight", {s.groups, s.inner, s.rank}, x);
    check_parameter(p.A_log, "A_log", {s.groups, s.inner, s.states}, x);
    for (const Tensor* t : {&p.dt_bias, &p.D, &p.out_norm_weight, &p.out_norm_bias})
        check_parameter(*t, "dt_bias, D, out_norm_weight and out_norm_bias", {s.groups, s.inner}, x);
    return s;
}

ParameterPack core_pack(const CoreParameters& p, const LayerSizes& s, ScalarType dtype) {
    const ScalarType full = ScalarType::Float;
    const int64_t g = s.groups, e = s.inner, e_pad = s.inner_pad;
    ParameterPack pack(dtype);
    pack.add(p.in_proj_weight, {2 * g, e, s.dim}, e_pad, s.dim_pad, dtype);
    // Padded copies are float32; parameters that need no pad are used as they are.
    const auto padded = [&](const Tensor& t, int64_t row, bool negative_exp = false) {
        const ScalarType to = e == e_pad && !negative_exp ? t.scalar_type() : full;
        pack.add(t, {g, e, row}, e_pad, row, to, negative_exp);
    };
    padded(p.conv_weight, 9), padded(p.conv_bias, 1);
    pack.add(p.x_proj_weight, {g, s.features, e}, s.features_pad, e_pad, dtype);
    padded(p.dt_weight, s.rank), padded(p.dt_bias, 1), padded(p.A_log, s.states, true), padded(p.D, 1);
    padded(p.out_norm_weight, 1), padded(p.out_norm_bias, 1);
    return pack;
}

ScanInputs scan_inputs(const ParameterPack& pack, const LayerSizes& s, const Tensor& u, const Tensor& uz,
                       const Tensor& features, const OptTensor& gate, const std::vector<int64_t>& directions,
                       double norm_eps, int64_t chunk) {
    const Shape channels{s.groups, s.inner_pad};
    ScanInputs in;
    in.u = image_of(u, s, s.inner_pad), in.z = image_of(uz, s, s.inner_pad, s.inner_pad);
    in.dt = image_of(features, s, s.rank);
    in.B = image_of(features, s, s.states, s.rank), in.C = image_of(features, s, s.states, s.rank + s.states);
    in.A = pack.get(kA, {s.groups, s.inner_pad, s.states});
    in.dt_weight = pack.get(kDtWeight, {s.groups, s.inner_pad, s.rank});
    in.dt_bias = pack.get(kDtBias, channels), in.D = pack.get(kSkip, channels);
    in.norm_weight = pack.get(kNormWeight, channels), in.norm_bias = pack.get(kNormBias, channels);
    in.gate = gate;
    in.directions = directions;
    in.norm_eps = norm_eps, in.norm_dim = s.inner, in.chunk = chunk;
    return in;
}

struct AffinityParameters {
    OptTensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;
    bool given() const { return fc1_weight.has_value(); }
};

// Where the gate meets the scan (group_width padded channels a group) or, without padding, the merge.
AffinityArgs affinity_args(const AffinityParameters& p, const Tensor& x, int64_t gate_dim, int64_t gate_width,
                           ParamHolder& param) {
    const int64_t hidden = p.fc1_weight->size(0), out = p.fc2_weight->size(0);
    check_parameter(p.fc1_weight, "fc1_weight", {hidden, x.size(3)}, x);
    check_parameter(p.fc1_bias, "fc1_bias", {hidden}, x);
    check_parameter(p.fc2_weight, "fc2_weight", {out, hidden}, x);
    check_parameter(p.fc2_bias, "fc2_bias", {out}, x);
    AffinityArgs args;
    args.batch = static_cast<int>(x.size(0)), args.dim = static_cast<int>(x.size(3));
    args.hidden = static_cast<int>(hidden), args.out_dim = static_cast<int>(out);
    args.group_dim = static_cast<int>(gate_dim), args.group_width = static_cast<int>(gate_width);
    args.fc1_weight = param(p.fc1_weight), args.fc1_bias = param(p.fc1_bias);
    args.fc2_weight = param(p.fc2_weight), args.fc2_bias = param(p.fc2_bias);
    return args;
}

using CoreOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CoreOutputs grouped_mamba_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, OptTensor fc1_weight, OptTensor fc1_bias,
                              OptTensor fc2_weight, OptTensor fc2_bias, Tensor in_proj_weight, Tensor conv_weight,
                              Tensor conv_bias, Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log,
                              Tensor D, Tensor out_norm_weight, Tensor out_norm_bias, std::vector<int64_t> directions,
                              double eps, double norm_eps, int64_t chunk, bool gate_scan, bool save_states) {
    const CoreParameters parameters{in_proj_weight, conv_weight, conv_bias, x_proj_weight,   dt_weight,
                                    dt_bias,        A_log,       D,         out_norm_weight, out_norm_bias};
    const LayerSizes s = layer_sizes(x, parameters);
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.image_tokens();

    ParameterPack pack = core_pack(parameters, s, type);
    pack.pack(x, dtype, context.stream());

    auto [xn, pooled] = layer_norm_pool_fwd(x, norm_weight, norm_bias, eps, s.groups, s.dim_pad);
    const AffinityParameters affinity{fc1_weight, fc1_bias, fc2_weight, fc2_bias};
    Tensor gate = empty_absent(ScalarType::Float, x), hidden = empty_absent(ScalarType::Float, x);
    if (affinity.given()) {
        ParamHolder param;
        const int64_t gates = fc2_weight->size(0) / s.groups;
        AffinityArgs args = affinity_args(affinity, x, gates, gate_scan ? s.inner_pad : gates, param);
        hidden = empty({s.batch, args.hidden}, ScalarType::Float, x);
        gate = empty({s.batch, s.groups, args.group_width}, ScalarType::Float, x);
        args.pooled = static_cast<const float*>(pooled.data_ptr());
        args.hidden_out = static_cast<float*>(hidden.data_ptr()), args.gate = static_cast<float*>(gate.data_ptr());
        check_cuda(launch_channel_affinity_fwd(args, dtype, context.stream()), "channel affinity");
    }

    Tensor uz = empty({s.groups, tokens, 2 * s.inner_pad}, type, x);
    Tensor features = empty({s.groups, tokens, s.features_pad}, type, x);
    matmul_out(uz, alias(xn, {s.groups, tokens, s.dim_pad}, {tokens * s.dim_pad, s.dim_pad, 1}),
               transposed(pack.get(kInProj, {s.groups, 2 * s.inner_pad, s.dim_pad})));
    const Tensor u_image =
        depthwise_conv3x3_fwd(image_of(uz, s, s.inner_pad), pack.get(kConvWeight, {s.groups, s.inner_pad, 3, 3}),
                              pack.get(kConvBias, {s.groups, s.inner_pad}), 1);
    Tensor u = alias(u_image, {s.groups, tokens, s.inner_pad}, {tokens * s.inner_pad, s.inner_pad, 1});
    matmul_out(features, u, transposed(pack.get(kXProj, {s.groups, s.features_pad, s.inner_pad})));
    // The merge without out_proj multiplies all groups of a token at once: token-major.
    Tensor y = gate_scan ? empty({s.batch, s.height, s.width, s.groups, s.inner_pad}, type, x)
                         : image_of(empty({s.groups, tokens, s.inner_pad}, type, x), s, s.inner_pad);
    const OptTensor scan_gate = gate_scan && affinity.given() ? OptTensor(gate) : std::nullopt;
    const Tensor states =
        scan_fwd_into(y, scan_inputs(pack, s, u, uz, features, scan_gate, directions, norm_eps, chunk), save_states);
    return {y, xn, gate, pooled, hidden, uz, u, features, states};
}

using CoreGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dxn: what the merge sends to xn.
CoreGradients grouped_mamba_bwd(Tensor dy, OptTensor dxn, OptTensor dgate, Tensor x, Tensor norm_weight,
                                OptTensor fc1_weight, OptTensor fc1_bias, OptTensor fc2_weight, OptTensor fc2_bias,
                                Tensor in_proj_weight, Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight,
                                Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_norm_weight,
                                Tensor out_norm_bias, Tensor xn, Tensor gate, Tensor pooled, Tensor hidden, Tensor uz,
                                Tensor u, Tensor features, Tensor states, std::vector<int64_t> directions, double eps,
                                double norm_eps, int64_t chunk, bool gate_scan) {
    const CoreParameters parameters{in_proj_weight, conv_weight, conv_bias, x_proj_weight,   dt_weight,
                                    dt_bias,        A_log,       D,         out_norm_weight, out_norm_bias};
    const LayerSizes s = layer_sizes(x, parameters);
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.image_tokens(), g = s.groups, e = s.inner, e_pad = s.inner_pad;
    ParameterPack pack = core_pack(parameters, s, type);
    pack.pack(x, dtype, context.stream());
    const AffinityParameters affinity{fc1_weight, fc1_bias, fc2_weight, fc2_bias};

    Tensor du = empty({g, tokens, e_pad}, type, x), duz = empty({g, tokens, 2 * e_pad}, type, x);
    Tensor dfeatures = empty({g, tokens, s.features_pad}, type, x);
    if (s.features < s.features_pad) torch::stable::zero_(dfeatures);
    const OptTensor scan_gate = gate_scan && affinity.given() ? OptTensor(gate) : std::nullopt;
    // The views live for this call only: they would keep du, duz and dfeatures from being freed.
    const ScanParameterGradients scan =
        scan_bwd_into({image_of(du, s, e_pad), image_of(dfeatures, s, s.rank), image_of(dfeatures, s, s.states, s.rank),
                       image_of(dfeatures, s, s.states, s.rank + s.states), image_of(duz, s, e_pad, e_pad)},
                      dy, scan_inputs(pack, s, u, uz, features, scan_gate, directions, norm_eps, chunk), states);
    dy = Tensor();

    const WeightPartials x_proj = weight_partials(dfeatures, u);
    add_matmul(du, dfeatures, pack.get(kXProj, {g, s.features_pad, e_pad}));
    dfeatures = Tensor();
    const auto [dconv_weight, dconv_bias] =
        conv3x3_bwd_into(image_of(duz, s, e_pad), image_of(du, s, e_pad), image_of(uz, s, e_pad),
                         pack.get(kConvWeight, {g, e_pad, 3, 3}), pack.get(kConvBias, {g, e_pad}), 1);
    du = Tensor();

    const Tensor xn_rows = alias(xn, {g, tokens, s.dim_pad}, {tokens * s.dim_pad, s.dim_pad, 1});
    const WeightPartials in_proj = weight_partials(duz, xn_rows);
    Tensor dxn_rows = empty({g, tokens, s.dim_pad}, type, x);
    matmul_out(dxn_rows, duz, pack.get(kInProj, {g, 2 * e_pad, s.dim_pad}));
    duz = Tensor();

    OptTensor dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias;
    Tensor dpooled = empty({s.batch, x.size(3)}, ScalarType::Float, x);
    if (affinity.given()) {
        ParamHolder param;
        const int64_t gates = fc2_weight->size(0) / g;
        AffinityArgs args = affinity_args(affinity, x, gates, gate_scan ? e_pad : gates, param);
        Tensor dgate_full = gate_scan ? scan.dgate : *dgate;
        check_shape(dgate_full, "dgate", shape_of(gate));
        GM_CHECK(dgate_full.scalar_type() == ScalarType::Float, "dgate must be float32");
        if (!dgate_full.is_contiguous()) dgate_full = torch::stable::contiguous(dgate_full);
        Tensor scratch = empty({s.batch, args.out_dim + args.hidden}, ScalarType::Float, x);
        dfc1_weight = empty_like_or_absent(fc1_weight, x), dfc1_bias = empty_like_or_absent(fc1_bias, x);
        dfc2_weight = empty_like_or_absent(fc2_weight, x), dfc2_bias = empty_like_or_absent(fc2_bias, x);
        args.pooled = static_cast<const float*>(pooled.data_ptr());
        args.hidden_out = static_cast<float*>(hidden.data_ptr()), args.gate = static_cast<float*>(gate.data_ptr());
        args.dgate = static_cast<const float*>(dgate_full.data_ptr());
        args.dpooled = static_cast<float*>(dpooled.data_ptr()), args.scratch = static_cast<float*>(scratch.data_ptr());
        args.dfc1_weight = param_out(*dfc1_weight, fc1_weight), args.dfc1_bias = param_out(*dfc1_bias, fc1_bias);
        args.dfc2_weight = param_out(*dfc2_weight, fc2_weight), args.dfc2_bias = param_out(*dfc2_bias, fc2_bias);
        check_cuda(launch_channel_affinity_bwd(args, dtype, context.stream()), "channel affinity backward");
    } else {
        torch::stable::zero_(dpooled);
    }
    auto [dx, dnorm_weight, dnorm_bias] =
        layer_norm_pool_bwd(image_of(dxn_rows, s, s.dim_pad), dxn, dpooled, x, norm_weight, eps);

    ParameterSums sums;
    const Tensor din_proj =
        sums.add(in_proj_weight, {2 * g, e, s.dim}, in_proj.values, e_pad, s.dim_pad, in_proj.parts, 2);
    const Tensor dx_proj =
        sums.add(x_proj_weight, {g, s.features, e}, x_proj.values, s.features_pad, e_pad, x_proj.parts);
    // A = -exp(A_log), so dA_log = dA * A.
    const Tensor dA_log = sums.add(A_log, {g, e, s.states}, scan.dA, e_pad, s.states, 1, 1, std::nullopt,
                                   pack.get(kA, {g, e_pad, s.states}));
    const auto cropped = [&](const Tensor& parameter, const Tensor& gradient, int64_t row) {
        return e == e_pad ? gradient : sums.add(parameter, {g, e, row}, gradient, e_pad, row);
    };
    const Tensor dconv_w = cropped(conv_weight, dconv_weight, 9), dconv_b = cropped(conv_bias, dconv_bias, 1);
    const Tensor ddt_weight = cropped(dt_weight, scan.ddt_weight, s.rank);
    const Tensor ddt_bias = cropped(dt_bias, scan.ddt_bias, 1), dD = cropped(D, scan.dD, 1);
    const Tensor dout_weight = cropped(out_norm_weight, scan.dnorm_weight, 1);
    const Tensor dout_bias = cropped(out_norm_bias, scan.dnorm_bias, 1);
    sums.launch(dtype, context.stream());
    const auto or_absent = [&](const OptTensor& t) { return t ? *t : empty_absent(ScalarType::Float, x); };
    return {dx,
            dnorm_weight,
            dnorm_bias,
            or_absent(dfc1_weight),
            or_absent(dfc1_bias),
            or_absent(dfc2_weight),
            or_absent(dfc2_bias),
            din_proj,
            dconv_w,
            dconv_b,
            dx_proj,
            ddt_weight,
            ddt_bias,
            dA_log,
            dD,
            dout_weight,
            dout_bias};
}

// ---- from the scan to the output ----------------------------------------------------------------------------------

struct MergeSizes {
    int64_t batch, height, width, channels, mixed;  // mixed: columns that proj reads, pads included
    int64_t tokens() const { return batch * height * width; }
};

// With out_proj: y (batch, H, W, G, E_pad) group-major, out = proj(LayerNorm(out_proj(y) * scale * xn * gate)).
// Without: y token-major, out = proj(y).
MergeSizes merge_sizes(const Tensor& y, const OptTensor& out_proj_weight, const Tensor& proj_weight) {
    GM_CHECK(y.dim() == 5, "y must be (batch, H, W, G, E), got ", show(shape_of(y)));
    MergeSizes s{y.size(0), y.size(1), y.size(2), proj_weight.size(0), 0};
    s.mixed = y.size(3) * (out_proj_weight ? round_up(out_proj_weight->size(1), kUnit) : y.size(4));
    return s;
}

ParameterPack merge_pack(const Tensor& y, const OptTensor& out_proj_weight, const Tensor& proj_weight,
                         const Tensor& proj_bias, const MergeSizes& s) {
    const ScalarType dtype = y.scalar_type();
    const int64_t groups = y.size(3), e_pad = y.size(4);
    ParameterPack pack(dtype);
    if (out_proj_weight) {
        const int64_t dim = out_proj_weight->size(1), e = out_proj_weight->size(2);
        pack.add(*out_proj_weight, {groups, dim, e}, round_up(dim, kUnit), e_pad, dtype);
    } else {
        pack.add(proj_weight, {1, 1, 1}, 1, 1, proj_weight.scalar_type());  // keeps the places of MergeParameter
    }
    pack.add(proj_weight, {s.channels, groups, proj_weight.size(1) / groups}, groups, s.mixed / groups, dtype);
    pack.add(proj_bias, {1, 1, s.channels}, 1, s.channels, dtype);
    return pack;
}

using MergeOutputs = std::tuple<Tensor, Tensor, Tensor>;

MergeOutputs grouped_merge_fwd(Tensor y, Tensor xn, OptTensor gate, OptTensor out_proj_weight, OptTensor skip_scale,
                               Tensor norm_weight, Tensor norm_bias, Tensor proj_weight, Tensor proj_bias, double eps) {
    const MergeSizes s = merge_sizes(y, out_proj_weight, proj_weight);
    const DType dtype = dtype_of(y);
    const ScalarType type = y.scalar_type();
    const CudaContext context(y);
    const int64_t tokens = s.tokens(), groups = y.size(3), e_pad = y.size(4);
    ParameterPack pack = merge_pack(y, out_proj_weight, proj_weight, proj_bias, s);
    pack.pack(y, dtype, context.stream());

    Tensor out = empty({s.batch, s.height, s.width, s.channels}, type, y);
    Tensor o = empty_absent(type, y), mixed = empty_absent(type, y);
    if (tokens == 0) return {out, o, mixed};
    const Tensor* rows = &y;
    if (out_proj_weight) {
        const int64_t dim_pad = round_up(out_proj_weight->size(1), kUnit);
        const Tensor o_rows = empty({groups, tokens, dim_pad}, type, y);
        matmul_out(o_rows, alias(y, {groups, tokens, e_pad}, {tokens * e_pad, e_pad, 1}),
                   transposed(pack.get(kOutProj, {groups, dim_pad, e_pad})));
        LayerSizes image{};
        image.batch = s.batch, image.height = s.height, image.width = s.width, image.groups = groups;
        o = image_of(o_rows, image, dim_pad);
        OptTensor flat_gate;
        if (gate) flat_gate = alias(*gate, {s.batch, s.channels});
        mixed = modulated_layer_norm_fwd(o, xn, *skip_scale, flat_gate, norm_weight, norm_bias, eps, dim_pad);
        rows = &mixed;
    }
    matmul_bias_out(alias(out, {tokens, s.channels}), pack.get(kProjBias, {s.channels}),
                    alias(*rows, {tokens, s.mixed}), transposed(pack.get(kProj, {s.channels, s.mixed})));
    return {out, o, mixed};
}

using MergeGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int kColumnSumBlocks = 264;  // two an SM of an H100

MergeGradients grouped_merge_bwd(Tensor dout, Tensor y, Tensor xn, OptTensor gate, OptTensor out_proj_weight,
                                 OptTensor skip_scale, Tensor norm_weight, Tensor proj_weight, Tensor proj_bias,
                                 Tensor o, Tensor mixed, double eps) {
    const MergeSizes s = merge_sizes(y, out_proj_weight, proj_weight);
    const DType dtype = dtype_of(y);
    const ScalarType type = y.scalar_type();
    const CudaContext context(y);
    const int64_t tokens = s.tokens(), groups = y.size(3), e_pad = y.size(4);
    GM_CHECK(tokens > 0, "an empty image has no backward here");
    ParameterPack pack = merge_pack(y, out_proj_weight, proj_weight, proj_bias, s);
    pack.pack(y, dtype, context.stream());

    if (!dout.is_contiguous()) dout = torch::stable::contiguous(dout);
    const Tensor dout_rows = alias(dout, {1, tokens, s.channels});
    const Tensor& rows = out_proj_weight ? mixed : y;
    const WeightPartials proj = weight_partials(dout_rows, alias(rows, {1, tokens, s.mixed}));
    ColumnSumArgs columns;
    columns.x = dout.data_ptr(), columns.rows = tokens, columns.row_stride = s.channels;
    columns.columns = static_cast<int>(s.channels);
    columns.blocks = static_cast<int>(std::min<int64_t>(kColumnSumBlocks, (tokens + 15) / 16));
    const Tensor column_partials = empty({columns.blocks, s.channels}, ScalarType::Float, y);
    columns.partials = static_cast<float*>(column_partials.data_ptr());
    check_cuda(launch_column_sums(columns, dtype, context.stream()), "bias gradient");
    Tensor dmixed = empty({s.batch, s.height, s.width, s.mixed}, type, y);
    matmul_out(alias(dmixed, {tokens, s.mixed}), alias(dout, {tokens, s.channels}),
               pack.get(kProj, {s.channels, s.mixed}));

    ParameterSums sums;
    const Tensor dproj_bias = sums.add(proj_bias, {1, 1, s.channels}, column_partials, 1, s.channels, columns.blocks);
    const auto absent = [&] { return empty_absent(ScalarType::Float, y); };
    const Tensor dproj = sums.add(proj_weight, {s.channels * groups, 1, proj_weight.size(1) / groups}, proj.values, 1,
                                  s.mixed / groups, proj.parts, s.channels * groups);
    if (!out_proj_weight) {
        sums.launch(dtype, context.stream());
        return {
            alias(dmixed, shape_of(y)), absent(), absent(), absent(), absent(), absent(), absent(), dproj, dproj_bias};
    }
    OptTensor flat_gate;
    if (gate) flat_gate = alias(*gate, {s.batch, s.channels});
    auto [d_o, dxn, dscale, dgate, dnorm_weight, dnorm_bias] =
        modulated_layer_norm_bwd(alias(dmixed, shape_of(mixed)), o, xn, *skip_scale, flat_gate, norm_weight, eps);
    dmixed = Tensor();
    const int64_t dim = out_proj_weight->size(1), e = out_proj_weight->size(2), dim_pad = o.size(4);
    const Tensor do_rows = alias(d_o, {groups, tokens, dim_pad}, {tokens * dim_pad, dim_pad, 1});
    const WeightPartials out_proj =
        weight_partials(do_rows, alias(y, {groups, tokens, e_pad}, {tokens * e_pad, e_pad, 1}));
    LayerSizes image{};
    image.batch = s.batch, image.height = s.height, image.width = s.width, image.groups = groups;
    const Tensor dy_rows = empty({groups, tokens, e_pad}, type, y);
    matmul_out(dy_rows, do_rows, pack.get(kOutProj, {groups, dim_pad, e_pad}));
    const Tensor dout_proj =
        sums.add(*out_proj_weight, {groups, dim, e}, out_proj.values, dim_pad, e_pad, out_proj.parts);
    sums.launch(dtype, context.stream());
    if (gate) dgate = alias(dgate, shape_of(*gate));
    return {
        image_of(dy_rows, image, e_pad), dxn, dgate, dout_proj, dscale, dnorm_weight, dnorm_bias, dproj, dproj_bias};
}

}  // namespace

WeightPartials weight_partials(const Tensor& dy, const Tensor& x) {
    const int64_t groups = dy.size(0), tokens = dy.size(1), n = dy.size(2), k = x.size(2);
    // Enough products to fill a GPU of about 132 multiprocessors twice, of at least 256 terms.
    constexpr int64_t kProducts = 264, kTile = 64, kMinTerms = 256, kMaxParts = 64;
    const int64_t tiles = groups * ((n + kTile - 1) / kTile) * ((k + kTile - 1) / kTile);
    const int64_t wanted = std::min(std::max<int64_t>((kProducts + tiles - 1) / tiles, 1), kMaxParts);
    const int64_t most = std::max<int64_t>(std::min(wanted, tokens / kMinTerms), 1);
    int64_t parts = most;
    while (tokens % parts != 0) --parts;
    const auto part = [](const Tensor& t, int64_t first, int64_t batch, int64_t terms) {
        return alias(t, {batch, terms, t.size(2)}, {terms * t.size(2), t.size(2), 1}, first * t.size(2));
    };
    if (2 * parts >= most) {
        const Tensor values = empty({groups * parts, n, k}, dy.scalar_type(), dy);
        const int64_t terms = tokens / parts;
        matmul_out(values, transposed(part(dy, 0, groups * parts, terms)), part(x, 0, groups * parts, terms));
        return {values, parts};
    }
    // No number of equal parts will do: one shorter part more, a group at a time.
    const int64_t terms = tokens / most, rest = tokens - most * terms, count = most + (rest > 0 ? 1 : 0);
    const Tensor values = empty({groups * count, n, k}, dy.scalar_type(), dy);
    for (int64_t g = 0; g < groups; ++g) {
        const auto slot = [&](int64_t i, int64_t batch) {
            return alias(values, {batch, n, k}, {n * k, k, 1}, (g * count + i) * n * k);
        };
        const int64_t first = g * tokens;
        matmul_out(slot(0, most), transposed(part(dy, first, most, terms)), part(x, first, most, terms));
        if (rest > 0)
            matmul_out(slot(most, 1), transposed(part(dy, first + most * terms, 1, rest)),
                       part(x, first + most * terms, 1, rest));
    }
    return {values, count};
}

}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("grouped_mamba_fwd", TORCH_BOX(&gm::grouped_mamba_fwd));
    m.impl("grouped_mamba_bwd", TORCH_BOX(&gm::grouped_mamba_bwd));
    m.impl("grouped_merge_fwd", TORCH_BOX(&gm::grouped_merge_fwd));
    m.impl("grouped_merge_bwd", TORCH_BOX(&gm::grouped_merge_bwd));
}
