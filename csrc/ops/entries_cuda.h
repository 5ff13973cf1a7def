// SPDX-License-Identifier: Apache-2.0
// CUDA entries that the entries of whole layers call without the dispatcher, in the caller's context; each is defined
// in the file of its op. The _into forms write images that are given.
#pragma once

#include <memory>
#include <tuple>
#include <vector>

#include "cuda/common/args.h"
#include "host/stream.h"
#include "host/tensor.h"

namespace gm {

// Partial sums (rows, columns), float32, which the caller adds up by reduce_rows or in ParameterSums.
struct PartialRows {
    Tensor values;
    int64_t rows = 0, columns = 0;
    const float* column(int64_t first) const { return static_cast<const float*>(values.data_ptr()) + first; }
};
inline PartialRows partial_rows(int64_t rows, int64_t columns, const Tensor& device_of) {
    return {empty({rows, columns}, ScalarType::Float, device_of), rows, columns};
}
// Adds them up, or the rows of each of `segments` images. The columns from `first` on belong to the targets one after
// another, each (segments, ...).
void reduce_rows(const PartialRows& partials, int64_t first, int64_t segments, const std::vector<Tensor>& targets,
                 DType dtype, const CudaContext& context, float factor = 1.f);

struct NormPoolInputs {
    Tensor x, weight, bias;
    double eps = 0;
    OptTensor partials{};         // (batch, strips, C) float32: becomes the sums over the strips of each image
    OptTensor sum{}, sum_bias{};  // sum (batch, H, W, C) becomes x + sum_bias, multiplied as `drop_path` says
    DropPathArg drop_path{};
    OptTensor x_bias{};  // (C,), up to 512 channels, not with sum: added to x before all else
    // float32, of a later scan: the kernel marks all of it "not ready" (cuda/scan/sm90/inter_block_state.cuh).
    OptTensor inter_block_state{};
};
// Writes xn: (batch, H, W, C), or (batch, H, W, groups, width) with zeros behind the channels of a group.
void layer_norm_pool_fwd_into(const Tensor& xn, NormPoolInputs in, const CudaContext& context);
// Strips of an image of `tokens` tokens, each of `groups` runs of `width` channels and pads.
int64_t norm_strips(int64_t batch, int64_t tokens, int64_t groups, int64_t width);
// dx: dense, or padded (see empty_padded_image), as dx_more may be, which is added to it. xn, if given, becomes what
// the forward returned: it has the layout of dxn and needs bias.
struct NormPoolGradients {
    Tensor dxn;
    OptTensor dxn_more{}, dpooled{}, dx_more{};
    bool padded = false;
    OptTensor xn{}, bias{};
    DropPathArg drop_path{};
    OptTensor x_bias{};  // the forward's; without dx_more and xn
};
struct NormPoolResult {
    Tensor dx;
    // C columns each: dweight, dbias, and where `sums_dx_more` the sum over all pixels of dx_more, multiplied as
    // `drop_path` says; with x_bias that of dx.
    PartialRows sums;
    bool sums_dx_more;
};
NormPoolResult layer_norm_pool_bwd(NormPoolGradients gradients, Tensor x, Tensor weight, double eps,
                                   const CudaContext& context);

// Any of the images may be (batch, H, W, G, width), zeros behind the channels of a group. y is 0 in images whose branch
// is dropped.
void modulated_layer_norm_fwd_into(const Tensor& y, Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight,
                                   Tensor bias, double eps, const CudaContext& context,
                                   const DropPathArg& drop_path = {});
struct ModulatedGradients {
    Tensor d_o, dx;
    PartialRows sums;  // rows image by image; columns: C of dweight, C of dbias, dscale, C of dgate
};
// Writes what the forward returned into y, if given, which has the layout of dy and needs bias.
ModulatedGradients modulated_layer_norm_bwd(Tensor dy, Tensor o, Tensor x, Tensor scale, OptTensor gate, Tensor weight,
                                            double eps, const CudaContext& context, const OptTensor& y = std::nullopt,
                                            const OptTensor& bias = std::nullopt);

constexpr int64_t kSilu = 1, kGelu = 2;  // codes of csrc/schemas.cpp
// y is 0 in images whose branch is dropped.
void depthwise_conv3x3_fwd_into(const Tensor& y, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                                const CudaContext& context, const DropPathArg& drop_path = {});
// Writes dx, and into y, if given, the forward's result as the backward's kernel computes it. Columns of the result: 9
// G D of dweight, G D of dbias and, with sum_dx, G D of the sum of dx over all pixels. Images whose branch is dropped
// contribute nothing.
PartialRows conv3x3_bwd_into(const Tensor& dx, Tensor dy, Tensor x, Tensor weight, OptTensor bias, int64_t activation,
                             const CudaContext& context, const OptTensor& y = std::nullopt, bool sum_dx = false,
                             const DropPathArg& drop_path = {});

// norm_dim: channels that LayerNorm counts, 0 for D. Where it is less than D, the images are 0 in the other channels,
// and so are A, dt_weight, dt_bias, D, norm_weight, norm_bias and gate; du and dz are 0 there, and gradients of
// parameters anything finite.
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
// A forward that writes y and, if given, the states. It is planned from the addresses of images and parameters alone.
// So these may be computed between the constructor and launch() if images are canonical and parameters contiguous;
// others are copied in the constructor.
class ScanForward {
public:
    ScanForward(const Tensor& y, const OptTensor& states, ScanInputs inputs, const CudaContext& context);
    ScanForward(const ScanForward&) = delete;
    ScanForward& operator=(const ScanForward&) = delete;
    ~ScanForward();

    // What blocks that share planes send one another: to be marked "not ready" (inter_block_state.cuh) by a kernel in
    // between, or else by launch(). Null where no blocks share planes.
    OptTensor inter_block_state_to_clear();
    void launch();

private:
    struct Planned;
    std::unique_ptr<Planned> planned_;  // null for no tokens
};
ScanParameterGradients scan_bwd_into(const ScanImageGradients& gradients, Tensor dy, ScanInputs inputs, Tensor states,
                                     const CudaContext& context);

}  // namespace gm
