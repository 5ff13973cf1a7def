// SPDX-License-Identifier: Apache-2.0
// The backward of the GroupMamba layer on CUDA: the steps of its forward in reverse order.
#include "cuda/channel_affinity/launch.h"
#include "host/blas.h"
#include "host/branch.h"
#include "ops/layer/drop_path.h"
#include "ops/layer/grouped_mamba.h"
#include "ops/layer/token_gemm.h"

namespace gm {
namespace {

using LayerGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
               Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LayerGradients layer_backward(Tensor dout, const Tensor& x, const LayerParameters& p, const LayerScalars& scalars,
                              const Tensor& saved_images, const Tensor& saved_floats) {
    const LayerSizes s = layer_sizes(x, p, scalars.chunk);
    check_image(dout, "dout", shape_of(x), x);
    dout = canonical_image(dout);  // it is read twice
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.tokens(), g = s.groups, e = s.inner, e_pad = s.inner_pad, d_pad = s.dim_pad;
    const DropPathArg drop_path = layer_drop_path(x, s, scalars);
    const double branch = scalars.drop_path_scale;
    Workspace saved(type), scratch(type);
    const LayerPlaces places = reserve_layer(s, true, saved);
    saved.adopt_images(saved_images, x), saved.adopt_floats(saved_floats, x);
    const LayerImages images = layer_images(s, places, true, saved);
    ParameterPack pack =
        layer_pack(p, s, type, scratch, {&saved, {places.parameters.begin(), places.parameters.end()}, true});
    scratch.allocate(x);
    pack.prepare();
    pack.launch(dtype, context.stream());
    ParameterSums sums;

    // From the output to the scan.
    const PaddedRows dout_padded(dout, context);
    const Tensor dout_rows = dout_padded.rows();
    Tensor dmixed = empty({tokens, s.mixed}, type, x);
    token_gemm_input(dmixed, branch, false, dout_rows, pack.get(kProj, {s.channels_pad, s.mixed}), context);
    clear_dropped(dmixed, s.batch, drop_path, context);

    const Shape mixed_image{s.batch, s.height, s.width, g, s.mixed / g};
    Tensor dy = alias(dmixed, mixed_image);
    OptTensor dout_proj, dscale, dxn;
    Tensor mixed = images.y;
    PartialRows mix;
    // The gradient of the gate, to be summed over `parts` rows for each image.
    const float* dgate = nullptr;
    int64_t dgate_parts = 1, dgate_stride = s.groups * s.gate_width;
    OptTensor dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dpooled;
    Tensor affinity_scratch;
    ParamHolder affinity_parameters;
    std::optional<Branch> affinity;  // runs beside the convolution, which has many short blocks
    const auto affinity_backward = [&] {
        AffinityArgs args = affinity_args(p, s, images, affinity_parameters);
        affinity_scratch = empty({s.batch, args.out_dim + args.hidden}, ScalarType::Float, x);
        dpooled = empty({s.batch, s.channels}, ScalarType::Float, x);
        dfc1_weight = empty_like_or_absent(p.fc1_weight, x), dfc1_bias = empty_like_or_absent(p.fc1_bias, x);
        dfc2_weight = empty_like_or_absent(p.fc2_weight, x), dfc2_bias = empty_like_or_absent(p.fc2_bias, x);
        args.dgate = dgate, args.dgate_parts = static_cast<int>(dgate_parts), args.dgate_stride = dgate_stride;
        args.dpooled = static_cast<float*>(dpooled->data_ptr()),
        args.scratch = static_cast<float*>(affinity_scratch.data_ptr());
        args.dfc1_weight = param_out(*dfc1_weight, p.fc1_weight), args.dfc1_bias = param_out(*dfc1_bias, p.fc1_bias);
        args.dfc2_weight = param_out(*dfc2_weight, p.fc2_weight), args.dfc2_bias = param_out(*dfc2_bias, p.fc2_bias);
        affinity.emplace(context);
        check_cuda(launch_channel_affinity_bwd(args, dtype, affinity->stream()), "channel affinity backward");
    };
    if (s.merges) {
        OptTensor flat_gate;
        if (s.gated()) flat_gate = alias(*images.gate, {s.batch, s.channels});
        mixed = empty(mixed_image, type, x);
        const ModulatedGradients merge = modulated_layer_norm_bwd(
            dy, images.o, images.xn, *p.skip_scale, flat_gate, p.norm_weight, scalars.eps, context, mixed, p.norm_bias);
        dy = dmixed = Tensor();
        dxn = merge.dx, mix = merge.sums;
        dscale = sums.add_rows(*p.skip_scale, {1, 1, 1}, mix, 2 * s.channels, 1, 1);
        dgate = mix.column(2 * s.channels + 1), dgate_parts = mix.rows / s.batch, dgate_stride = mix.columns;
        const Tensor do_rows = rows_of(merge.d_o, s, d_pad);
        const Tensor dy_rows = empty({g, tokens, e_pad}, type, x);
        const WeightPartials out_proj = token_gemm_bwd(dy_rows, false, do_rows, rows_of(images.y, s, e_pad),
                                                       pack.get(kOutProj, {g, d_pad, e_pad}), d_pad, context);
        dout_proj = sums.add(*p.out_proj_weight, {g, s.dim, e}, out_proj.values, d_pad, e_pad, out_proj.parts);
        dy = image_of(dy_rows, s, e_pad);
    }
    clear_dropped(mixed, s.batch, drop_path, context);
    const WeightPartials proj = weight_partials(alias(dout_rows, {1, tokens, s.channels_pad}),
                                                alias(mixed, {1, tokens, s.mixed}), context, branch);
    const Tensor dproj = sums.add(p.proj_weight, {1, s.channels * g, p.proj_weight.size(1) / g}, proj.values,
                                  s.channels_pad * g, s.mixed / g, proj.parts);
    mixed = Tensor();

    // From the scan to the image. The scan reads each tile of dy before it writes that of du, which may therefore take
    // its place.
    Tensor du = s.merges ? rows_of(dy, s, e_pad) : empty({g, tokens, e_pad}, type, x);
    Tensor duz = empty({g, tokens, 2 * e_pad}, type, x);
    Tensor dfeatures = empty({g, tokens, s.features_pad}, type, x);
    const Tensor x_proj_weight = pack.get(kXProj, {g, s.features_pad, e_pad});
    if (s.features < s.features_pad &&
        !masks_pads(du, dfeatures, images.u, x_proj_weight)) {  // the scan does not write the padding
        const size_t bytes = static_cast<size_t>(dfeatures.numel()) * dfeatures.element_size();
        check_cuda(cudaMemsetAsync(dfeatures.data_ptr(), 0, bytes, context.stream()), "pads of the features");
    }
    // These views live for this call only: otherwise they would keep du, duz and dfeatures from being freed.
    const ScanParameterGradients scan =
        scan_bwd_into({image_of(du, s, e_pad), image_of(dfeatures, s, s.rank), image_of(dfeatures, s, s.states, s.rank),
                       image_of(dfeatures, s, s.states, s.rank + s.states), image_of(duz, s, e_pad, e_pad)},
                      dy, scan_inputs(pack, s, images, scalars), *images.states, context);
    dy = Tensor(), dmixed = Tensor();
    if (s.gates_scan()) dgate = static_cast<const float*>(scan.dgate.data_ptr());

    const WeightPartials x_proj = token_gemm_bwd(du, true, dfeatures, images.u, x_proj_weight, s.features, context);
    dfeatures = Tensor();
    if (s.gated()) affinity_backward();
    const PartialRows conv =
        conv3x3_bwd_into(image_of(duz, s, e_pad), image_of(du, s, e_pad), image_of(images.uz, s, e_pad),
                         pack.get(kConvWeight, {g, e_pad, 3, 3}), pack.get(kConvBias, {g, e_pad}), kSilu, context);
    du = Tensor();

    const Tensor dxn_rows = empty({g, tokens, d_pad}, type, x);
    const WeightPartials in_proj = token_gemm_bwd(dxn_rows, false, duz, rows_of(images.xn, s, d_pad),
                                                  pack.get(kInProj, {g, 2 * e_pad, d_pad}), 2 * e_pad, context);
    duz = Tensor();

    if (affinity) affinity->join();
    NormPoolGradients norm{image_of(dxn_rows, s, d_pad), dxn, dpooled, std::nullopt, true};
    if (scalars.residual) norm.dx_more = dout, norm.drop_path = drop_path;
    const NormPoolResult normed = layer_norm_pool_bwd(norm, x, p.norm_weight, scalars.eps, context);
    const Shape per_channel{1, 1, s.channels};
    const Tensor dproj_bias = normed.sums_dx_more
                                  ? sums.add_rows(p.proj_bias, per_channel, normed.sums, 2 * s.channels, 1, s.channels)
                                  : sum_of_columns(sums, p.proj_bias, dout_rows, s.channels, dtype, context.stream(),
                                                   drop_path, s.height * s.width);
    const auto of_norm = [&](const Tensor& parameter, int64_t first) {  // the released layer uses its norm twice
        return s.merges ? sums.add_rows(parameter, normed.sums, first, mix, first)
                        : sums.add_rows(parameter, per_channel, normed.sums, first, 1, s.channels);
    };
    const Tensor dnorm_weight = of_norm(p.norm_weight, 0), dnorm_bias = of_norm(p.norm_bias, s.channels);

    const Tensor din_proj =
        sums.add(p.in_proj_weight, {2 * g, e, s.dim}, in_proj.values, e_pad, d_pad, in_proj.parts, 2);
    const Tensor dx_proj =
        sums.add(p.x_proj_weight, {g, s.features, e}, x_proj.values, s.features_pad, e_pad, x_proj.parts);
    // A = -exp(A_log), so dA_log = dA * A.
    const Tensor dA_log =
        sums.add(p.A_log, {g, e, s.states}, scan.dA, e_pad, s.states, 1, 1, pack.get(kA, {g, e_pad, s.states}));
    const auto cropped = [&](const Tensor& parameter, const Tensor& gradient, int64_t row) {
        return e == e_pad ? gradient : sums.add(parameter, {g, e, row}, gradient, e_pad, row);
    };
    const Tensor dconv_weight = sums.add_rows(p.conv_weight, {g, e, 9}, conv, 0, e_pad, 9),
                 dconv_bias = sums.add_rows(p.conv_bias, {g, e, 1}, conv, 9 * g * e_pad, e_pad, 1);
    const Tensor ddt_weight = cropped(p.dt_weight, scan.ddt_weight, s.rank);
    const Tensor ddt_bias = cropped(p.dt_bias, scan.ddt_bias, 1), dD = cropped(p.D, scan.dD, 1);
    const Tensor dout_weight = cropped(p.out_norm_weight, scan.dnorm_weight, 1);
    const Tensor dout_bias = cropped(p.out_norm_bias, scan.dnorm_bias, 1);
    sums.launch(dtype, context.stream());
    const auto or_absent = [&](const OptTensor& t) { return t ? *t : empty_absent(ScalarType::Float, x); };
    return {normed.dx,
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
            or_absent(dout_proj),
            or_absent(dscale),
            dproj,
            dproj_bias};
}

LayerGradients grouped_mamba_layer_bwd(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias,
                                       OptTensor fc1_weight, OptTensor fc1_bias, OptTensor fc2_weight,
                                       OptTensor fc2_bias, Tensor in_proj_weight, Tensor conv_weight, Tensor conv_bias,
                                       Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D,
                                       Tensor out_norm_weight, Tensor out_norm_bias, OptTensor out_proj_weight,
                                       OptTensor skip_scale, Tensor proj_weight, Tensor proj_bias, Tensor saved,
                                       Tensor saved_float, std::vector<int64_t> directions, double eps, double norm_eps,
                                       int64_t chunk, bool residual, OptTensor drop_path_mask, double drop_path_scale) {
    return layer_backward(
        dout, x, {norm_weight,     norm_bias,     fc1_weight,      fc1_bias,   fc2_weight,  fc2_bias, in_proj_weight,
                  conv_weight,     conv_bias,     x_proj_weight,   dt_weight,  dt_bias,     A_log,    D,
                  out_norm_weight, out_norm_bias, out_proj_weight, skip_scale, proj_weight, proj_bias},
        {directions, eps, norm_eps, chunk, residual, drop_path_mask, drop_path_scale}, saved, saved_float);
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("grouped_mamba_layer_bwd", TORCH_BOX(&gm::grouped_mamba_layer_bwd));
}
