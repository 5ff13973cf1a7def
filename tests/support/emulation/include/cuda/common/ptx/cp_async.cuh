// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/cp_async.cuh: until its thread waits for a copy, NaN is where it goes.
#pragma once

#include <cuda_runtime_api.h>

namespace gm {

inline void cp_async(void* shared, const void* global, size_t bytes, bool in) {
    std::memset(shared, 0xff, bytes);
    emulation::self().copies.back().push_back([=] {
        if (in)
            std::memcpy(shared, global, bytes);
        else
            std::memset(shared, 0, bytes);
    });
}
inline void cp_async_16(void* shared, const void* global, bool in) { cp_async(shared, global, 16, in); }
inline void cp_async_4(void* shared, const void* global) { cp_async(shared, global, 4, true); }
inline void cp_async_commit() { emulation::self().copies.emplace_back(); }
template <int kPending>
void cp_async_wait() {
    auto& groups = emulation::self().copies;  // the last one is still open
    while (groups.size() > kPending + 1) {
        for (const auto& copy : groups.front()) copy();
        groups.pop_front();
    }
}

}  // namespace gm
