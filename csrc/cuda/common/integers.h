// SPDX-License-Identifier: Apache-2.0
// Whole numbers of blocks, tiles and strips.
#pragma once

#include <cstdint>

namespace gm {

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gm
