// SPDX-License-Identifier: Apache-2.0
// The vector width of the kernels.
#pragma once

namespace gm {

constexpr int kVec = 4;  // channels of a thread: 8 bytes of a 16-bit type, 16 of float

}  // namespace gm
