// SPDX-License-Identifier: Apache-2.0
// Every op's schema, and nothing else. Image tensors are channels-last with the group as the last dimension but one;
// any strides are accepted. An absent optional input has a gradient of shape (0,). A gradient has the dtype of its
// input; a backward takes some inputs, such as the bias of a norm, for their dtype alone.
//
//   G groups, D channels a group, N states, R low-rank step features, S saved states of a plane: ceil(H * W / chunk),
//   or on CUDA more where tiles of columns are more (scan_saved_states in csrc/cuda/scan/plan.h)
//   u, z, y, x, o     (batch, H, W, G, D)      B, C           (batch, H, W, G, N)
//   dt                (batch, H, W, G, R) with dt_weight (G, D, R), else (batch, H, W, G, D)
//   A                 (G, D, N)                D, dt_bias, norm_weight, norm_bias     (G, D)
//   gate              (batch, G, D)
//   states            (batch, G, S, N, D) in one dimension: state s is h before path token s * chunk. The sm_90 kernels
//                     save h before each part of their tiles, under its number in row-major or column-major order;
//                     some of the S may be unused. One dimension, because a compiler for images of any size asks of
//                     each dimension whether it is 1, which S may be.
//   directions        one code a group: 0 lr (row-major), 1 rl (its reverse), 2 tb (column-major), 3 bt (its reverse)
//   activation        0 none, 1 SiLU, 2 GELU (erf)
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(groupmamba, m) {
    m.def(
        "grouped_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? dt_weight, Tensor? dt_bias, Tensor? z, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, "
        "int[] directions, bool softplus, float norm_eps, int chunk, bool save_states) "
        "-> (Tensor y, Tensor states)");
    m.def(
        "grouped_selective_scan_bwd(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? dt_weight, Tensor? dt_bias, Tensor? z, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, "
        "Tensor states, int[] directions, bool softplus, float norm_eps, int chunk) "
        "-> (Tensor du, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_weight, "
        "Tensor ddt_bias, Tensor dz, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dgate)");

    // u, dy, y (batch, H, W, G, D); K directions, each with its own dt (batch, H, W, G, K, R or D), B and C
    // (batch, H, W, G, K, N), A (G, K, D, N), dt_weight (G, K, D, R), D and dt_bias (G, K, D); y is the sum over K.
    // states, in one dimension: on the CPU (G, batch, K, S, N, D); on CUDA (batch, G, K, S, N, .) for each slice of up
    // to 128 channels, one behind the other, or by the sm_90 kernels (G, batch, slices, K, S, .)
    m.def(
        "cross_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, "
        "Tensor? dt_bias, int[] directions, bool softplus, int chunk, bool save_states) -> (Tensor y, Tensor states)");
    m.def(
        "cross_selective_scan_bwd(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? dt_weight, Tensor? dt_bias, Tensor states, int[] directions, bool softplus, int chunk) "
        "-> (Tensor du, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_weight, Tensor ddt_bias)");

    // weight (G, D, 3, 3), bias (G, D); zero padding of one pixel, cross-correlation
    m.def("depthwise_conv3x3_fwd(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor");
    m.def(
        "depthwise_conv3x3_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int activation) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)");

    // x, xn (batch, H, W, C); weight, bias (C,); pooled (batch, C): mean of xn over H and W, float32 or wider
    m.def("layer_norm_pool_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor xn, Tensor pooled)");
    m.def(
        "layer_norm_pool_bwd(Tensor dxn, Tensor dpooled, Tensor x, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)");

    // LayerNorm over all G * D channels of o * scale * x * gate; x, y (batch, H, W, G * D); scale (1,);
    // gate (batch, G * D); weight, bias (G * D,)
    m.def(
        "modulated_layer_norm_fwd(Tensor o, Tensor x, Tensor scale, Tensor? gate, Tensor weight, Tensor bias, "
        "float eps) -> Tensor");
    m.def(
        "modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x, Tensor scale, Tensor? gate, Tensor weight, "
        "Tensor bias, float eps) -> (Tensor do, Tensor dx, Tensor dscale, Tensor dgate, Tensor dweight, Tensor dbias)");

    // LayerNorm alone, of x + x_bias, on CUDA
    m.def("token_norm_fwd(Tensor x, Tensor? x_bias, Tensor weight, Tensor bias, float eps) -> Tensor");
    m.def(
        "token_norm_bwd(Tensor dy, Tensor x, Tensor? x_bias, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dx_bias)");

    // relu(BatchNorm(x)) with the statistics of the batch, on CUDA; x (batch, H, W, C), C a multiple of 8; stats (3,
    // C), float32: mean, variance by n - 1, 1 / sqrt(variance by n + eps)
    m.def("batch_norm_relu_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor stats)");
    m.def(
        "batch_norm_relu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats, float eps) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)");

    // A BatchNorm of fixed statistics as part of the convolution before it, on CUDA, in the dtype of image, which is
    // not read: weight (O, C, K, K), the others (O,); folded channels-last. blocks: for an image of blocks of 2 x 2
    // pixels, each of C' channels, C rounded up to even; K is then 3, 7, 11, ... and folded (O, 4 C', (K + 1) / 2,
    // (K + 1) / 2).
    m.def(
        "batch_norm_fold(Tensor image, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor mean, "
        "Tensor variance, float eps, bool blocks) -> (Tensor folded, Tensor bias)");

    // An image x (batch, C, H, W), C up to 4, as blocks of 2 x 2 pixels on CUDA, in float16 or bfloat16, with zeros
    // around it as a convolution of kernel_size 3, 7, 11, ..., stride 2 and half of kernel_size as padding needs them:
    // (batch, ceil(H / 2) + k, ceil(W / 2) + k, 4 C'), C' being C rounded up to even, k = (kernel_size - 1) / 2.
    m.def("pixels_to_channels(Tensor x, int kernel_size, bool half) -> Tensor");

    // A dense convolution between few channels, of stride 1, on CUDA of compute capability 9.0, in float16 or bfloat16:
    // x (batch, H, W, C), weight (O, C, K, K), and (C, O, K) one of (32, 32, 3), (16, 32, 4); y (batch, H + 2 padding -
    // K + 1, W + 2 padding - K + 1, O). A gradient that is not needed has shape (0,); dx takes (32, 32, 3).
    m.def("narrow_conv_fwd(Tensor x, Tensor weight, int padding) -> Tensor");
    m.def(
        "narrow_conv_bwd(Tensor dy, Tensor x, Tensor weight, int padding, bool needs_dx, bool needs_dweight) "
        "-> (Tensor dx, Tensor dweight)");
    // relu(conv(x) + bias) without a gradient
    m.def("narrow_conv_relu(Tensor x, Tensor weight, Tensor bias, int padding) -> Tensor");

    // The layer on CUDA, variants released and fused; x (batch, H, W, C), D = C / G channels a group, E scanned ones, N
    // states, R step features; Cp, Dp, Ep, Fp: C, D, E and R + 2 N rounded up to multiples of 8, pads zero; Fp is 4 for
    // R + 2 N up to 4 where Ep is 16 or 32. With
    // out_proj_weight (G, D, E): out = proj(LayerNorm(out_proj(y) * skip_scale * xn * gate)), gate (batch, G, D).
    // Without: out = proj(y), the gate (batch, G, Ep) meets the scan, and there is no o and mixed. Without fc1_weight
    // there is no gate, pooled and hidden. residual: out += x, and with drop_path_mask (batch,), float32, of 0 and 1:
    // out = x + drop_path_mask[image] * drop_path_scale * (the rest), with out_proj_weight. Group-major images
    // are stored (G, batch, H, W, .); T = batch * H * W.
    //   out, dx (batch, H, W, C), pixels Cp apart            xn (batch, H, W, G, Dp) group-major
    //   pooled (batch, C), hidden (batch, C'), states: float32   uz (G, T, 2 Ep), u (G, T, Ep)
    //   features (G, T, Fp): dt, B, C                        y (batch, H, W, G, Ep): group-major with out_proj_weight
    //   o (batch, H, W, G, Dp) group-major                   mixed (batch, H, W, G, Dp)
    // For the backward saved holds, each at a multiple of 128 elements, features, xn, y, u, o and uz, without
    // out_proj_weight features, u, uz, xn and y, and weights and biases of products as these read them, in the dtype of
    // x; saved_float gate, pooled, hidden, states, and the other parameters where they had to be computed or padded
    // (csrc/ops/layer/layout.h). The first op is for where there is no backward, and keeps nothing.
    m.def(
        "grouped_mamba_layer(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? fc1_weight, Tensor? fc1_bias, "
        "Tensor? fc2_weight, Tensor? fc2_bias, Tensor in_proj_weight, Tensor conv_weight, Tensor conv_bias, "
        "Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_norm_weight, "
        "Tensor out_norm_bias, Tensor? out_proj_weight, Tensor? skip_scale, Tensor proj_weight, Tensor proj_bias, "
        "int[] directions, float eps, float norm_eps, int chunk, bool residual, Tensor? drop_path_mask, "
        "float drop_path_scale) -> Tensor");
    m.def(
        "grouped_mamba_layer_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? fc1_weight, "
        "Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, Tensor in_proj_weight, Tensor conv_weight, "
        "Tensor conv_bias, Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, "
        "Tensor out_norm_weight, Tensor out_norm_bias, Tensor? out_proj_weight, Tensor? skip_scale, "
        "Tensor proj_weight, Tensor proj_bias, int[] directions, float eps, float norm_eps, int chunk, bool residual, "
        "Tensor? drop_path_mask, float drop_path_scale) -> (Tensor out, Tensor saved, Tensor saved_float)");
    m.def(
        "grouped_mamba_layer_bwd(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? fc1_weight, "
        "Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, Tensor in_proj_weight, Tensor conv_weight, "
        "Tensor conv_bias, Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, "
        "Tensor out_norm_weight, Tensor out_norm_bias, Tensor? out_proj_weight, Tensor? skip_scale, "
        "Tensor proj_weight, Tensor proj_bias, Tensor saved, Tensor saved_float, int[] directions, float eps, "
        "float norm_eps, int chunk, bool residual, Tensor? drop_path_mask, float drop_path_scale) "
        "-> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dfc1_weight, Tensor dfc1_bias, "
        "Tensor dfc2_weight, Tensor dfc2_bias, Tensor din_proj_weight, Tensor dconv_weight, Tensor dconv_bias, "
        "Tensor dx_proj_weight, Tensor ddt_weight, Tensor ddt_bias, Tensor dA_log, Tensor dD, "
        "Tensor dout_norm_weight, Tensor dout_norm_bias, Tensor dout_proj_weight, Tensor dskip_scale, "
        "Tensor dproj_weight, Tensor dproj_bias)");

    // The feed-forward network on CUDA: [x +] fc2(gelu(conv3x3(fc1(LayerNorm(x))))); x, out, dx and
    // drop_path_mask as above, H hidden channels, Hp rounded up. saved: what the convolution reads, (T, Hp), and
    // weights and biases of fc1 and fc2, each up to a multiple of 128 elements; nothing in 16 bits with up to 192
    // channels.
    m.def(
        "feed_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, "
        "Tensor conv_weight, Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias, float eps, bool residual, "
        "Tensor? drop_path_mask, float drop_path_scale) -> Tensor");
    m.def(
        "feed_forward_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, "
        "Tensor conv_weight, Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias, float eps, bool residual, "
        "Tensor? drop_path_mask, float drop_path_scale) -> (Tensor out, Tensor saved)");
    m.def(
        "feed_forward_bwd(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
        "Tensor fc1_bias, Tensor conv_weight, Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor saved, "
        "float eps, bool residual, Tensor? drop_path_mask, float drop_path_scale) "
        "-> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dfc1_weight, Tensor dfc1_bias, "
        "Tensor dconv_weight, Tensor dconv_bias, Tensor dfc2_weight, Tensor dfc2_bias)");
}
