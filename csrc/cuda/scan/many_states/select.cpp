// SPDX-License-Identifier: Apache-2.0
// Which scans the kernels for several states take, and how many states a thread has.
#include "cuda/common/device.h"
#include "cuda/scan/many_states/launch.h"
#include "cuda/scan/many_states/plan.h"

namespace gm {
namespace {

constexpr int kStaticShared = 4 * 1024;  // bytes of a block, at least what the kernels have
constexpr int kReservedShared = 1024;    // bytes of a block that the driver takes
constexpr int kRegisters = 64 * 1024;    // of a multiprocessor
constexpr int kThreads = 1536;           // of a multiprocessor, on the smallest of them
constexpr float kFewestWarps = 6.f;      // with fewer the portable kernel is faster (H200)

// How fast a pass is (H200): in proportion to the warps of a multiprocessor, up to `enough` of them, and to what is
// left of their work where 2, 4, 8 or 16 threads of a channel have to add up their parts.
struct Model {
    int enough;
    float left[4];
};
constexpr Model kForward{16, {1.f, 0.78f, 0.53f, 0.33f}}, kBackward{10, {1.f, 1.f, 0.82f, 0.62f}};

struct Room {
    int multiprocessors = 0, of_block = 0, of_multiprocessor = 0;  // shared memory in bytes

    bool ask() {
        return multiprocessors_of_device(multiprocessors) == cudaSuccess &&
               device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, of_block) == cudaSuccess &&
               device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, of_multiprocessor) == cudaSuccess;
    }
};

int shared_bytes(const ManyStatesLayout& layout) {
    return static_cast<int>(sizeof(float)) * layout.floats + kStaticShared;
}

// Warps that a multiprocessor holds at a time where `planes` blocks are to run.
int resident_warps(const ManyStatesLayout& layout, bool backward, int64_t planes, const Room& room) {
    const int registers = layout.each == 8 && backward ? 176 : 128;
    const int64_t share = (planes + room.multiprocessors - 1) / room.multiprocessors;
    const int fit = std::min({room.of_multiprocessor / (shared_bytes(layout) + kReservedShared),
                              kRegisters / (layout.threads * registers), kThreads / layout.threads});
    return static_cast<int>(std::min<int64_t>(share, std::max(fit, 1))) * layout.threads / 32;
}

}  // namespace

const char* plan_many_states(const ScanShape& s, bool backward, ManyStatesLayout& layout) {
    if (s.states < kManyStates) return "there are fewer than 5 states";
    Room room;
    if (!room.ask()) return "the device did not say what room it has";
    const Model& model = backward ? kBackward : kForward;
    float best = 0.f, used = 0.f;
    bool allowed = false;
    for (const int each : {8, 4, 2}) {
        const ManyStatesLayout tried(each, s.dim, s.states, s.lanes, s.rank, backward);
        if (!tried.allowed() || tried.row >= 2 * s.states) continue;
        allowed = true;
        if (shared_bytes(tried) > room.of_block) continue;
        const int warps = resident_warps(tried, backward, s.batch * s.groups, room);
        const int lanes = tried.lanes <= 2 ? 0 : tried.lanes == 4 ? 1 : tried.lanes == 8 ? 2 : 3;
        const float speed = model.left[lanes] * static_cast<float>(std::min(warps, model.enough));
        if (speed <= best) continue;
        best = speed, layout = tried;
        used = static_cast<float>(warps * s.states) / static_cast<float>(tried.row);
    }
    if (!allowed) return "a block does not hold the states of so many channels";
    if (best == 0.f) return "a block of this GPU has too little shared memory";
    return used < kFewestWarps ? "too few planes and channels to occupy this GPU" : nullptr;
}

}  // namespace gm
