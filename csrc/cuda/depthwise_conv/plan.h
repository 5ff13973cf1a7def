// SPDX-License-Identifier: Apache-2.0
// Block shapes of the depthwise convolution, shared by the kernels, their launchers and the op entries (which allocate
// partial sums by them). They follow from the sizes alone, never from the device, so that the sums of one kernel have
// the same order everywhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/args.h"
#include "cuda/common/integers.h"
#include "cuda/common/tuning.h"

namespace gm {

constexpr int kConvVec = 2;      // channels of a thread: 4 bytes of a 16-bit type, 8 of float
constexpr int kConvColumns = 4;  // adjacent columns of a thread; they share weights and two neighbours
constexpr int kConvTaps = 9;

// Halves the rows of a strip until there are `wanted` strips in all, down to `least` rows.
inline int strip_rows(int height, int64_t strips_at_full_height, int64_t wanted, int least) {
    int rows = std::max(height, 1);
    while (rows > least && strips_at_full_height * div_up(height, rows) < wanted) rows = (rows + 1) / 2;
    return rows;
}

// Forward: `lanes` neighbouring threads hold adjacent channels; together they are a walker, which owns kConvColumns
// columns and goes down one strip of rows. Walkers are numbered by column first, then by strip, then by image.
constexpr int kConvFwdThreads = 128;
constexpr int kConvFwdLanes = 32;

struct ConvFwdPlan {
    int lanes, chunks;      // threads of a walker; blocks that share a token's channels
    int walkers, threads;   // of a block
    int quads;              // runs of kConvColumns columns of an image
    int rows, strips;       // of a strip; of an image
    int64_t walker_blocks;  // of a group
};

inline ConvFwdPlan conv_fwd_plan(int64_t batch, int height, int width, int groups, int dim) {
    ConvFwdPlan p{};
    const int64_t vecs = div_up(dim, kConvVec);
    p.chunks = static_cast<int>(div_up(vecs, kConvFwdLanes));
    p.lanes = static_cast<int>(div_up(vecs, p.chunks));
    p.quads = static_cast<int>(div_up(width, kConvColumns));
    // A strip reads two rows beyond its own.
    const int64_t threads = p.quads * batch * groups * p.chunks * p.lanes;
    const int balanced = strip_rows(height, threads, tuning::kConvManyThreads, 14);
    p.rows = std::min(balanced, strip_rows(height, threads, tuning::kConvFewThreads, 2));
    p.strips = static_cast<int>(div_up(height, p.rows));
    const int64_t walkers = static_cast<int64_t>(p.quads) * p.strips * batch;
    p.walkers = static_cast<int>(std::min<int64_t>(kConvFwdThreads / p.lanes, walkers));
    p.threads = p.walkers * p.lanes;
    p.walker_blocks = p.walkers > 0 ? div_up(walkers, p.walkers) : 0;
    return p;
}

// Backward: a block owns a tile of columns and `lanes` * kConvVec channels, and goes down one strip of rows of one
// image, then of the next. Its threads exchange their gradients through shared memory, so a tile that does not end at
// the edge of the image also computes columns there that its neighbour owns.
constexpr int kConvBwdThreads = 128;
constexpr int kConvBwdLanes = 64;
constexpr int kConvBwdHalo = kConvColumns;  // the columns of a whole thread
constexpr int kConvBwdUnit = 8;             // lanes of 32 bytes of a 16-bit type, a sector
constexpr int kConvBwdVector = 8;  // channels that a thread copies: a row of a tile takes as many threads as compute it
static_assert(kConvBwdVector == kConvVec * kConvColumns);

struct ConvBwdPlan {
    int lanes, chunks;
    int quads, threads;    // runs of kConvColumns columns of a tile; threads = lanes * quads
    int tiles, tile_step;  // of a row; between the first columns of two
    int rows, strips;
    int images;            // that a block walks one after the other
    int64_t segments;      // runs of `images` images
    int64_t partial_rows;  // segments * strips * tiles
};

inline ConvBwdPlan conv_bwd_plan(int64_t batch, int height, int width, int groups, int dim) {
    ConvBwdPlan p{};
    const int64_t vecs = div_up(dim, kConvVec);
    const int least_lanes = static_cast<int>(std::min<int64_t>(vecs, kConvBwdUnit));
    const auto quads_of = [](int columns) { return static_cast<int>(div_up(columns, kConvColumns)); };
    p.quads = quads_of(width);
    p.tiles = 1;
    if (static_cast<int64_t>(p.quads) * least_lanes > kConvBwdThreads) {
        const int inner = width - 2 * kConvBwdHalo;
        const int widest = kConvBwdThreads / least_lanes * kConvColumns - 2 * kConvBwdHalo;
        p.tiles = static_cast<int>(div_up(inner, widest));
        p.quads = quads_of(static_cast<int>(div_up(inner, p.tiles)) + 2 * kConvBwdHalo);
    }
    p.tile_step = p.quads * kConvColumns - 2 * kConvBwdHalo;
    // Whole sectors where there are that many channels: as many chunks as the widest lanes need, then as few lanes as
    // those chunks need.
    int most = std::min(kConvBwdThreads / p.quads, kConvBwdLanes);
    if (most > kConvBwdUnit) most -= most % kConvBwdUnit;
    p.chunks = static_cast<int>(div_up(vecs, most));
    p.lanes = static_cast<int>(div_up(vecs, p.chunks));
    if (p.chunks > 1 && most >= kConvBwdUnit) p.lanes = static_cast<int>(div_up(p.lanes, kConvBwdUnit)) * kConvBwdUnit;
    p.threads = p.lanes * p.quads;
    // A block leaves 10 or 11 floats a channel, so small images share one. A strip reads four rows beyond its own.
    using tuning::kConvEnoughBlocks, tuning::kConvEnoughTokens, tuning::kConvFewBlocks;
    const int64_t blocks = batch * groups * p.tiles * p.chunks;
    const int64_t tokens = std::max<int64_t>(static_cast<int64_t>(height) * width, 1);
    p.images = static_cast<int>(std::clamp<int64_t>(
        std::min(blocks / kConvEnoughBlocks, div_up(kConvEnoughTokens, tokens)), 1, std::max<int64_t>(batch, 1)));
    p.rows = strip_rows(height, blocks, kConvFewBlocks, 7);
    p.strips = static_cast<int>(div_up(height, p.rows));
    p.segments = div_up(batch, p.images);
    p.partial_rows = p.segments * p.strips * p.tiles;
    return p;
}

// By tensor cores (fwd_sm90.cu, bwd_sm90.cu): a block of kConvSm90Warps warps, each with 8 channels of as many columns
// as it can give results for, walks whole images one after the other.
constexpr int kConvSm90Warps = 8;
constexpr int kConvFwdSm90Columns = 16, kConvBwdSm90Columns = 14;
constexpr int kConvFwdSm90Resident = 4, kConvBwdSm90Resident = 2;  // blocks an SM
constexpr int kConvFwdSm90Octets = 4, kConvBwdSm90Octets = 2;      // least of a block; forward two gain nothing

struct ConvSm90Plan {
    int octets;                 // of a block: runs of 8 channels; its other warps are further tiles of columns
    int chunks, column_blocks;  // blocks that share a token's channels, and a row's columns
    int tiles;                  // of a row's columns
    int images;                 // that a block walks
    int64_t segments;           // runs of `images` images
    int64_t blocks, partial_rows;
    double filled;  // share of the warps' channels and columns that exist
};

inline ConvSm90Plan conv_sm90_plan(int64_t batch, int height, int width, int groups, int dim, bool backward) {
    const int columns = backward ? kConvBwdSm90Columns : kConvFwdSm90Columns;
    const int resident = backward ? kConvBwdSm90Resident : kConvFwdSm90Resident;
    const int least_octets = backward ? kConvBwdSm90Octets : kConvFwdSm90Octets;
    ConvSm90Plan best{};
    for (int octets = kConvSm90Warps; octets >= least_octets; octets /= 2) {
        ConvSm90Plan p{};
        p.octets = octets;
        p.tiles = static_cast<int>(div_up(width, columns));
        p.chunks = static_cast<int>(div_up(dim, octets * 8));
        p.column_blocks = static_cast<int>(div_up(p.tiles, kConvSm90Warps / octets));
        p.filled = static_cast<double>(dim) * width /
                   (static_cast<double>(p.chunks) * p.column_blocks * kConvSm90Warps * 8 * columns);
        if (p.filled > best.filled) best = p;
    }
    // As many runs of images as take the least time of those that fill the GPU once to four times. That of a block are
    // its rows, two more of each image, and what it does once.
    const int64_t at_once = resident * tuning::kMultiprocessors;
    const int64_t shares = int64_t{groups} * best.chunks * best.column_blocks;
    double least = 0.;
    for (int64_t waves = 1; waves <= 4; ++waves) {
        const int64_t most = std::clamp<int64_t>(waves * at_once / shares, 1, std::max<int64_t>(batch, 1));
        const int64_t images = div_up(batch, most), segments = div_up(batch, images);
        const double needed = static_cast<double>(div_up(segments * shares, at_once));
        const double time = needed * (static_cast<double>(images) * (height + 2) + tuning::kConvSm90Once);
        if (waves > 1 && time >= least) continue;
        least = time, best.images = static_cast<int>(images), best.segments = segments;
    }
    best.blocks = best.segments * shares;
    best.partial_rows = best.segments * best.tiles;
    return best;
}

// Why the threads of fwd.cu and bwd.cu are the better way, or null where tensor cores are.
inline const char* why_not_conv_sm90(const ConvSm90Plan& plan, DType dtype) {
    if (dtype == DType::kFloat) return "images are float32, not float16 or bfloat16";
    if (plan.filled < tuning::kConvSm90Filled) return "channels or columns fill its tiles badly";
    if (plan.blocks < tuning::kConvSm90Blocks) return "there are too few images for the GPU";
    return nullptr;
}

}  // namespace gm
