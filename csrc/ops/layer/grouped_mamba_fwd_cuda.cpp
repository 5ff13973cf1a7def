// SPDX-License-Identifier: Apache-2.0
// The GroupMamba layer on CUDA as one op. It queues the kernels of the other ops and matrix products from one
// call, so that a small layer does not wait for the host. Its backward is in grouped_mamba_bwd_cuda.cpp.
#include "cuda/channel_affinity/launch.h"
#include "host/blas.h"
#include "host/branch.h"
#include "ops/layer/drop_path.h"
#include "ops/layer/grouped_mamba.h"
#include "ops/layer/token_gemm.h"

namespace gm {
namespace {

struct LayerForward {
    Tensor out;
    Workspace saved;  // what the backward reads; without `save` empty
};

LayerForward layer_forward(const Tensor& x, const LayerParameters& p, const LayerScalars& scalars, bool save) {
    const LayerSizes s = layer_sizes(x, p, scalars.chunk);
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.tokens();
    const DropPathArg drop_path = layer_drop_path(x, s, scalars);

    Workspace scratch(type), saved(type);
    Workspace& held = save ? saved : scratch;
    const LayerPlaces places = reserve_layer(s, save, held);
    KeptParameters kept;
    if (save) kept = {&saved, {places.parameters.begin(), places.parameters.end()}, false};
    ParameterPack pack = layer_pack(p, s, type, scratch, std::move(kept));
    const int64_t strips = norm_strips(s.batch, s.height * s.width, s.groups, s.dim_pad);
    Workspace::Piece sums, mixed;
    if (save && s.merges) mixed = scratch.reserve_image(tokens * s.mixed);
    if (s.gated()) sums = scratch.reserve_float(s.batch * strips * s.channels);
    scratch.allocate(x), saved.allocate(x);
    LayerImages images = layer_images(s, places, save, held);
    if (save && s.merges) images.mixed = scratch.get(mixed, {s.batch, s.height, s.width, s.groups, s.dim_pad});
    const Tensor out = empty_padded_image(s.batch, s.height, s.width, s.channels, x);
    pack.prepare();
    ScanForward scan(images.y, images.states, scan_inputs(pack, s, images, scalars), context);
    const Tensor out_rows = alias(out, {tokens, s.channels_pad});
    const Tensor mixed_rows = alias(s.merges ? images.mixed : images.y, {tokens, s.mixed});
    const Tensor proj = pack.get(kProj, {s.channels_pad, s.mixed}), proj_bias = pack.get(kProjBias, {s.channels_pad});
    // The last product adds x and the bias itself, or adds to both, which the norm then writes as it reads x.
    const bool ends_with_x =
        scalars.residual && drop_path.mask == nullptr && takes_residual(out_rows, proj_bias, x, mixed_rows, proj);
    Branch packing(context);
    pack.launch(dtype, packing.stream());

    NormPoolInputs norm{x, p.norm_weight, p.norm_bias, scalars.eps};
    if (s.gated()) norm.partials = scratch.get(sums, {s.batch, strips, s.channels});
    if (scalars.residual && !ends_with_x) norm.sum = out, norm.sum_bias = p.proj_bias, norm.drop_path = drop_path;
    norm.inter_block_state = scan.inter_block_state_to_clear();
    layer_norm_pool_fwd_into(images.xn, norm, context);
    packing.join();
    std::optional<Branch> affinity;
    ParamHolder affinity_parameters;
    const auto fork_affinity = [&] {
        AffinityArgs args = affinity_args(p, s, images, affinity_parameters);
        args.partials = static_cast<const float*>(norm.partials->data_ptr());
        args.strips = static_cast<int>(strips), args.factor = 1.f / static_cast<float>(s.height * s.width);
        affinity.emplace(context);
        check_cuda(launch_channel_affinity_fwd(args, dtype, affinity->stream()), "channel affinity");
    };
    // Channel affinity runs beside x_proj and the scan, or, where the scan reads the gate, beside the convolution:
    // there T evaluates 0.5% slower, and beside in_proj, if that is a kernel of ours, which has as many blocks as run
    // at once. cuBLAS' product starts a few microseconds later than they do, and affinity is done by then.
    const Tensor xn_rows = rows_of(images.xn, s, s.dim_pad);
    const Tensor in_proj = pack.get(kInProj, {s.groups, 2 * s.inner_pad, s.dim_pad});
    enum { kBesideInProj, kBesideConv, kBesideScan } place = kBesideInProj;
    if (has_own_gemm(images.uz, xn_rows, in_proj)) place = s.gates_scan() ? kBesideConv : kBesideScan;
    if (s.gated() && place == kBesideInProj) fork_affinity();
    token_gemm(images.uz, xn_rows, in_proj, context);
    if (s.gated() && place == kBesideConv) fork_affinity();
    depthwise_conv3x3_fwd_into(image_of(images.u, s, s.inner_pad), image_of(images.uz, s, s.inner_pad),
                               pack.get(kConvWeight, {s.groups, s.inner_pad, 3, 3}),
                               pack.get(kConvBias, {s.groups, s.inner_pad}), kSilu, context);
    if (s.gated() && place == kBesideScan) fork_affinity();
    token_gemm(images.features, images.u, pack.get(kXProj, {s.groups, s.features_pad, s.inner_pad}), context);
    if (s.gates_scan()) affinity->join();
    scan.launch();

    if (s.merges) {
        const Tensor o_rows = rows_of(images.o, s, s.dim_pad), y_rows = rows_of(images.y, s, s.inner_pad);
        const Tensor out_proj = pack.get(kOutProj, {s.groups, s.dim_pad, s.inner_pad});
        // A kernel that joins two branches cannot use programmatic dependent launch; cuBLAS' never do.
        const bool join_late = has_own_gemm(o_rows, y_rows, out_proj);
        if (affinity && !join_late) affinity->join();
        token_gemm(o_rows, y_rows, out_proj, context);
        if (affinity && join_late) affinity->join();
        OptTensor gate;
        if (s.gated()) gate = alias(*images.gate, {s.batch, s.channels});
        modulated_layer_norm_fwd_into(images.mixed, images.o, images.xn, *p.skip_scale, gate, p.norm_weight,
                                      p.norm_bias, scalars.eps, context, drop_path);
    }
    const bool adds = scalars.residual && !ends_with_x;
    token_gemm_onto(out_rows, scalars.drop_path_scale, adds ? std::nullopt : OptTensor(proj_bias),
                    ends_with_x ? OptTensor(x) : std::nullopt, mixed_rows, proj, context);
    return {out, saved};
}

// With kSave groupmamba::grouped_mamba_layer_fwd, without groupmamba::grouped_mamba_layer.
template <bool kSave>
std::conditional_t<kSave, std::tuple<Tensor, Tensor, Tensor>, Tensor> grouped_mamba_layer(
    Tensor x, Tensor norm_weight, Tensor norm_bias, OptTensor fc1_weight, OptTensor fc1_bias, OptTensor fc2_weight,
    OptTensor fc2_bias, Tensor in_proj_weight, Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight,
    Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_norm_weight, Tensor out_norm_bias,
    OptTensor out_proj_weight, OptTensor skip_scale, Tensor proj_weight, Tensor proj_bias,
    std::vector<int64_t> directions, double eps, double norm_eps, int64_t chunk, bool residual,
    OptTensor drop_path_mask, double drop_path_scale) {
    const LayerForward done = layer_forward(
        x, {norm_weight,     norm_bias,     fc1_weight,      fc1_bias,   fc2_weight,  fc2_bias, in_proj_weight,
            conv_weight,     conv_bias,     x_proj_weight,   dt_weight,  dt_bias,     A_log,    D,
            out_norm_weight, out_norm_bias, out_proj_weight, skip_scale, proj_weight, proj_bias},
        {directions, eps, norm_eps, chunk, residual, drop_path_mask, drop_path_scale}, kSave);
    if constexpr (kSave) {
        return {done.out, done.saved.images(), done.saved.floats()};
    } else {
        return done.out;
    }
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("grouped_mamba_layer", TORCH_BOX(&gm::grouped_mamba_layer<false>));
    m.impl("grouped_mamba_layer_fwd", TORCH_BOX(&gm::grouped_mamba_layer<true>));
}
