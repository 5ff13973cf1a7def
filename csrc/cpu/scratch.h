// SPDX-License-Identifier: Apache-2.0
// Carves aligned arrays out of one piece of memory; without memory it only counts the bytes.
#pragma once

#include "cpu/vec.h"

namespace gm::cpu::GM_CPU_CAPABILITY {

class Scratch {
public:
    explicit Scratch(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(memory_ + used_);
        used_ += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
    int64_t used() const { return static_cast<int64_t>(used_); }

private:
    uintptr_t memory_;
    uintptr_t used_ = 0;
};

}  // namespace gm::cpu::GM_CPU_CAPABILITY
