// SPDX-License-Identifier: Apache-2.0
// TMA (the Tensor Memory Accelerator of sm_90 and newer) and mbarriers: one thread issues, all wait.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace gm {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait_%=:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra wait_%=;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Fetches a tensor map into TMA's cache, so that the first copy does not wait for it.
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

struct Coordinates {  // of the first element of a box, fastest dimension first
    int c0, c1, c2, c3, c4;
};

__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, const Coordinates& c,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c.c0), "r"(c.c1), "r"(c.c2), "r"(c.c3), "r"(c.c4)
        : "memory");
}

// `bytes` must be a multiple of 16, and both addresses too.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// Elements of the box outside the tensor are not written.
__device__ __forceinline__ void tma_store(uint32_t shared, const CUtensorMap* map, const Coordinates& c) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(shared),
        "l"(map), "r"(c.c0), "r"(c.c1), "r"(c.c2), "r"(c.c3), "r"(c.c4)
        : "memory");
}

__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until committed stores have read shared memory.
__device__ __forceinline__ void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Orders a thread's ordinary writes to shared memory before the reads of TMA; a barrier must follow.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace gm
