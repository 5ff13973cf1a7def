// SPDX-License-Identifier: Apache-2.0
// Block shapes of the LayerNorm kernels, from the sizes alone: shared by the kernels, their launchers and the op
// entries (which allocate partial sums by them).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/tuning.h"
#include "cuda/common/vec.h"

namespace gm {

constexpr int kNormThreads = 128;
// Vectors of kVec channels of a thread. Rows of up to 1024 channels stay in registers, of up to 512 where o, x, dy,
// the normed values and three sums for each channel compete for them. Always 4 where that is enough, with as few lanes
// for a token as can hold it: 16 channels a thread keep 32 bytes of each image in flight, and short rows need few
// shuffles.
constexpr int kRowVecs = 4, kMaxRowVecs = 8;
constexpr int kWideTokens = 16;  // tokens of a block where rows do not fit in registers

// True where layer_norm_pool's backward has registers for the sums of dx_more, or of dx.
constexpr bool sums_dx_more(int vecs) { return vecs <= kRowVecs; }
constexpr int kBiasedChannels = kRowVecs * 32 * kVec;  // up to here
// True where it has registers for writing the forward's result once more.
constexpr bool writes_xn(int vecs) { return vecs <= kRowVecs; }

// A block walks one strip of tokens of one image, `step` at a time.
struct NormPlan {
    int vecs;   // 4 or 8; 0: wide rows, read from memory three times
    int lanes;  // threads that share a token, a power of two
    int step, strip_tokens;
    int64_t strips;  // of an image
};

// `slots`: channels of a token with their pads.
inline NormPlan norm_plan(int64_t batch, int64_t tokens, int slots, int64_t wanted_blocks, int max_vecs = kMaxRowVecs) {
    NormPlan p{};
    p.vecs = kRowVecs;
    while (p.vecs <= max_vecs && p.vecs * 32 * kVec < slots) p.vecs *= 2;
    p.lanes = 1;
    while (p.lanes < 32 && p.lanes * p.vecs * kVec < slots) p.lanes *= 2;
    if (p.vecs > max_vecs) {
        p.vecs = 0;
        p.step = p.strip_tokens = kWideTokens;
    } else {
        p.step = kNormThreads / p.lanes;
        using tuning::kNormEnoughTokens, tuning::kNormFewBlocks;
        const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
        const int64_t images = std::max<int64_t>(batch, 1);
        const int64_t strips =
            std::min(up(wanted_blocks, images), std::max(up(kNormFewBlocks, images), up(tokens, kNormEnoughTokens)));
        p.strip_tokens = static_cast<int>(up(up(tokens, p.step), strips) * p.step);
    }
    p.strips = p.strip_tokens > 0 ? (tokens + p.strip_tokens - 1) / p.strip_tokens : 0;
    return p;
}

}  // namespace gm
