// SPDX-License-Identifier: Apache-2.0
// Shared by forward and backward of the GroupMamba layer on CUDA: checked sizes, packed parameters, and the images
// between x and the result; layout.h says where they are stored.
#pragma once

#include "cuda/channel_affinity/args.h"
#include "host/workspace.h"
#include "ops/entries_cuda.h"
#include "ops/layer/layout.h"
#include "ops/layer/parameter_pack.h"

namespace gm {

struct LayerParameters {
    Tensor norm_weight, norm_bias;
    OptTensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;
    Tensor in_proj_weight, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A_log, D, out_norm_weight,
        out_norm_bias;
    OptTensor out_proj_weight, skip_scale;
    Tensor proj_weight, proj_bias;
};

struct LayerScalars {
    std::vector<int64_t> directions;
    double eps, norm_eps;
    int64_t chunk;
    bool residual;
    OptTensor drop_path_mask;  // (batch,): 1 where the branch counts, 0 where it is dropped
    double drop_path_scale;    // of the branches that count
};

LayerSizes layer_sizes(const Tensor& x, const LayerParameters& p, int64_t chunk);

ParameterPack layer_pack(const LayerParameters& p, const LayerSizes& s, ScalarType dtype, Workspace& workspace,
                         KeptParameters kept = {});

// What the layer computes, with the layouts of csrc/schemas.cpp; null where it has no such image.
struct LayerImages {
    Tensor xn, uz, u, features, y, o, mixed;
    OptTensor gate, pooled, hidden, states;
};
LayerImages layer_images(const LayerSizes& s, const LayerPlaces& places, bool save, const Workspace& workspace);

// (G, T, K) rows, from channel `first` on, as the image (batch, H, W, G, K).
Tensor image_of(const Tensor& rows, const LayerSizes& s, int64_t channels, int64_t first = 0);
// A group-major image (batch, H, W, G, K) without gaps as rows (G, T, K).
Tensor rows_of(const Tensor& image, const LayerSizes& s, int64_t channels);

// Drop path, of the released layer alone.
DropPathArg layer_drop_path(const Tensor& x, const LayerSizes& s, const LayerScalars& scalars);
ScanInputs scan_inputs(const ParameterPack& pack, const LayerSizes& s, const LayerImages& images,
                       const LayerScalars& scalars);
AffinityArgs affinity_args(const LayerParameters& p, const LayerSizes& s, const LayerImages& images,
                           ParamHolder& param);

}  // namespace gm
