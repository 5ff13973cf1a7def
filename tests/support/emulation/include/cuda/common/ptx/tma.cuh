// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/tma.cuh: loads are done when they are issued, stores when they are waited for.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace gm {

// An address that is aligned, and from which on the block has `bytes`; else the launch fails.
inline unsigned char* shared_memory(uint32_t address, size_t bytes, uint32_t alignment) {
    const emulation::Block& block = *emulation::self().block;
    const char* const problem = address % alignment != 0 ? "an address in shared memory that is not aligned"
                                : address + bytes > block.shared_bytes ? "an address beyond the shared memory"
                                                                       : nullptr;
    if (problem != nullptr) emulation::fail(problem);
    return block.shared + (problem == nullptr ? address : 0);
}
inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulation::self().block->shared);
}

inline void mbarrier_init(uint32_t barrier, int arrivals) { emulation::init_mbarrier(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) { emulation::change_mbarrier(barrier, 1, bytes); }
inline void mbarrier_arrive(uint32_t barrier) { emulation::change_mbarrier(barrier, 1, 0); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulation::wait_mbarrier(barrier, parity); }

struct Coordinates {  // of the first element of a box, fastest dimension first
    int c0, c1, c2, c3, c4;
};

// Where TMA puts what would be at this address without a swizzle: the number of a 16-byte chunk among those of 128, 64
// or 32 bytes, XOR the last bits of the number of its 128 bytes.
inline uint32_t swizzled(CUtensorMapSwizzle swizzle, uint32_t address) {
    const uint32_t chunks = (1u << swizzle) - 1;
    return address ^ (address >> 7 & chunks) << 4;
}

// visit(the element's place in shared memory, its address in the tensor or null outside)
template <class F>
void visit_box(const CUtensorMap& map, const Coordinates& c, uint32_t shared, F&& visit) {
    int64_t elements = 1;
    for (const int64_t size : map.box) elements *= size;
    shared = shared_address(shared_memory(shared, elements * 2, 128));
    for (int64_t k = 0; k < map.box[2]; ++k)
        for (int64_t j = 0; j < map.box[1]; ++j)
            for (int64_t i = 0; i < map.box[0]; ++i, shared += 2) {
                const int64_t at[5] = {c.c0 + i, c.c1 + j, c.c2 + k, c.c3, c.c4};
                bool inside = true;
                int64_t offset = 0;
                for (int d = 0; d < 5; ++d)
                    inside = inside && at[d] >= 0 && at[d] < map.sizes[d], offset += at[d] * map.strides[d];
                visit(reinterpret_cast<uint16_t*>(emulation::self().block->shared + swizzled(map.swizzle, shared)),
                      inside ? reinterpret_cast<uint16_t*>(map.base) + offset : nullptr);
            }
}
inline void tma_prefetch_map(const CUtensorMap*) {}
inline void tma_load(uint32_t shared, const CUtensorMap* map, const Coordinates& c, uint32_t barrier) {
    int64_t bytes = 0;
    visit_box(*map, c, shared,
              [&](uint16_t* to, const uint16_t* from) { *to = from == nullptr ? 0 : *from, bytes += 2; });
    emulation::change_mbarrier(barrier, 0, -bytes);
}
inline void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
        return emulation::fail("a bulk load that is not of whole 16 bytes");
    std::memcpy(shared_memory(shared, bytes, 16), global, bytes);
    emulation::change_mbarrier(barrier, 0, -static_cast<int64_t>(bytes));
}
// An H200 took stores of rows wholly outside an image for illegal instructions. Behind the end of the first two
// dimensions it writes nothing: there some stores of the scan are, which its tests have run on H200s.
inline bool takes_store(const CUtensorMap& map, const Coordinates& c) {
    const int at[5] = {c.c0, c.c1, c.c2, c.c3, c.c4};
    for (int d = 0; d < 5; ++d)
        if (at[d] + map.box[d] <= 0 || (d > 1 && at[d] >= map.sizes[d])) return false;
    return true;
}
inline void tma_store(uint32_t shared, const CUtensorMap* map, const Coordinates& c) {
    if (!takes_store(*map, c)) return emulation::fail("a TMA store wholly outside its tensor");
    emulation::self().stores.push_back([shared, map = *map, c] {
        visit_box(map, c, shared, [](const uint16_t* from, uint16_t* to) {
            if (to != nullptr) *to = *from;
        });
    });
}
inline void tma_commit() {}
inline void tma_wait_read() { emulation::finish_stores(); }
inline void fence_proxy_async() {}

}  // namespace gm
