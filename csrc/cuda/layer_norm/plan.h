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

enum class NormPass { kForward, kBackward };

// Blocks that a multiprocessor of 9.0 has registers for. 96 of them in a forward kernel, and 168 in a backward one with
// its sums for each channel, hold a step and the loads of the next without a spill. (With three vectors 80 do, and six
// blocks take 6% less time, but not beside the packing of parameters, which then waits for their end.)
constexpr int norm_resident(NormPass pass, int vecs) {
    if (vecs > kRowVecs) return 2;
    return pass == NormPass::kBackward ? 3 : 5;
}

// A block walks one strip of tokens of one image, `step` at a time.
struct NormPlan {
    int vecs;   // 4 or 8; 0: wide rows, read from memory three times
    int lanes;  // threads that share a token, a power of two
    int step, strip_tokens;
    int64_t strips;  // of an image

    // True where rows fill at most three of a thread's four vectors.
    bool narrow(int slots) const { return vecs == kRowVecs && slots <= lanes * (kRowVecs - 1) * kVec; }
};

// `slots`: channels of a token with their pads.
inline NormPlan norm_plan(int64_t batch, int64_t tokens, int slots, NormPass pass, int max_vecs = kMaxRowVecs) {
    NormPlan p{};
    p.vecs = kRowVecs;
    while (p.vecs <= max_vecs && p.vecs * 32 * kVec < slots) p.vecs *= 2;
    p.lanes = 1;
    while (p.lanes < 32 && p.lanes * p.vecs * kVec < slots) p.lanes *= 2;
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    if (p.vecs > max_vecs) {
        p.vecs = 0;
        p.step = p.strip_tokens = kWideTokens;
        p.strips = up(tokens, kWideTokens);
        return p;
    }
    p.step = kNormThreads / p.lanes;
    if (tokens == 0) return p;
    // As many strips as take the least time of those that fill the GPU once to four times. That of a block are its
    // steps, and what it does once.
    using tuning::kNormEnoughTokens, tuning::kNormFewBlocks, tuning::kNormOnce;
    const int64_t at_once = tuning::kMultiprocessors * norm_resident(pass, p.vecs);
    const int64_t images = std::max<int64_t>(batch, 1), steps = up(tokens, p.step);
    const int64_t most = std::max(up(kNormFewBlocks, images), up(tokens, kNormEnoughTokens));
    int64_t least = 0;
    for (int64_t waves = 1; waves <= 4; ++waves) {
        const int64_t strip_steps = up(steps, std::clamp<int64_t>(waves * at_once / images, 1, most));
        const int64_t strips = up(steps, strip_steps), time = up(strips * images, at_once) * (strip_steps + kNormOnce);
        if (waves > 1 && time >= least) continue;
        least = time, p.strips = strips, p.strip_tokens = static_cast<int>(strip_steps * p.step);
    }
    return p;
}

}  // namespace gm
