// SPDX-License-Identifier: Apache-2.0
// What the op entries hand to the launchers: plain structs, no torch. Strides in elements; channels are adjacent.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/conv_plan.h"
#include "cuda/norm_plan.h"

namespace gm {

enum class DType : int { kFloat, kHalf, kBFloat16 };

struct ImageArg {  // (batch, token, group, channel) by strides; ptr null where absent
    void* ptr = nullptr;
    int64_t batch = 0, token = 0, group = 0;
    int64_t scan = 0;  // of the cross scan: between the scans of a group; 0 where they share the image
};

struct ParamArg {  // contiguous; dtype of the images, or float32
    const void* ptr = nullptr;
    bool is_float = false;
};

// See csrc/schemas.cpp for what the codes mean: bit 0 reverses the path, bit 1 makes it column-major.
constexpr int kMaxGroups = 4096;  // two bits each in the kernel's parameters

struct ScanShape {
    int64_t batch;
    int height, width, groups, dim, states, rank;  // rank 0: dt holds the step itself
    int scans;      // groups of the kernel that are scans of one group of the images, one after another
    int param_dim;  // channels between the parameters of two groups: dim, more where dim is a part, fewer where padded
    int norm_dim;   // channels that LayerNorm counts: D, or fewer where the rest is pad
    int lanes;      // lanes that share a token, a power of two up to 32
    int threads;    // threads of a block
    bool softplus;
    bool aligned;  // every image-sized tensor allows aligned 4-channel accesses, and D is a multiple of 4
    float norm_eps;
    uint32_t directions[kMaxGroups / 16];
};

// Stochastic depth: images whose branch of the residual stream is left out. The branch of the others counts `scale`
// times.
struct KeptArg {
    const float* images = nullptr;  // (batch,): 1 where the branch is kept, else 0; null where all are
    float scale = 1.f;
};

struct ParamOut {  // contiguous gradient of a parameter; ptr null where absent
    void* ptr = nullptr;
    bool is_float = false;
};

struct ScanFwdArgs {
    ScanShape shape;
    ImageArg u, dt, B, C, z, y;
    ParamArg A, D, dt_weight, dt_bias, norm_weight, norm_bias, gate;
    float* states = nullptr;  // (batch, G, num_chunks, N, D), or null
    float* carry = nullptr;   // (batch, G, 2, N, D) scratch, needed for N > 1 without states
    int chunk = 0;            // tokens between saved states
    int64_t num_chunks = 0;
};

struct ScanBwdArgs {
    ScanShape shape;
    ImageArg dy, u, dt, B, C, z;   // inputs
    ImageArg du, ddt, dB, dC, dz;  // gradients
    ParamArg A, D, dt_weight, dt_bias, norm_weight, norm_bias, gate;
    const float* states = nullptr;
    float* carry = nullptr;     // (batch, G, 2, N, D) scratch for N > 1
    float* partials = nullptr;  // (batch, parts, G, rows, D), a part a warp or, sm_90, a block; rows: ScanPartialRow
    int chunk = 0;
    int64_t num_chunks = 0;
};

// out[i] = sum over k of in[k * stride + i], i < count; k < parts.
struct SumImagesArgs {
    const void* in = nullptr;
    void* out = nullptr;
    int64_t count = 0, stride = 0;
    int parts = 0;
};

// Zeros in the images that are not kept; each is `bytes` long, all one after another.
struct ClearImagesArgs {
    void* images = nullptr;
    int64_t batch = 0, bytes = 0;  // a multiple of 16, from an address that is one too
    KeptArg kept;
};

// Second stage of the backward's parameter sums.
struct ScanReduceArgs {
    const float* partials = nullptr;  // (batch, parts, G, rows, D), see ScanPartialRow
    int64_t batch = 0;
    int parts = 0, groups = 0, dim = 0, param_dim = 0, states = 0, rank = 0;
    ParamArg norm_weight, norm_bias, gate;
    ParamOut dA, dD, ddt_bias, ddt_weight, dnorm_weight, dnorm_bias, dgate;
};

// depthwise_conv3x3; plans in conv_plan.h.
enum class Activation : int { kNone, kSilu, kGelu };  // codes of csrc/schemas.cpp

struct ConvShape {
    int64_t batch;
    int height, width, groups, dim;
    Activation activation;
    bool aligned;  // every image allows aligned accesses, to 4 channels or, backward, 16 bytes; D is a multiple of 4 or
                   // 8
};

struct ConvFwdArgs {
    ConvShape shape;
    ConvFwdPlan plan;
    ImageArg x, y;
    KeptArg kept;           // y is 0 in the images that are not
    ParamArg weight, bias;  // (G, D, 3, 3), (G, D)
};

struct ConvBwdArgs {
    ConvShape shape;
    ConvBwdPlan plan;
    ImageArg dy, x, dx;
    ImageArg y;    // the forward's result once more, or absent
    KeptArg kept;  // as in the forward: dx is 0 in the others
    ParamArg weight, bias;
    // Sums of a channel that a block leaves: dweight, dbias and, with one more, of dx.
    int sums = kConvTaps + 1;
    float* partials = nullptr;  // rows of (G, D, 3, 3), then (G, D) for each of the others
};

// layer_norm_pool and modulated_layer_norm; plan in norm_plan.h. A token is `groups` runs of group_dim channels, in
// storage followed by zeros up to group_width where the image is padded; channel c of the parameters is c % group_dim
// of group c / group_dim. Slots count channels and pads.
struct NormShape {
    int64_t batch, tokens;
    int dim;                             // channels of a token: groups * group_dim
    int groups, group_dim, group_width;  // group_width: a multiple of kVec
    float eps;
    int slots() const { return groups * group_width; }
};

struct NormImage : ImageArg {
    bool aligned = false;  // allows aligned accesses to kVec channels, pads included
    int width = 0;         // stored channels of a group: group_dim, or more
    int tail = 0;          // elements behind all groups of a token that a kernel which writes the image sets to 0
};

struct PoolFwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage x, xn, sum;  // sum: x + sum_bias, or absent
    KeptArg kept;          // factors of sum_bias
    ParamArg weight, bias, sum_bias;
    ParamArg x_bias;  // (dim,): added to x first, or absent; not with sum, nor where plan.vecs > kRowVecs or 0
    float* partials = nullptr;  // (batch, plan.strips, dim): sums of xn, or null
    float* words = nullptr;     // those of a later kernel, here marked absent (words.cuh), or null
    int64_t word_count = 0;
};

struct PoolBwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage dxn, dxn_more, x, dx, dx_more;  // dxn_more, dx_more: added to dxn, to dx, or absent
    void* xn = nullptr;                       // the forward's result once more, laid out as dxn, or null
    const float* dpooled = nullptr;           // (batch, dim), or null
    ParamArg weight, bias;                    // bias: for xn
    ParamArg x_bias;                          // the forward's, or absent; not with dx_more or xn
    bool sum_dx_more = false;
    KeptArg kept;  // factors of dx_more in its sums
    // (batch, plan.strips, 2 * dim): dweight, dbias; with sum_dx_more or x_bias 3 * dim, the last for sums of dx_more
    // or of dx
    float* partials = nullptr;
};

struct ModulatedFwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage o, x, y;
    KeptArg kept;                        // y is 0 in the images that are not
    ParamArg scale, gate, weight, bias;  // gate (batch, dim)
};

struct ModulatedBwdArgs {
    NormShape shape;
    NormPlan plan;
    NormImage dy, o, x, d_o, dx;
    void* y = nullptr;  // the forward's result once more, laid out as dy, or null
    ParamArg scale, gate, weight;
    ParamArg bias;              // for y
    float* partials = nullptr;  // (batch, plan.strips, 3 * dim + 1): dweight, dbias, dscale, dgate
};

// Sums over the rows of partial sums, segment by segment. The columns are, in this order, those of the targets: target
// i is (segments, counts[i]).
constexpr int kReduceTargets = 3;
struct ReduceArgs {
    const float* partials = nullptr;  // (segments, rows, row_stride)
    int64_t segments = 1, rows = 0, row_stride = 0, columns = 0;
    float factor = 1.f;
    ParamOut targets[kReduceTargets];
    int64_t counts[kReduceTargets] = {};
};

// Parameters (n0, n1, n2), of any strides, laid out as (n0, w1, w2) with zeros in the pads: rows of the products that
// follow are then aligned, and in the dtype of the images.
struct PackItem {
    ParamArg from;
    int64_t strides[3] = {};  // of `from`, in elements
    ParamOut to;
    int n1 = 1, n2 = 1, w1 = 1, w2 = 1;
    bool negative_exp = false;  // A = -exp(A_log)
    bool vectors = false;       // rows of kVec elements are written at once, and read so where reads_vectors
    bool reads_vectors = false;
    int64_t count = 0;    // n0 * w1 * w2
    int first_block = 0;  // by the launcher
};
constexpr int kMaxPackItems = 16;
struct PackArgs {
    PackItem items[kMaxPackItems];
    int count = 0;
};

// The way back for gradients: sums over parts, pads dropped. Element (i0, j, i1, i2) of the result, j < inner, is
//   sum over part of from[(i0 * parts + part) * part_stride + (j * w1 + i1) * w2 + i2]
//     [+ sum over part of more[part * more_stride + i]] [* scale[.]],  i the element's number
struct SumItem {
    ParamArg from;
    const float *more = nullptr, *scale = nullptr;
    ParamOut to;
    int64_t to_strides[3] = {};  // of (i0 * inner + j, i1, i2), in elements
    int n1 = 1, n2 = 1, w1 = 1, w2 = 1, inner = 1;
    int parts = 1, more_parts = 0;
    bool vectors = false;  // kVec elements of a row lie side by side, aligned to their size; no more and no scale
    int64_t part_stride = 0, more_stride = 0;
    int64_t count = 0;  // of the result
    int first_block = 0;
};
constexpr int kMaxSumItems = 20;
struct SumArgs {
    SumItem items[kMaxSumItems];
    int count = 0;
};

// Rows of `channels` elements, `stride` apart, as rows of `width` that end in zeros where that is more; of some images
// alike. `to` begins at a multiple of 16 bytes.
struct CopyRowsArgs {
    const void* from[3] = {};
    void* to[3] = {};
    int images = 1;
    int64_t rows = 0, stride = 0;
    int channels = 0, width = 0;
};

// Sums over the rows of a matrix (rows, columns), a row of partial sums a block.
struct ColumnSumArgs {
    const void* x = nullptr;
    int64_t rows = 0, row_stride = 0;
    int columns = 0, blocks = 0;
    KeptArg kept;  // factors of the rows of an image
    int64_t rows_of_image = 1;
    float* partials = nullptr;  // (blocks, columns)
};

// y = x weight^T for x (groups, tokens, in), weight (groups, out, in), y (groups, tokens, out); backward: dx, or with
// `add` what is there and dx, and sums of dweight over parts of the tokens. All contiguous and aligned to 16 bytes.
struct NarrowProductArgs {
    const void *x = nullptr, *weight = nullptr, *dy = nullptr;
    void *y = nullptr, *dx = nullptr;
    float* dweight = nullptr;  // (groups, parts, out, in)
    int64_t tokens = 0;
    int groups = 0, in = 0, out = 0;
    int parts = 0;  // blocks of a group; of the backward by plan_narrow_product_bwd
    int used = 0;   // columns of dy, of 4, that are no pads
    bool add = false;
};

// y = scale * x weight^T + bias, or with `add` that and what is there but no bias; shapes as above, bias (out), all in
// the images' dtype, contiguous and aligned to 16 bytes.
struct WideProductArgs {
    const void *x = nullptr, *weight = nullptr, *bias = nullptr;
    void* y = nullptr;
    int64_t tokens = 0;
    int groups = 0, in = 0, out = 0;
    int parts = 0;  // blocks of a group, by the launcher
    float scale = 1.f;
    bool add = false, transposed = false;  // weight (groups, in, out)
};

// batch_norm_relu on rows (rows, channels), all of them contiguous and aligned to 16 bytes.
constexpr int kBatchNormUnit = 8, kBatchNormThreads = 256;  // channels of a thread; threads of a block
struct BatchNormArgs {
    const void *x = nullptr, *dy = nullptr;
    void *y = nullptr, *dx = nullptr;
    int64_t rows = 0;
    int channels = 0, blocks = 0;
    ParamArg weight, bias;
    float eps = 0.f;
    float* stats = nullptr;     // (3, channels): mean, variance by rows - 1, 1 / sqrt(variance by rows + eps)
    float* means = nullptr;     // backward: (2, channels), of g and of g (x - mean) / deviation^2
    float* partials = nullptr;  // (blocks, 2, channels)
    ParamOut dweight, dbias;
};

// A convolution's weight (out, channels, taps, taps) and the BatchNorm behind it as one weight, (out, folded_taps,
// folded_taps, folded_channels), and a bias.
struct FoldArgs {
    ParamArg weight;  // of any strides
    int64_t strides[4] = {};
    int out = 0, channels = 0;
    ParamArg norm_weight, norm_bias, mean, variance;
    float eps = 0.f;
    bool blocks = false;  // for an image whose 2 x 2 pixels are channels
    int folded_taps = 0, folded_channels = 0;
    void *folded = nullptr, *bias = nullptr;
};

// Eight blocks an SM of an H100, all at once, unless that leaves a thread fewer than four rows.
inline int batch_norm_blocks(int64_t rows, int channels) {
    constexpr int64_t kMostBlocks = 8 * 132, kLeastRows = 4;
    const int64_t rows_of_block = kBatchNormThreads / (channels / kBatchNormUnit) * kLeastRows;
    const int64_t blocks = (rows + rows_of_block - 1) / rows_of_block;
    return static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// gate = sigmoid(fc2(relu(fc1(pooled)))). Channel m of the gate lies at m / group_dim * group_width + m % group_dim.
struct AffinityArgs {
    int batch = 0, dim = 0, hidden = 0, out_dim = 0, group_dim = 0, group_width = 0;
    const float* partials = nullptr;  // forward: (batch, strips, dim), sums over the strips of an image
    int strips = 0;
    float factor = 1.f;       // 1 / pixels of an image
    float* pooled = nullptr;  // (batch, dim): written by the forward
    ParamArg fc1_weight, fc1_bias, fc2_weight, fc2_bias;
    // Parameters that a block copies to shared memory: fc1_weight, fc2_weight, fc1_bias, fc2_bias, as many of them as
    // are counted here; 0 where they are read in place.
    struct Staged {
        const void* from;
        int at, bytes;
    } staged[4] = {};
    int staged_count = 0, staged_bytes = 0;
    float* hidden_out = nullptr;  // (batch, hidden), after the relu
    float* gate = nullptr;        // (batch, out_dim / group_dim * group_width)
    // backward
    const float* dgate =
        nullptr;  // (batch, dgate_parts, dgate_stride), to be summed over the parts; laid out like gate
    int dgate_parts = 1;
    int64_t dgate_stride = 0;
    float* dpooled = nullptr;  // (batch, dim)
    float* scratch = nullptr;  // (batch, out_dim + hidden): gradients before the sigmoid, before the relu
    ParamOut dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias;
};

}  // namespace gm
