// SPDX-License-Identifier: Apache-2.0
// The feed-forward network of a block on CUDA as one op: LayerNorm, fc1, depthwise convolution with GELU, fc2, and the
// addition to the residual stream. Where it is faster, one kernel does all of it with the hidden image on the chip
// (cuda/feed_forward/plan.h). Elsewhere that image is written twice, before and after the convolution. The backward
// computes the second and the normed image again, and the first where it was not kept (keeps_hidden in layout.h).
#include "cuda/feed_forward/launch.h"
#include "host/blas.h"
#include "host/branch.h"
#include "host/explain.h"
#include "host/workspace.h"
#include "ops/entries_cuda.h"
#include "ops/layer/drop_path.h"
#include "ops/layer/layout.h"
#include "ops/layer/parameter_pack.h"
#include "ops/layer/token_sums.h"

namespace gm {
namespace {

enum Packed { kFc1, kFc1Bias, kConv, kConvBias, kFc2, kFc2Bias };

struct FeedForwardParameters {
    Tensor fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias;
};

struct FeedForwardSizes {
    int64_t batch, height, width, channels, channels_pad, hidden, hidden_pad;
    int64_t tokens() const { return batch * height * width; }
    Shape image(int64_t width_of_pixel) const { return {batch, height, width, 1, width_of_pixel}; }
};

FeedForwardSizes feed_forward_sizes(const Tensor& x, const FeedForwardParameters& p) {
    GM_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, H, W, C) with elements, got ", show(shape_of(x)));
    GM_CHECK(p.fc1_weight.dim() == 2 && p.fc1_weight.size(0) >= 1, "fc1_weight must be (hidden, C), got ",
             show(shape_of(p.fc1_weight)));
    FeedForwardSizes s{x.size(0), x.size(1), x.size(2), x.size(3), 0, p.fc1_weight.size(0), 0};
    s.channels_pad = round_up(s.channels, kPixelUnit), s.hidden_pad = round_up(s.hidden, kPixelUnit);
    check_parameter(p.fc1_weight, "fc1_weight", {s.hidden, s.channels}, x);
    check_parameter(p.fc1_bias, "fc1_bias", {s.hidden}, x);
    check_parameter(p.conv_weight, "conv_weight", {s.hidden, 1, 3, 3}, x);
    check_parameter(p.conv_bias, "conv_bias", {s.hidden}, x);
    check_parameter(p.fc2_weight, "fc2_weight", {s.channels, s.hidden}, x);
    check_parameter(p.fc2_bias, "fc2_bias", {s.channels}, x);
    return s;
}

// The one kernel reads the taps of a channel as three rows of four in the dtype of the images, and vectors that are
// whole blocks of channels long.
ParameterPack feed_forward_pack(const FeedForwardParameters& p, const FeedForwardSizes& s, ScalarType dtype,
                                Workspace& workspace, bool one_kernel = false, KeptParameters kept = {}) {
    ParameterPack pack(dtype, workspace, std::move(kept));
    const bool pads = s.hidden != s.hidden_pad;
    const auto per_channel = [&](const Tensor& t, int64_t row) {
        pack.add(t, {1, s.hidden, row}, s.hidden_pad, row, pads ? ScalarType::Float : t.scalar_type());
    };
    pack.add(p.fc1_weight, {1, s.hidden, s.channels}, s.hidden_pad, s.channels_pad, dtype);
    const int64_t vector = one_kernel ? round_up(s.hidden, kFeedForwardBlock) : s.hidden_pad;
    pack.add(p.fc1_bias, {1, 1, s.hidden}, 1, vector, dtype);
    if (one_kernel) {
        pack.add(p.conv_weight, {1, 3 * s.hidden, 3}, 3 * vector, 4, dtype);
        pack.add(p.conv_bias, {1, 1, s.hidden}, 1, vector, ScalarType::Float);
    } else {
        per_channel(p.conv_weight, 9), per_channel(p.conv_bias, 1);
    }
    pack.add(p.fc2_weight, {1, s.channels, s.hidden}, s.channels_pad, s.hidden_pad, dtype);
    pack.add(p.fc2_bias, {1, 1, s.channels}, 1, s.channels_pad, dtype);
    return pack;
}

// Of what feed_forward_pack adds. Taps and biases of the convolution are used as they are, unless they are padded.
KeptParameters kept_parameters(const FeedForwardPlaces& p, const Workspace& workspace, bool written) {
    return {&workspace, {p.fc1_weight, p.fc1_bias, std::nullopt, std::nullopt, p.fc2_weight, p.fc2_bias}, written};
}

struct FeedForward {
    Tensor out;
    Tensor saved;  // what the backward reads, perhaps nothing
};

#if GM_WITH_SM90A
// True where all are aligned as TMA needs it, which reads them in place.
bool tma_reads(std::initializer_list<const Tensor*> tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const Tensor* t) { return reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0; });
}
#endif

// Why the one kernel does not take x and the parameters, or is not the faster way; null where it does and is.
const char* why_not_one_kernel(const Tensor& x, const FeedForwardParameters& p, const FeedForwardSizes& s,
                               DType dtype) {
#if GM_WITH_SM90A
    if (std::max({s.height * s.width, s.channels, s.hidden * 12}) > INT32_MAX / 2) return "the image is too large";
    const char* const shape = why_not_feed_forward(s.batch, static_cast<int>(s.height), static_cast<int>(s.width),
                                                   static_cast<int>(s.channels), static_cast<int>(s.hidden), dtype);
    if (shape != nullptr) return shape;
    if (!tma_reads({&p.fc1_weight, &p.fc1_bias, &p.conv_bias, &p.fc2_weight}))
        return "a parameter is not aligned to 16 bytes";
    if (!is_canonical_image(x)) return "no one stride walks the pixels of x";
    const ImageArg image = image_arg(x);
    if (!allows_vectors(image, static_cast<int64_t>(x.element_size()), 8) || image.token <= 0 ||
        (image.batch <= 0 && s.batch != 1))
        return "the pixels of x are not aligned to 16 bytes";
    return has_feed_forward_sm90a() ? nullptr : "the GPU is not of compute capability 9.0";
#else
    static_cast<void>(x), static_cast<void>(p), static_cast<void>(s), static_cast<void>(dtype);
    return "this build has no code for compute capability 9.0";
#endif
}

FeedForward one_kernel_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                               const FeedForwardParameters& p, const FeedForwardSizes& s, double eps, bool residual,
                               const DropPathArg& drop_path, const CudaContext& context) {
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    Workspace scratch(type);
    ParameterPack pack = feed_forward_pack(p, s, type, scratch, true);
    scratch.allocate(x);
    const Tensor out = empty_padded_image(s.batch, s.height, s.width, s.channels, x);
    pack.prepare();
    pack.launch(dtype, context.stream());

    ParamHolder param;
    FeedForwardArgs args;
    args.batch = s.batch, args.height = static_cast<int>(s.height), args.width = static_cast<int>(s.width);
    args.channels = static_cast<int>(s.channels), args.hidden_pad = static_cast<int>(s.hidden_pad);
    args.plan = feed_forward_plan(s.batch, args.height, args.width, args.channels, static_cast<int>(s.hidden));
    args.x = image_arg(x), args.out = image_arg(out);
    args.residual = residual, args.drop_path = drop_path, args.eps = static_cast<float>(eps);
    args.norm_weight = param(norm_weight), args.norm_bias = param(norm_bias), args.fc2_bias = param(p.fc2_bias);
    args.fc1_weight = pack.get(kFc1, {s.hidden_pad, s.channels_pad}).data_ptr();
    const int64_t vector = round_up(s.hidden, kFeedForwardBlock);
    args.fc1_bias = pack.get(kFc1Bias, {vector}).data_ptr();
    args.conv_weight = pack.get(kConv, {vector, 12}).data_ptr();
    args.conv_bias = static_cast<const float*>(pack.get(kConvBias, {vector}).data_ptr());
    args.fc2_weight = pack.get(kFc2, {s.channels_pad, s.hidden_pad}).data_ptr();
#if GM_WITH_SM90A
    check_cuda(launch_feed_forward_sm90a(args, dtype, context.stream()), "feed-forward");
#endif
    return {out, empty_absent(type, x)};
}

// Why dhidden and the activated image of the backward do not come from one kernel, which computes the hidden image and
// the gradient of the activated one where it needs them; null where they do.
const char* why_not_one_backward(const FeedForwardSizes& s, DType dtype, bool float_taps,
                                 std::initializer_list<const Tensor*> read_by_tma) {
#if GM_WITH_SM90A
    if (std::max({s.height * s.width, s.channels, s.hidden}) > INT32_MAX / 2) return "the image is too large";
    if (s.channels > kFeedForwardBwdChannels) return "there are more than 64 channels";
    const ConvSm90Plan plan = conv_sm90_plan(s.batch, static_cast<int>(s.height), static_cast<int>(s.width), 1,
                                             static_cast<int>(s.hidden_pad), true);
    if (const char* const why_not = why_not_conv_sm90(plan, dtype)) return why_not;
    if (plan.octets != kConvSm90Warps) return "blocks of 64 hidden channels would fill badly";
    if (dtype == DType::kHalf && float_taps) return "weights are float32, as padded ones are, beside images of float16";
    if (!tma_reads(read_by_tma)) return "dout or a parameter is not aligned to 16 bytes";
    return has_feed_forward_sm90a() ? nullptr : "the GPU is not of compute capability 9.0";
#else
    static_cast<void>(s), static_cast<void>(dtype), static_cast<void>(float_taps), static_cast<void>(read_by_tma);
    return "this build has no code for compute capability 9.0";
#endif
}

// Writes both; the sums are those of conv3x3_bwd_into. `args` has all but `conv`.
PartialRows one_kernel_backward(FeedForwardBwdArgs args, const Tensor& dhidden, const Tensor& activated,
                                const Tensor& taps, const Tensor& biases, const DropPathArg& drop_path,
                                const CudaContext& context) {
    ConvBwdArgs& conv = args.conv;
    ConvShape& shape = conv.shape;
    shape.batch = dhidden.size(0), shape.height = static_cast<int>(dhidden.size(1)),
    shape.width = static_cast<int>(dhidden.size(2)), shape.groups = 1, shape.dim = static_cast<int>(dhidden.size(4));
    shape.activation = Activation::kGelu;
    conv.sm90 = conv_sm90_plan(shape.batch, shape.height, shape.width, 1, shape.dim, true);
    conv.dx = image_arg(dhidden), conv.y = image_arg(activated);
    ParamHolder param;
    conv.weight = param(taps), conv.bias = param(biases), conv.drop_path = drop_path;
    ++conv.sums;  // of dhidden too
    const PartialRows sums = partial_rows(conv.sm90.partial_rows, int64_t{shape.dim} * conv.sums, dhidden);
    conv.partials = static_cast<float*>(sums.values.data_ptr());
#if GM_WITH_SM90A
    check_cuda(launch_feed_forward_bwd_sm90a(args, dtype_of(dhidden), context.stream()), "feed-forward backward");
#endif
    return sums;
}

FeedForward feed_forward_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                 const FeedForwardParameters& p, double eps, bool residual,
                                 const OptTensor& drop_path_mask, double drop_path_scale, bool save) {
    const FeedForwardSizes s = feed_forward_sizes(x, p);
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.tokens();
    const DropPathArg drop_path = drop_path_arg(drop_path_mask, drop_path_scale, residual, s.batch, x);
    check_parameter(norm_weight, "norm_weight", {s.channels}, x);
    check_parameter(norm_bias, "norm_bias", {s.channels}, x);
    const char* const why_not = why_not_one_kernel(x, p, s, dtype);
    note("feed_forward forward: ", why_not == nullptr ? "one kernel" : "several kernels, not one: ",
         why_not == nullptr ? "" : why_not);
    if (why_not == nullptr)
        return one_kernel_forward(x, norm_weight, norm_bias, p, s, eps, residual, drop_path, context);
    Workspace scratch(type), saved(type);
    const bool keeps = save && keeps_hidden(s.channels, type != ScalarType::Float);
    Workspace& held = keeps ? saved : scratch;
    FeedForwardPlaces places;
    if (keeps) places = reserve_feed_forward(tokens, s.channels, s.hidden, saved);
    ParameterPack pack =
        feed_forward_pack(p, s, type, scratch, false, keeps ? kept_parameters(places, saved, false) : KeptParameters{});
    // Nothing reads xn any more when the convolution runs.
    const Workspace::Piece hidden_place = keeps ? places.hidden : scratch.reserve_image(tokens * s.hidden_pad);
    const Workspace::Piece place = scratch.reserve_image(tokens * std::max(s.channels_pad, s.hidden_pad));
    scratch.allocate(x), saved.allocate(x);
    const Tensor out = empty_padded_image(s.batch, s.height, s.width, s.channels, x);
    pack.prepare();
    Branch packing(context);
    pack.launch(dtype, packing.stream());

    NormPoolInputs norm{x, norm_weight, norm_bias, eps};
    if (residual) norm.sum = out, norm.sum_bias = p.fc2_bias, norm.drop_path = drop_path;
    layer_norm_pool_fwd_into(scratch.get(place, s.image(s.channels_pad)), norm, context);
    packing.join();
    const Tensor hidden = held.get(hidden_place, {tokens, s.hidden_pad});
    matmul_bias_out(hidden, pack.get(kFc1Bias, {s.hidden_pad}), scratch.get(place, {tokens, s.channels_pad}),
                    pack.get_transposed(kFc1, {s.hidden_pad, s.channels_pad}), context);
    const Tensor activated = scratch.get(place, {tokens, s.hidden_pad});
    const Shape image = s.image(s.hidden_pad);
    depthwise_conv3x3_fwd_into(alias(activated, image), alias(hidden, image), pack.get(kConv, {1, s.hidden_pad, 3, 3}),
                               pack.get(kConvBias, {1, s.hidden_pad}), kGelu, context, drop_path);
    const Tensor out_rows = alias(out, {tokens, s.channels_pad});
    const Tensor fc2 = pack.get_transposed(kFc2, {s.channels_pad, s.hidden_pad});
    if (residual) {
        matmul_out(out_rows, activated, fc2, context, drop_path_scale, true);
    } else {
        matmul_bias_out(out_rows, pack.get(kFc2Bias, {s.channels_pad}), activated, fc2, context);
    }
    return {out, keeps ? saved.images() : empty_absent(type, x)};
}

// With kSave groupmamba::feed_forward_fwd, without groupmamba::feed_forward.
template <bool kSave>
std::conditional_t<kSave, std::tuple<Tensor, Tensor>, Tensor> feed_forward(
    Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor conv_weight,
    Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias, double eps, bool residual, OptTensor drop_path_mask,
    double drop_path_scale) {
    const FeedForward done = feed_forward_forward(x, norm_weight, norm_bias,
                                                  {fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias},
                                                  eps, residual, drop_path_mask, drop_path_scale, kSave);
    if constexpr (kSave) {
        return {done.out, done.saved};
    } else {
        return done.out;
    }
}

using FeedForwardGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FeedForwardGradients feed_forward_bwd(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,
                                      Tensor fc1_bias, Tensor conv_weight, Tensor conv_bias, Tensor fc2_weight,
                                      Tensor fc2_bias, Tensor saved, double eps, bool residual,
                                      OptTensor drop_path_mask, double drop_path_scale) {
    const FeedForwardParameters parameters{fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias};
    const FeedForwardSizes s = feed_forward_sizes(x, parameters);
    check_image(dout, "dout", shape_of(x), x);
    dout = canonical_image(dout);  // it is read twice
    const DType dtype = dtype_of(x);
    const ScalarType type = x.scalar_type();
    const CudaContext context(x);
    const int64_t tokens = s.tokens();
    const DropPathArg drop_path = drop_path_arg(drop_path_mask, drop_path_scale, residual, s.batch, x);
    Workspace held(type), scratch(type);
    const bool kept = keeps_hidden(s.channels, type != ScalarType::Float);
    FeedForwardPlaces places;
    if (kept) places = reserve_feed_forward(tokens, s.channels, s.hidden, held);
    held.adopt_images(saved, x);
    ParameterPack pack = feed_forward_pack(parameters, s, type, scratch, false,
                                           kept ? kept_parameters(places, held, true) : KeptParameters{});
    scratch.allocate(x);
    pack.prepare();
    pack.launch(dtype, context.stream());
    const Tensor xn = empty({tokens, s.channels_pad}, type, x);
    if (!kept) {
        const NormPoolInputs norm{x, norm_weight, norm_bias, eps};
        layer_norm_pool_fwd_into(alias(xn, s.image(s.channels_pad)), norm, context);
    }
    ParameterSums sums;
    const auto as_batch = [](const Tensor& rows) { return alias(rows, {1, rows.size(0), rows.size(1)}); };

    const PaddedRows dout_padded(dout, context);
    const Tensor dout_rows = dout_padded.rows();
    const Shape image = s.image(s.hidden_pad);
    const Tensor conv_taps = pack.get(kConv, {1, s.hidden_pad, 3, 3}),
                 conv_biases = pack.get(kConvBias, {1, s.hidden_pad});
    Tensor dhidden = empty({tokens, s.hidden_pad}, type, x), activated = empty({tokens, s.hidden_pad}, type, x);
    const Tensor fc1_rows = pack.get(kFc1, {s.hidden_pad, s.channels_pad}),
                 fc2_rows = pack.get(kFc2, {s.channels_pad, s.hidden_pad});
    const char* const why_not =
        kept ? "the hidden image is kept from the forward"
             : why_not_one_backward(s, dtype, is_float(conv_taps), {&dout_rows, &fc1_rows, &fc2_rows});
    note("feed_forward backward: ", why_not == nullptr ? "the hidden image on the chip" : "several kernels, not one: ",
         why_not == nullptr ? "" : why_not);
    PartialRows conv;
    if (why_not == nullptr) {
        FeedForwardBwdArgs args;
        args.channels = static_cast<int>(s.channels_pad), args.scale = static_cast<float>(drop_path_scale);
        args.xn = xn.data_ptr(), args.dout = dout_rows.data_ptr();
        args.fc1_weight = fc1_rows.data_ptr(), args.fc2_weight = fc2_rows.data_ptr();
        args.fc1_bias = pack.get(kFc1Bias, {s.hidden_pad}).data_ptr();
        conv = one_kernel_backward(args, alias(dhidden, image), alias(activated, image), conv_taps, conv_biases,
                                   drop_path, context);
    } else {
        Tensor hidden;
        if (kept) {
            hidden = held.get(places.hidden, {tokens, s.hidden_pad});
        } else {
            hidden = empty({tokens, s.hidden_pad}, type, x);
            matmul_bias_out(hidden, pack.get(kFc1Bias, {s.hidden_pad}), xn,
                            pack.get_transposed(kFc1, {s.hidden_pad, s.channels_pad}), context);
        }
        const Tensor dactivated = empty({tokens, s.hidden_pad}, type, x);
        matmul_out(dactivated, dout_rows, fc2_rows, context, drop_path_scale);
        conv = conv3x3_bwd_into(alias(dhidden, image), alias(dactivated, image), alias(hidden, image), conv_taps,
                                conv_biases, kGelu, context, alias(activated, image), true, drop_path);
    }
    const WeightPartials fc2 = weight_partials(as_batch(dout_rows), as_batch(activated), context, drop_path_scale);
    activated = Tensor();
    const Tensor dfc2_weight =
        sums.add(fc2_weight, {1, s.channels, s.hidden}, fc2.values, s.channels_pad, s.hidden_pad, fc2.parts);
    const auto of_conv = [&](const Tensor& parameter, int64_t row, int64_t first) {
        return sums.add_rows(parameter, {1, s.hidden, row}, conv, first * s.hidden_pad, s.hidden_pad, row);
    };
    const Tensor dconv_weight = of_conv(conv_weight, 9, 0), dconv_bias = of_conv(conv_bias, 1, 9);
    const Tensor dfc1_bias = of_conv(fc1_bias, 1, 10);  // sums of dhidden
    const Tensor dxn = empty({tokens, s.channels_pad}, type, x);
    matmul_out(dxn, dhidden, fc1_rows, context);
    NormPoolGradients norm{alias(dxn, s.image(s.channels_pad)), std::nullopt, std::nullopt, std::nullopt, true};
    if (kept) norm.xn = alias(xn, s.image(s.channels_pad)), norm.bias = norm_bias;
    if (residual) norm.dx_more = dout, norm.drop_path = drop_path;
    const NormPoolResult normed = layer_norm_pool_bwd(norm, x, norm_weight, eps, context);
    const WeightPartials fc1 = weight_partials(as_batch(dhidden), as_batch(xn), context);
    dhidden = Tensor();
    const Tensor dfc1_weight =
        sums.add(fc1_weight, {1, s.hidden, s.channels}, fc1.values, s.hidden_pad, s.channels_pad, fc1.parts);
    const Tensor dnorm_weight = sums.add_rows(norm_weight, {1, 1, s.channels}, normed.sums, 0, 1, s.channels);
    const Tensor dnorm_bias = sums.add_rows(norm_bias, {1, 1, s.channels}, normed.sums, s.channels, 1, s.channels);
    const Tensor dfc2_bias =
        normed.sums_dx_more ? sums.add_rows(fc2_bias, {1, 1, s.channels}, normed.sums, 2 * s.channels, 1, s.channels)
                            : sum_of_columns(sums, fc2_bias, dout_rows, s.channels, dtype, context.stream(), drop_path,
                                             s.height * s.width);
    sums.launch(dtype, context.stream());
    return {normed.dx,    dnorm_weight, dnorm_bias,  dfc1_weight, dfc1_bias,
            dconv_weight, dconv_bias,   dfc2_weight, dfc2_bias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("feed_forward", TORCH_BOX(&gm::feed_forward<false>));
    m.impl("feed_forward_fwd", TORCH_BOX(&gm::feed_forward<true>));
    m.impl("feed_forward_bwd", TORCH_BOX(&gm::feed_forward_bwd));
}
