// SPDX-License-Identifier: Apache-2.0
// Finds the widest instruction set once per process.
#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gm::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Capability of_machine() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Every processor with avx2 has f16c, a name that compilers before GCC 11 do not know here.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) return avx512 ? Capability::kAvx512 : Capability::kAvx2;
#endif
    return Capability::kBaseline;
}

Capability find() {
    const Capability machine = of_machine();
    const char* wanted = std::getenv("GROUPMAMBA_CPU_CAPABILITY");
    if (wanted == nullptr || *wanted == '\0') return machine;
    for (int i = 0; i <= static_cast<int>(machine); ++i) {
        if (std::string(wanted) == kNames[i]) return static_cast<Capability>(i);
    }
    throw std::runtime_error(std::string("groupmamba: GROUPMAMBA_CPU_CAPABILITY is '") + wanted +
                             "'; this machine runs " + kNames[static_cast<int>(machine)] +
                             " and what comes before it in: baseline, avx2, avx512");
}

}  // namespace

Capability capability() {
    static const Capability found = find();
    return found;
}

const char* cpu_capability() { return kNames[static_cast<int>(capability())]; }

const char* cpu_vendor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return "amd";
    if (__builtin_cpu_is("intel")) return "intel";
#endif
    return "other";
}

}  // namespace gm::cpu
