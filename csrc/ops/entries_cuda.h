// SPDX-License-Identifier: Apache-2.0
// The CUDA entries that the layers' own entries call without the dispatcher, in a context of the caller's; each is
// defined in the file of its op. The _into forms write given images.
#pragma once

#include <tuple>
#include <vector>

#include "host/stream.h"
#include "host/tensor.h"

namespace gm {

struct NormPoolInputs {
    Tensor x, weight, bias;
    double eps = 0;
    OptTensor partials{};         // (batch, strips, C) float32: becomes the sums over the strips of each image
    OptTensor sum{}, sum_bias{};  // sum, (batch, H, W, C), becomes x + sum_bias
};
// Writes xn: (batch, H, W, C), or (batch, H, W, groups, width) with zeros behind the channels of a group.
void layer_norm_pool_fwd_into(const Tensor& xn, NormPoolInputs in, const CudaContext& context);
// Strips of an image of `tokens` tokens, each of `groups` runs of `width` channels and pads.
int64_t norm_strips(int64_t batch, int64_t tokens, int64_t groups, int64_t width);
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
NormPoolResult layer_norm_pool_bwd(NormPoolGradients gradients, Tensor x, Tensor weight, double eps,
                                   const CudaContext& context);

// Any of the images may be (batch, H, W, G, width), zeros behind the channels of a group.
void modulated_layer_norm_fwd_into(const Tensor& y, Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight,
                                   Tensor bias, double eps, const CudaContext& context);
using ModulatedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
ModulatedGradients modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight,
                                            double eps, const CudaContext& context);

constexpr int64_t kSilu = 1, kGelu = 2;  // codes of csrc/schemas.cpp
void depthwise_conv3x3_fwd_into(const Tensor& y, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                                const CudaContext& context);
struct ConvGradients {
    Tensor dweight, dbias;
    OptTensor dx_sum;  // (G * D,) float32
};
// Writes dx, and into y, if given, what the forward returned.
ConvGradients conv3x3_bwd_into(const Tensor& dx, Tensor dy, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                               const CudaContext& context, const OptTensor& y = std::nullopt, bool sum_dx = false);

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
// Writes y and, if given, the states.
void scan_fwd_into(const Tensor& y, const OptTensor& states, ScanInputs inputs, const CudaContext& context);
ScanParameterGradients scan_bwd_into(const ScanImageGradients& gradients, Tensor dy, ScanInputs inputs, Tensor states,
                                     const CudaContext& context);

}  // namespace gm
