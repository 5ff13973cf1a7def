// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/tma.cuh: loads are done when they are issued, stores when they are waited for.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace gm {

inline unsigned char* shared_memory(uint32_t address) { return emulation::self().block->shared + address; }
inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulation::self().block->shared);
}

inline void mbarrier_init(uint32_t barrier, int arrivals) { emulation::init_mbarrier(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) { emulation::change_mbarrier(barrier, 1, bytes); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulation::wait_mbarrier(barrier, parity); }

struct Coordinates {  // of the first element of a box, fastest dimension first
    int c0, c1, c2, c3, c4;
};

// visit(number of the element in the box, its address in the tensor or null outside)
template <class F>
void visit_box(const CUtensorMap& map, const Coordinates& c, F&& visit) {
    int64_t number = 0;
    for (int64_t k = 0; k < map.box[2]; ++k)
        for (int64_t j = 0; j < map.box[1]; ++j)
            for (int64_t i = 0; i < map.box[0]; ++i, ++number) {
                const int64_t at[5] = {c.c0 + i, c.c1 + j, c.c2 + k, c.c3, c.c4};
                bool inside = true;
                int64_t offset = 0;
                for (int d = 0; d < 5; ++d)
                    inside = inside && at[d] >= 0 && at[d] < map.sizes[d], offset += at[d] * map.strides[d];
                visit(number, inside ? reinterpret_cast<uint16_t*>(map.base) + offset : nullptr);
            }
}
inline void tma_prefetch_map(const CUtensorMap*) {}
inline void tma_load(uint32_t shared, const CUtensorMap* map, const Coordinates& c, uint32_t barrier) {
    auto* const to = reinterpret_cast<uint16_t*>(shared_memory(shared));
    int64_t bytes = 0;
    visit_box(*map, c, [&](int64_t i, const uint16_t* from) { to[i] = from == nullptr ? 0 : *from, bytes += 2; });
    emulation::change_mbarrier(barrier, 0, -bytes);
}
inline void tma_store(uint32_t shared, const CUtensorMap* map, const Coordinates& c) {
    auto* const from = reinterpret_cast<const uint16_t*>(shared_memory(shared));
    emulation::self().stores.push_back([=] {
        visit_box(*map, c, [&](int64_t i, uint16_t* to) {
            if (to != nullptr) *to = from[i];
        });
    });
}
inline void tma_commit() {}
inline void tma_wait_read() { emulation::finish_stores(); }
inline void fence_proxy_async() {}

}  // namespace gm
