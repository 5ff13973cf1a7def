// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch (PDL, compute capability 9.0 and newer): the blocks of a kernel may start while the
// last blocks of the kernel before it still run, which saves about a microsecond between two kernels.
#pragma once

namespace gm {

// Lets the blocks of the next kernel start.
__device__ __forceinline__ void pdl_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until everything that earlier kernels write is written.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace gm
