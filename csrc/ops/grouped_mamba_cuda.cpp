// SPDX-License-Identifier: Apache-2.0
// The GroupMamba layer on CUDA as one op. It queues the kernels of the other ops and torch's matrix products from one
// call, so that a small layer does not wait for the host. Images are group-major between the products, (G, tokens,
// channels), with the channels of a group padded to a multiple of 8 by zeros: every product then reads aligned rows.
#include "ops/entries_cuda.h"
#include "ops/parameter_pack.h"
#include "ops/token_sums.h"

namespace gm {
namespace {

constexpr int64_t kUnit = kPixelUnit;

// Order of the parameters in the pack.
enum Packed {
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
    kOutProj
};

struct LayerSizes {
    int64_t batch, height, width, groups, dim, inner, states, rank;
    int64_t dim_pad, inner_pad, features, features_pad, channels, channels_pad;
    int64_t mixed;  // columns that proj reads, pads included
    int64_t image_tokens() const { return batch * height * width; }
};

// (G, T, K) rows as the image (batch, H, W, G, K), from channel `first` on.
Tensor image_of(const Tensor& rows, const LayerSizes& s, int64_t channels, int64_t first = 0) {
    const int64_t k = rows.size(2);
    return alias(rows, {s.batch, s.height, s.width, s.groups, channels},
                 {s.height * s.width * k, s.width * k, k, s.image_tokens() * k, 1}, first);
}

struct LayerParameters {
    Tensor in_proj_weight, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A_log, D, out_norm_weight,
        out_norm_bias;
    OptTensor out_proj_weight, skip_scale;
    Tensor proj_weight, proj_bias;
};

LayerSizes layer_sizes(const Tensor& x, const LayerParameters& p) {
    GM_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, H, W, C) with elements, got ", show(shape_of(x)));
    GM_CHECK(p.in_proj_weight.dim() == 3 && p.A_log.dim() == 3 && p.dt_weight.dim() == 3, "weights must be (G, ., .)");
    LayerSizes s{};
    s.batch = x.size(0), s.height = x.size(1), s.width = x.size(2);
    s.groups = p.A_log.size(0), s.inner = p.A_log.size(1), s.states = p.A_log.size(2), s.rank = p.dt_weight.size(2);
    GM_CHECK(s.groups >= 1 && x.size(3) % s.groups == 0, "C must be a multiple of ", s.groups, ", got ", x.size(3));
    s.channels = x.size(3), s.channels_pad = round_up(s.channels, kUnit);
    s.dim = s.channels / s.groups;
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
    GM_CHECK(p.out_proj_weight.has_value() == p.skip_scale.has_value(), "out_proj_weight and skip_scale go together");
    check_parameter(p.out_proj_weight, "out_proj_weight", {s.groups, s.dim, s.inner}, x);
    check_parameter(p.skip_scale, "skip_scale", {1}, x);
    check_parameter(p.proj_weight, "proj_weight", {s.channels, s.groups * (p.out_proj_weight ? s.dim : s.inner)}, x);
    check_parameter(p.proj_bias, "proj_bias", {s.channels}, x);
    s.mixed = s.groups * (p.out_proj_weight ? s.dim_pad : s.inner_pad);
    return s;
}

ParameterPack layer_pack(const LayerParameters& p, const LayerSizes& s, ScalarType dtype) {
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
    pack.add(p.proj_weight, {1, s.channels * g, p.proj_weight.size(1) / g}, s.channels_pad * g, s.mixed / g, dtype);
    pack.add(p.proj_bias, {1, 1, s.channels}, 1, s.channels_pad, dtype);
    if (p.out_proj_weight) pack.add(*p.out_proj_weight, {g, s.dim, e}, s.dim_pad, e_pad, dtype);
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

using LayerOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LayerOutputs grouped_mamba_layer_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, OptTensor fc1_weight,
                                     OptTensor fc1_bias, OptTensor fc2_weight, OptTensor fc2_bias,
                                     Tensor in_proj_weight, Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight,
                                     Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_norm_weight,
                                     Tensor out_norm_bias, OptTensor out_proj_weight, OptTensor skip_scale,
                                     Tensor proj_weight, Tensor proj_bias, std::vector<int64_t> directions, double eps,
                                     double norm_eps, int64_t chunk, bool residual, bool save_states) {
    const LayerParameters parameters{in_proj_weight,  conv_weight, conv_bias,   x_proj_weight,   dt_weight,
                                     dt_bias,         A_log,       D,           out_norm_weight, out_norm_bias,
                                     out_proj_weight, skip_scale,  proj_weight, proj_bias};
    const LayerSizes s = layer_sizes(x, parameters);
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.image_tokens();
    const bool gate_scan = !out_proj_weight;  // without a merge the gate meets the scan

    ParameterPack pack = layer_pack(parameters, s, type);
    pack.pack(x, dtype, context.stream());

    const AffinityParameters affinity{fc1_weight, fc1_bias, fc2_weight, fc2_bias};
    const Tensor out = empty_padded_image(s.batch, s.height, s.width, s.channels, x);
    NormPoolInputs norm{x, norm_weight, norm_bias, eps, s.groups, s.dim_pad};
    norm.pooling = affinity.given() ? NormPoolInputs::kPartial : NormPoolInputs::kNone;
    if (residual) norm.sum = out, norm.sum_bias = proj_bias;
    auto [xn, partials] = layer_norm_pool_fwd(norm);
    Tensor gate = empty_absent(ScalarType::Float, x), hidden = empty_absent(ScalarType::Float, x);
    Tensor pooled = empty_absent(ScalarType::Float, x);
    if (affinity.given()) {
        ParamHolder param;
        const int64_t gates = fc2_weight->size(0) / s.groups;
        AffinityArgs args = affinity_args(affinity, x, gates, gate_scan ? s.inner_pad : gates, param);
        hidden = empty({s.batch, args.hidden}, ScalarType::Float, x);
        gate = empty({s.batch, s.groups, args.group_width}, ScalarType::Float, x);
        pooled = empty({s.batch, s.channels}, ScalarType::Float, x);
        args.partials = static_cast<const float*>(partials.data_ptr());
        args.strips = static_cast<int>(partials.size(1)), args.factor = 1.f / static_cast<float>(s.height * s.width);
        args.pooled = static_cast<float*>(pooled.data_ptr());
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
    // The product without out_proj takes all groups of a token at once: token-major.
    Tensor y = gate_scan ? empty({s.batch, s.height, s.width, s.groups, s.inner_pad}, type, x)
                         : image_of(empty({s.groups, tokens, s.inner_pad}, type, x), s, s.inner_pad);
    const OptTensor scan_gate = gate_scan && affinity.given() ? OptTensor(gate) : std::nullopt;
    const Tensor states =
        scan_fwd_into(y, scan_inputs(pack, s, u, uz, features, scan_gate, directions, norm_eps, chunk), save_states);

    Tensor o = empty_absent(type, x), mixed = empty_absent(type, x);
    if (out_proj_weight) {
        const Tensor o_rows = empty({s.groups, tokens, s.dim_pad}, type, x);
        matmul_out(o_rows, alias(y, {s.groups, tokens, s.inner_pad}, {tokens * s.inner_pad, s.inner_pad, 1}),
                   transposed(pack.get(kOutProj, {s.groups, s.dim_pad, s.inner_pad})));
        o = image_of(o_rows, s, s.dim_pad);
        OptTensor flat_gate;
        if (affinity.given()) flat_gate = alias(gate, {s.batch, s.channels});
        mixed = modulated_layer_norm_fwd(o, xn, *skip_scale, flat_gate, norm_weight, norm_bias, eps, s.dim_pad);
    }
    const Tensor rows = alias(out_proj_weight ? mixed : y, {tokens, s.mixed});
    const Tensor out_rows = alias(out, {tokens, s.channels_pad});
    const Tensor proj = transposed(pack.get(kProj, {s.channels_pad, s.mixed}));
    if (residual) {
        add_matmul(out_rows, rows, proj);
    } else {
        matmul_bias_out(out_rows, pack.get(kProjBias, {s.channels_pad}), rows, proj);
    }
    return {out, xn, gate, pooled, hidden, uz, u, features, states, y, o, mixed};
}

using LayerGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
               Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LayerGradients grouped_mamba_layer_bwd(Tensor dout, Tensor x, Tensor norm_weight, OptTensor fc1_weight,
                                       OptTensor fc1_bias, OptTensor fc2_weight, OptTensor fc2_bias,
                                       Tensor in_proj_weight, Tensor conv_weight, Tensor conv_bias,
                                       Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D,
                                       Tensor out_norm_weight, Tensor out_norm_bias, OptTensor out_proj_weight,
                                       OptTensor skip_scale, Tensor proj_weight, Tensor proj_bias, Tensor xn,
                                       Tensor gate, Tensor pooled, Tensor hidden, Tensor uz, Tensor u, Tensor features,
                                       Tensor states, Tensor y, Tensor o, Tensor mixed, std::vector<int64_t> directions,
                                       double eps, double norm_eps, int64_t chunk, bool residual) {
    const LayerParameters parameters{in_proj_weight,  conv_weight, conv_bias,   x_proj_weight,   dt_weight,
                                     dt_bias,         A_log,       D,           out_norm_weight, out_norm_bias,
                                     out_proj_weight, skip_scale,  proj_weight, proj_bias};
    const LayerSizes s = layer_sizes(x, parameters);
    check_image(dout, "dout", shape_of(x), x);
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.image_tokens(), g = s.groups, e = s.inner, e_pad = s.inner_pad, d_pad = s.dim_pad;
    const bool gate_scan = !out_proj_weight;
    ParameterPack pack = layer_pack(parameters, s, type);
    pack.pack(x, dtype, context.stream());
    const AffinityParameters affinity{fc1_weight, fc1_bias, fc2_weight, fc2_bias};
    const auto absent = [&] { return empty_absent(ScalarType::Float, x); };
    ParameterSums sums;

    // From the output to the scan.
    const PaddedRows dout_padded(dout);
    const Tensor dout_rows = dout_padded.rows();
    const WeightPartials proj = weight_partials(alias(dout_rows, {1, tokens, s.channels_pad}),
                                                alias(gate_scan ? y : mixed, {1, tokens, s.mixed}));
    const Tensor dproj = sums.add(proj_weight, {1, s.channels * g, proj_weight.size(1) / g}, proj.values,
                                  s.channels_pad * g, s.mixed / g, proj.parts);
    Tensor dmixed = empty({tokens, s.mixed}, type, x);
    matmul_out(dmixed, dout_rows, pack.get(kProj, {s.channels_pad, s.mixed}));

    Tensor dy = alias(dmixed, {s.batch, s.height, s.width, g, s.mixed / g});
    Tensor dout_proj = absent(), dscale = absent(), dmix_weight = absent(), dmix_bias = absent();
    OptTensor dxn, dgate;
    if (out_proj_weight) {
        OptTensor flat_gate;
        if (affinity.given()) flat_gate = alias(gate, {s.batch, s.channels});
        auto [d_o, dxn_merge, dscale_merge, dgate_merge, dweight, dbias] =
            modulated_layer_norm_bwd(dy, o, xn, *skip_scale, flat_gate, norm_weight, eps);
        dy = dmixed = Tensor();
        dxn = dxn_merge, dscale = dscale_merge, dmix_weight = dweight, dmix_bias = dbias;
        if (affinity.given()) dgate = alias(dgate_merge, shape_of(gate));
        const Tensor do_rows = alias(d_o, {g, tokens, d_pad}, {tokens * d_pad, d_pad, 1});
        const WeightPartials out_proj =
            weight_partials(do_rows, alias(y, {g, tokens, e_pad}, {tokens * e_pad, e_pad, 1}));
        dout_proj = sums.add(*out_proj_weight, {g, s.dim, e}, out_proj.values, d_pad, e_pad, out_proj.parts);
        const Tensor dy_rows = empty({g, tokens, e_pad}, type, x);
        matmul_out(dy_rows, do_rows, pack.get(kOutProj, {g, d_pad, e_pad}));
        dy = image_of(dy_rows, s, e_pad);
    }

    // From the scan to the image.
    Tensor du = empty({g, tokens, e_pad}, type, x), duz = empty({g, tokens, 2 * e_pad}, type, x);
    Tensor dfeatures = empty({g, tokens, s.features_pad}, type, x);
    if (s.features < s.features_pad) torch::stable::zero_(dfeatures);
    const OptTensor scan_gate = gate_scan && affinity.given() ? OptTensor(gate) : std::nullopt;
    // The views live for this call only: they would keep du, duz and dfeatures from being freed.
    const ScanParameterGradients scan =
        scan_bwd_into({image_of(du, s, e_pad), image_of(dfeatures, s, s.rank), image_of(dfeatures, s, s.states, s.rank),
                       image_of(dfeatures, s, s.states, s.rank + s.states), image_of(duz, s, e_pad, e_pad)},
                      dy, scan_inputs(pack, s, u, uz, features, scan_gate, directions, norm_eps, chunk), states);
    dy = Tensor(), dmixed = Tensor();
    if (gate_scan && affinity.given()) dgate = scan.dgate;

    const WeightPartials x_proj = weight_partials(dfeatures, u);
    add_matmul(du, dfeatures, pack.get(kXProj, {g, s.features_pad, e_pad}));
    dfeatures = Tensor();
    const ConvGradients conv =
        conv3x3_bwd_into(image_of(duz, s, e_pad), image_of(du, s, e_pad), image_of(uz, s, e_pad),
                         pack.get(kConvWeight, {g, e_pad, 3, 3}), pack.get(kConvBias, {g, e_pad}), 1);
    du = Tensor();

    const Tensor xn_rows = alias(xn, {g, tokens, d_pad}, {tokens * d_pad, d_pad, 1});
    const WeightPartials in_proj = weight_partials(duz, xn_rows);
    Tensor dxn_rows = empty({g, tokens, d_pad}, type, x);
    matmul_out(dxn_rows, duz, pack.get(kInProj, {g, 2 * e_pad, d_pad}));
    duz = Tensor();

    OptTensor dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dpooled;
    if (affinity.given()) {
        ParamHolder param;
        const int64_t gates = fc2_weight->size(0) / g;
        AffinityArgs args = affinity_args(affinity, x, gates, gate_scan ? e_pad : gates, param);
        check_shape(*dgate, "dgate", shape_of(gate));
        Tensor scratch = empty({s.batch, args.out_dim + args.hidden}, ScalarType::Float, x);
        dpooled = empty({s.batch, s.channels}, ScalarType::Float, x);
        dfc1_weight = empty_like_or_absent(fc1_weight, x), dfc1_bias = empty_like_or_absent(fc1_bias, x);
        dfc2_weight = empty_like_or_absent(fc2_weight, x), dfc2_bias = empty_like_or_absent(fc2_bias, x);
        args.pooled = static_cast<float*>(pooled.data_ptr());
        args.hidden_out = static_cast<float*>(hidden.data_ptr()), args.gate = static_cast<float*>(gate.data_ptr());
        args.dgate = static_cast<const float*>(dgate->data_ptr());
        args.dpooled = static_cast<float*>(dpooled->data_ptr()), args.scratch = static_cast<float*>(scratch.data_ptr());
        args.dfc1_weight = param_out(*dfc1_weight, fc1_weight), args.dfc1_bias = param_out(*dfc1_bias, fc1_bias);
        args.dfc2_weight = param_out(*dfc2_weight, fc2_weight), args.dfc2_bias = param_out(*dfc2_bias, fc2_bias);
        check_cuda(launch_channel_affinity_bwd(args, dtype, context.stream()), "channel affinity backward");
    }
    NormPoolGradients norm{image_of(dxn_rows, s, d_pad), dxn, dpooled, std::nullopt, true};
    if (residual) norm.dx_more = dout;
    auto [dx, dnorm_weight, dnorm_bias, dout_sum] = layer_norm_pool_bwd(norm, x, norm_weight, eps);
    const Tensor dproj_bias = sum_of_columns(sums, proj_bias, dout_sum, dout_rows, s.channels, dtype, context.stream());

    const Tensor din_proj = sums.add(in_proj_weight, {2 * g, e, s.dim}, in_proj.values, e_pad, d_pad, in_proj.parts, 2);
    const Tensor dx_proj =
        sums.add(x_proj_weight, {g, s.features, e}, x_proj.values, s.features_pad, e_pad, x_proj.parts);
    // A = -exp(A_log), so dA_log = dA * A.
    const Tensor dA_log = sums.add(A_log, {g, e, s.states}, scan.dA, e_pad, s.states, 1, 1, std::nullopt,
                                   pack.get(kA, {g, e_pad, s.states}));
    const auto cropped = [&](const Tensor& parameter, const Tensor& gradient, int64_t row) {
        return e == e_pad ? gradient : sums.add(parameter, {g, e, row}, gradient, e_pad, row);
    };
    const Tensor dconv_weight = cropped(conv_weight, conv.dweight, 9), dconv_bias = cropped(conv_bias, conv.dbias, 1);
    const Tensor ddt_weight = cropped(dt_weight, scan.ddt_weight, s.rank);
    const Tensor ddt_bias = cropped(dt_bias, scan.ddt_bias, 1), dD = cropped(D, scan.dD, 1);
    const Tensor dout_weight = cropped(out_norm_weight, scan.dnorm_weight, 1);
    const Tensor dout_bias = cropped(out_norm_bias, scan.dnorm_bias, 1);
    if (out_proj_weight) {  // the released layer uses its norm twice
        dnorm_weight = sums.add(norm_weight, {1, 1, s.channels}, dnorm_weight, 1, s.channels, 1, 1, dmix_weight);
        dnorm_bias = sums.add(norm_weight, {1, 1, s.channels}, dnorm_bias, 1, s.channels, 1, 1, dmix_bias);
    }
    sums.launch(dtype, context.stream());
    const auto or_absent = [&](const OptTensor& t) { return t ? *t : absent(); };
    return {dx,
            dnorm_weight,
            dnorm_bias,
            or_absent(dfc1_weight),
            or_absent(dfc1_bias),
            or_absent(dfc2_weight),
            or_absent(dfc2_bias),
            din_proj,
            dconv_weight,
            dconv_bias,
            dx_proj,
            ddt_weight,
            ddt_bias,
            dA_log,
            dD,
            dout_weight,
            dout_bias,
            dout_proj,
            dscale,
            dproj,
            dproj_bias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("grouped_mamba_layer_fwd", TORCH_BOX(&gm::grouped_mamba_layer_fwd));
    m.impl("grouped_mamba_layer_bwd", TORCH_BOX(&gm::grouped_mamba_layer_bwd));
}
