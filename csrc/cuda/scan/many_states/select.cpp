// SPDX-License-Identifier: Apache-2.0
// Which scans the kernels for several states take.
#include "cuda/common/device.h"
#include "cuda/scan/many_states/launch.h"
#include "cuda/scan/many_states/plan.h"

namespace gm {
namespace {

constexpr int kStaticShared = 4 * 1024;  // bytes, at least what the kernels have

}  // namespace

const char* plan_many_states(const ScanShape& s, bool backward, ManyStatesLayout& layout) {
    if (s.states < kManyStates) return "there are fewer than 5 states";
    int room = 0;
    if (device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, room) != cudaSuccess)
        return "the device did not say how much shared memory it has";
    bool allowed = false;
    // Four states a thread make more warps of a plane, which hide what one waits for; eight need less shared memory.
    for (const int each : {4, 8}) {
        layout = ManyStatesLayout(each, s.dim, s.states, s.lanes, s.rank, backward);
        if (!layout.allowed()) continue;
        allowed = true;
        if (static_cast<int>(sizeof(float)) * layout.floats + kStaticShared <= room) return nullptr;
    }
    return allowed ? "a block of this GPU has too little shared memory"
                   : "a block does not hold the states of so many channels";
}

}  // namespace gm
