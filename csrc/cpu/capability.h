// SPDX-License-Identifier: Apache-2.0
// Which build of the CPU kernels runs here. Torch-free.
#pragma once

namespace gm::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The widest instruction set that this machine and GROUPMAMBA_CPU_CAPABILITY (baseline, avx2 or avx512; unset: any)
// both allow. Throws std::runtime_error for another value of the variable, or one that the machine cannot run.
Capability capability();

// Its name: "baseline", "avx2" or "avx512".
const char* cpu_capability();

// Who made the processor: "amd", "intel" or "other". Which library has the faster matrix products depends on it.
const char* cpu_vendor();

#if defined(__x86_64__)
#define GM_CPU_KERNEL(name) \
    ::gm::cpu::choose(&::gm::cpu::baseline::name, &::gm::cpu::avx2::name, &::gm::cpu::avx512::name)
#else
#define GM_CPU_KERNEL(name) (&::gm::cpu::baseline::name)
#endif

template <class Function>
Function choose(Function baseline, Function avx2, Function avx512) {
    switch (capability()) {
        case Capability::kAvx512: return avx512;
        case Capability::kAvx2: return avx2;
        default: return baseline;
    }
}

}  // namespace gm::cpu
