// SPDX-License-Identifier: Apache-2.0
// What the op entries hand to the CPU kernels: pointers, sizes, strides in elements. Torch-free.
#pragma once

#include <cstdint>

namespace gm::cpu {

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

// Rows of parameters and scratch are padded with zeros (those of dt_weight with the last channel's value) to a multiple
// of this, so that vectors of any width fit.
constexpr int64_t kRowUnit = 16;

// An image tensor (batch, token, group, channel) with adjacent channels; tokens in row-major order. Null: absent.
struct ConstImage {
    const void* data = nullptr;
    int64_t batch = 0, token = 0, group = 0;
};
struct Image {
    void* data = nullptr;
    int64_t batch = 0, token = 0, group = 0;
};

// "Wide" arrays are float, or double where the images are double; their rows are `padded` long. Absent parameters are
// neutral rows (zeros; ones for gate), except that norm_weight and z are null where there is no norm or no gating.
struct ScanParams {
    DType dtype;
    int64_t batch, height, width, groups, dim, padded;
    int64_t states, rank;  // rank 0: dt has the step of every channel
    const int64_t* directions;
    bool softplus;
    double norm_eps;
    int64_t chunk, chunks;  // tokens between saved states; number of saved states
    ConstImage u, dt, B, C, z;
    const void *A, *dt_weight;                          // wide (groups, states, padded), (groups, rank, padded)
    const void *D, *dt_bias, *norm_weight, *norm_bias;  // wide (groups, padded)
    const void* gate;                                   // wide (batch, groups, padded)
};

struct ScanOutputs {
    Image y;
    void* states;  // wide (batch, groups, chunks, states, dim), not padded; null: not saved
    Image sum{};   // a wide image, instead of y: the scan is written there by group 0 and added there by the others
};

struct ScanGradients {
    ConstImage dy;
    const void* states;
    Image du, ddt, dB, dC, dz;
    // (batch, groups, states + rank + 5, padded): rows of dA, ddt_weight, ddt_bias, dD, dnorm_weight, dnorm_bias, dgate
    double* partials;
    Image du_sum{};  // instead of du, as ScanOutputs::sum
};

enum class Activation { kNone, kSilu, kGelu };

struct ConvParams {
    DType dtype;
    int64_t batch, height, width, groups, dim, padded;
    Activation activation;
    ConstImage x;
    const void *weight, *bias;  // wide (groups, 9, padded), (groups, padded)
};

// The backward works on tiles: some rows and channels of one group's image.
struct ConvGradients {
    int64_t tile_rows, tile_channels, row_tiles, channel_tiles;
    ConstImage dy;
    Image dx;
    double* partials;  // (batch, row_tiles, groups, 10, padded): nine rows of dweight, one of dbias
};

// Norms work on blocks of `block` tokens, `blocks` to an image: one row of partial sums each.
struct NormPoolParams {
    DType dtype;
    int64_t batch, tokens, dim, padded, block, blocks;
    double eps;
    ConstImage x;
    const void *weight, *bias;  // wide (padded)
};

struct NormPoolOutputs {
    Image xn;
    double* partials;  // (batch, blocks, padded): sums of xn over the block
};

struct NormPoolGradients {
    ConstImage dxn;
    const void* dpooled;  // wide (batch, padded)
    Image dx;
    double* partials;  // (batch, blocks, 2, padded): dweight, dbias
};

struct ModulatedNormParams {
    DType dtype;
    int64_t batch, tokens, groups, dim;  // dim channels a group
    int64_t padded, block, blocks;       // padded: of all groups * dim channels
    double eps, scale;
    ConstImage o, x;
    const void *weight, *bias;  // wide (padded)
    const void* gate;           // wide (batch, padded)
};

struct ModulatedNormGradients {
    ConstImage dy;
    Image d_o, dx;
    double* partials;  // (batch, blocks, 4, padded): dweight, dbias, dgate, and a row that starts with dscale
};

}  // namespace gm::cpu
