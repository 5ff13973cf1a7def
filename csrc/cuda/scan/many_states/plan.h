// SPDX-License-Identifier: Apache-2.0
// Block shapes of the scan kernels for several states, shared by the kernels and their launchers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/scan/plan.h"

namespace gm {

// Tokens that a thread walks at a time, and those that it has between the walks.
template <class T>
constexpr int kFwdStretch = sizeof(T) == 2 ? 7 : 4;
template <class T>
constexpr int kFwdStaged = sizeof(T) == 2 ? 4 : 2;
constexpr int kBwdStretch = 4, kBwdStaged = 2;
// Tokens of a tile. The backward's begins where a state is saved.
constexpr int kFwdStateTile = 2 * kManyStatesChunk, kBwdStateTile = kManyStatesChunk;

// Most threads of a block where each has `each` states of a channel, as its registers allow.
constexpr int max_state_threads(int each) { return each <= 4 ? 512 : 256; }
constexpr int kMaxStateLanes = 16;

// Tokens whose dB and dC a warp adds up at a time: as many of a stretch as 4 KB hold.
constexpr int added_tokens(int each) { return each == 8 ? 2 : kBwdStretch; }

// How a block holds the states of a plane and a tile of it. `each` successive states of a channel, 2, 4 or 8, belong to
// one thread, all of them to `lanes` neighbouring threads, a power of two from 2 to 16. Dynamic shared memory holds
// what follows, in floats from its start.
struct ManyStatesLayout {
    int each, lanes;
    int threads;  // whole warps, and enough for every channel that tokens are staged with, kVec at a time
    int row;      // B or C of a token
    int tile;     // tokens
    int width;    // channels that a token has room for
    int steps;    // step and u of every token and channel
    int y;        // y; in the backward dy takes its place
    int B, C;     // (tile, row)
    int weights;  // of the steps, StepWeight
    int tokens;   // row-major numbers, int
    // Of the backward:
    int stretches;   // states that enter every stretch, those of each thread after another
    int gradients;   // sum over the states of g B, and the gradient of the step, of every token and channel
    int products;    // what the threads of a warp add to dB and dC of added_tokens(each) tokens
    int token_sums;  // dB and dC, by warp
    int sums;        // for the parameters, 4 a row for each thread of `parts` warps
    int floats;
    int parts;  // warps of the block that leave a row of sums each, see ScanBwdArgs::partials
    // B and C, and in the backward dB and dC, allow aligned accesses to four states.
    bool feature_vectors = false;

    ManyStatesLayout() = default;
    ManyStatesLayout(int each, int dim, int states, int token_lanes, int rank, bool backward) : each(each), lanes(2) {
        while (lanes * each < states) lanes *= 2;
        threads = ((dim + kVec - 1) / kVec * kVec * lanes + 31) / 32 * 32;
        row = lanes * each;
        tile = backward ? kBwdStateTile : kFwdStateTile;
        width = (std::max(dim, threads / lanes) + kVec - 1) / kVec * kVec;
        const int warps = threads / 32;
        parts = std::min((tile / kBwdStaged * token_lanes + 31) / 32, warps);
        int end = 0;
        const auto take = [&end](int count) {
            const int begin = end;
            end += (count + 3) / 4 * 4;
            return begin;
        };
        steps = take(2 * tile * width), y = take(tile * width);
        B = take(tile * row), C = take(tile * row);
        weights = take(rank <= kMaxStagedRank ? rank * kMaxScanDim : 0);
        tokens = take(tile);
        stretches = gradients = products = token_sums = sums = end;
        if (backward) {
            stretches = take(tile / kBwdStretch * threads * each);
            gradients = take(2 * tile * width);
            products = take(2 * added_tokens(each) * threads * each);
            token_sums = take(warps * tile * row * 2);
            sums = take(kFixedRows * 32 * parts * kVec);
        }
        floats = end;
    }
    bool allowed() const { return threads <= max_state_threads(each) && lanes <= kMaxStateLanes; }
};

}  // namespace gm
