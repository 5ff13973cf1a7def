// SPDX-License-Identifier: Apache-2.0
// The types that the arguments of all launchers are made of: plain structs, no torch. Strides are in elements;
// channels are adjacent.
#pragma once

#include <cstdint>

namespace gm {

enum class DType : int { kFloat, kHalf, kBFloat16 };
enum class Activation : int { kNone, kSilu, kGelu };  // codes of csrc/schemas.cpp

struct ImageArg {  // (batch, token, group, channel) by strides; ptr null where absent
    void* ptr = nullptr;
    int64_t batch = 0, token = 0, group = 0;
    int64_t scan = 0;  // of the cross scan: stride between the scans of a group; 0 where they share the image
};

struct ParamArg {  // contiguous; dtype of the images, or float32
    const void* ptr = nullptr;
    bool is_float = false;
};

// Drop path (stochastic depth): in some images the branch of the residual stream is dropped. In the others it is
// multiplied by `scale`.
struct DropPathArg {
    const float* mask = nullptr;  // (batch,): 0 where the branch is dropped, else 1; null where none is
    float scale = 1.f;
};

struct ParamOut {  // contiguous gradient of a parameter; ptr null where absent
    void* ptr = nullptr;
    bool is_float = false;
};

}  // namespace gm
