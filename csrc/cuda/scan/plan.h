// SPDX-License-Identifier: Apache-2.0
// Constants and block shapes of the scan kernels, shared by the kernels, their launchers, the op entries (which
// allocate by them) and the introspection in `_C`. README.md says what the words mean.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/vec.h"

namespace gm {

constexpr int kMaxScanDim = 32 * kVec;  // one warp holds all channels of a token
constexpr int kTmaUnit = 8;             // 16-bit channels in 16 bytes: TMA moves multiples of these
constexpr int kMaxStates = 256;
constexpr int kMaxStagedRank = 64;  // dt_weight is staged in shared memory up to here: 32 KB at 128 channels

// Tokens of a thread. 7 divides the usual planes (56, 28, 14, 7), and keeps 16-bit kernels with one state within 128
// registers (forward, 2 blocks of 256 threads an SM) and 255 registers (backward, 2 blocks of 128) without a spill.
// The other kernels of the backward hold more for each element: 4 tokens, and as many threads as give a tile of the
// same size.
constexpr int kFwdTokens = 7;
constexpr int kFwdThreads = 256;
constexpr int kBwdTile = 7 * 128;  // tokens * lanes of the backward's tile; states are saved once a tile
constexpr int kTileThreads = kBwdTile / kFwdTokens;  // threads of a block of the sm_90 kernels, for one part of a tile
constexpr int kMaxScanWarps = kFwdThreads / 32;

constexpr int bwd_tokens(bool single_state, int element_size) { return single_state && element_size == 2 ? 7 : 4; }

// From this many states on, states are saved every kManyStatesChunk tokens: the kernels for several states
// (many_states/) hold so many at a time, and every kBwdTile / lanes is a multiple of it.
constexpr int kManyStates = 5;
constexpr int kManyStatesChunk = 28;

// Lanes that share a token: the smallest power of two whose lanes hold all channels.
inline int scan_lanes(int dim) {
    int lanes = 1;
    while (lanes * kVec < dim) lanes *= 2;
    return lanes;
}

// Tokens between two saved states of a plane of `dim` channels.
inline int scan_chunk(int64_t dim, int64_t states) {
    return states < kManyStates ? kBwdTile / scan_lanes(static_cast<int>(dim)) : kManyStatesChunk;
}

// Whole warps, and no more of them than the tokens need.
inline int scan_threads(int full, int tokens_per_thread, int lanes, int64_t tokens) {
    const int64_t needed = (tokens + tokens_per_thread - 1) / tokens_per_thread * lanes;
    return static_cast<int>(std::min<int64_t>(full, (needed + 31) / 32 * 32));
}

inline int scan_fwd_threads(int lanes, int64_t tokens) { return scan_threads(kFwdThreads, kFwdTokens, lanes, tokens); }

inline int scan_bwd_threads(int lanes, int64_t tokens, bool single_state, int element_size) {
    const int per_thread = bwd_tokens(single_state, element_size);
    return scan_threads(kBwdTile / per_thread, per_thread, lanes, tokens);
}

// How the sm_90 kernels cut a plane along columns into tiles of `slots` = kBwdTile / lanes tokens (the forward's may
// be two such parts); a thread takes kFwdTokens of one column. A tile is made of whole columns side by side, unless a
// fifth of its slots would stay empty. Then it is made of runs: pieces of a column, kFwdTokens times a power of two
// rows long, as many as fit, in the order of the path. The last run of a column may be short. Long runs need few TMA
// boxes, short ones leave fewer slots empty: taken are the longest runs that leave at most a tenth empty, or else
// those that leave least. A box must begin at a multiple of 128 bytes of shared memory.
struct ColumnCut {
    int64_t columns;  // whole columns of a tile, 0 for runs
    int64_t rows;     // of a run, 0 for whole columns
    int64_t tiles;    // of the plane
};
inline ColumnCut cut_columns(int64_t height, int64_t width, int64_t dim, int64_t slots) {
    constexpr int64_t kMostRuns = 8, kAligned = 64;  // of a tile of so many slots; elements
    const auto up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
    const int64_t pitch = up(dim, kTmaUnit) * kTmaUnit;
    const int64_t columns = std::min(slots / kFwdTokens / up(height, kFwdTokens), width);
    const ColumnCut whole{columns, 0, columns > 0 ? up(width, columns) : 0};
    if (columns == width || 10 * columns * height >= 8 * slots) return whole;
    int64_t best = slots;
    for (int64_t rows = slots; rows >= kFwdTokens && rows * kMostRuns >= slots; rows /= 2) {
        if (rows < slots && rows * pitch % kAligned != 0) continue;
        if (up(height, rows) * rows < up(height, best) * best) best = rows;
        if (10 * height >= 9 * up(height, rows) * rows) break;
    }
    const int64_t padded = up(height, best) * best;
    if (columns * padded >= slots) return whole;
    return {0, best, up(width * (padded / best), slots / best)};
}

// States that the CUDA kernels save of a plane of `dim` channels, `chunk` tokens apart: as many as there are chunks
// along the path, or tiles of the sm_90 kernels along columns, whichever is more.
inline int64_t scan_saved_states(int64_t height, int64_t width, int64_t dim, int64_t chunk) {
    if (height == 0 || width == 0) return 0;
    return std::max((height * width + chunk - 1) / chunk, cut_columns(height, width, dim, chunk).tiles);
}

// Channels of the slices in which `dim` channels of a cross scan are scanned, all but those of the last: a multiple of
// kTmaUnit.
inline int64_t scan_slice_width(int64_t dim) {
    const int64_t count = (dim + kMaxScanDim - 1) / kMaxScanDim;
    return count == 1 ? dim : ((dim + count - 1) / count + kTmaUnit - 1) / kTmaUnit * kTmaUnit;
}
// Those that a slice has room for, a multiple of kTmaUnit too where TMA may move them.
inline int64_t scan_slice_room(int64_t dim) {
    const int64_t width = scan_slice_width(dim);
    return width <= kTmaUnit ? width : (width + kTmaUnit - 1) / kTmaUnit * kTmaUnit;
}

// Rows of the backward's partial sums for one (batch, part, group), D floats each: A[N], skip, step bias, sum of the
// gated gradient times the norm's output, sum of the gated gradient, dt_weight[R].
enum ScanPartialRow { kRowSkip, kRowBias, kRowProduct, kRowSum, kFixedRows };

}  // namespace gm
