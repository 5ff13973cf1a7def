// SPDX-License-Identifier: Apache-2.0
// The CUDA entries that the layer's own entry calls without the dispatcher; each is defined in the file of its op.
// The _into forms write given images.
#pragma once

#include <tuple>
#include <vector>

#include "host/tensor.h"

namespace gm {

// With groups the result is an image (batch, H, W, groups, width), group-major, zeros behind the channels of a group;
// without (0), (batch, H, W, C).
struct NormPoolInputs {
    Tensor x, weight, bias;
    double eps = 0;
    int64_t groups = 0, width = 0;
    enum Pooling { kNone, kPartial, kWhole } pooling = kWhole;
    OptTensor sum{}, sum_bias{};  // sum, (batch, H, W, C), becomes x + sum_bias
};
// The second result: the mean over each image (batch, C), sums over its strips (batch, strips, C), or (0,).
std::tuple<Tensor, Tensor> layer_norm_pool_fwd(NormPoolInputs in);
// dx: dense, or padded (see empty_padded_image) as dx_more may be, which is added to it.
struct NormPoolGradients {
    Tensor dxn;
    OptTensor dxn_more{}, dpooled{}, dx_more{};
    bool padded = false;
};
struct NormPoolResult {
    Tensor dx, dweight, dbias;
    OptTensor dx_more_sum;  // (C,), over all pixels, float32; where the kernel has registers for it
};
NormPoolResult layer_norm_pool_bwd(NormPoolGradients gradients, Tensor x, Tensor weight, double eps);

// With a width the result is (batch, H, W, G, width), zeros behind the channels of a group; so may be o, x and the
// gradients.
Tensor modulated_layer_norm_fwd(Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight, Tensor bias,
                                double eps, int64_t width);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x,
                                                                                    Tensor scale, OptTensor gate,
                                                                                    Tensor weight, double eps);

Tensor depthwise_conv3x3_fwd(Tensor x, Tensor weight, OptTensor bias, int64_t activation);
struct ConvGradients {
    Tensor dweight, dbias;
    OptTensor dx_sum;  // (G * D,) float32
};
// Writes dx, and into y, if given, what the forward returned.
ConvGradients conv3x3_bwd_into(const Tensor& dx, Tensor dy, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                               const OptTensor& y = std::nullopt, bool sum_dx = false);

// norm_dim: channels that LayerNorm counts, 0 for D. Where it is less than D, the images are 0 in the channels behind
// it, and so are dt_weight, dt_bias, D, norm_weight, norm_bias and gate; gradients hold anything finite there.
struct ScanInputs {
    Tensor u, dt, A, B, C;
    OptTensor D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate;
    std::vector<int64_t> directions;
    bool softplus = true;
    double norm_eps = 1e-5;
    int64_t norm_dim = 0, chunk = 0;
};
struct ScanImageGradients {
    Tensor du, ddt, dB, dC;
    OptTensor dz;
};
struct ScanParameterGradients {
    Tensor dA, dD, ddt_weight, ddt_bias, dnorm_weight, dnorm_bias, dgate;
};
// Writes y; returns the states, (0,) without save_states.
Tensor scan_fwd_into(const Tensor& y, ScanInputs inputs, bool save_states);
ScanParameterGradients scan_bwd_into(const ScanImageGradients& gradients, Tensor dy, ScanInputs inputs, Tensor states);

}  // namespace gm
