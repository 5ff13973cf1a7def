// SPDX-License-Identifier: Apache-2.0
// What the arguments of all launchers are made of: plain structs, no torch. Strides in elements; channels are adjacent.
#pragma once

#include <cstdint>

namespace gm {

enum class DType : int { kFloat, kHalf, kBFloat16 };
enum class Activation : int { kNone, kSilu, kGelu };  // codes of csrc/schemas.cpp

struct ImageArg {  // (batch, token, group, channel) by strides; ptr null where absent
    void* ptr = nullptr;
    int64_t batch = 0, token = 0, group = 0;
    int64_t scan = 0;  // of the cross scan: between the scans of a group; 0 where they share the image
};

struct ParamArg {  // contiguous; dtype of the images, or float32
    const void* ptr = nullptr;
    bool is_float = false;
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

}  // namespace gm
