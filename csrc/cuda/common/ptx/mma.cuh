// SPDX-License-Identifier: Apache-2.0
// Matrix products by tensor cores. sm_90a: wgmma, by a warpgroup, asynchronous, both factors in shared memory. sm_80
// and newer: mma, by a warp, all operands in registers, with the loads (ldmatrix) that lay them out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gm {

// A panel: rows of 64 16-bit elements (128 bytes) in shared memory, swizzled. The 16-byte chunk c of row r is at place
// c ^ (r & 7), so that neither the chunks of a row nor those of a column meet in a bank. Panels begin at multiples of
// 1024 bytes.
constexpr int kPanelRow = 128;
__device__ __forceinline__ uint32_t panel_offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kPanelRow + ((chunk ^ row) & 7) * 16);
}

// Rows of 32, 64 or 128 bytes side by side in shared memory, as TMA leaves them with the swizzle of that width (chunks
// of 16 bytes exchanged by bits of their address, so any row may be a factor's first). `leading` and `stride` in bytes:
// K along the rows: any, and 8 rows; K across the rows: from one set of columns, as wide as a row, to the next, and 8
// rows.
template <int kRowBytes>
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t address, uint32_t leading) {
    constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
    static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
    return kSwizzle << 62 | uint64_t{8 * kRowBytes >> 4} << 32 | uint64_t{leading >> 4} << 16 |
           ((address & 0x3ffff) >> 4);
}

// The same of a panel, K along its rows. The next 16 elements along K begin 32 bytes, 2 units, further on.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t address) {
    return rows_descriptor<kPanelRow>(address, 16);
}

// Planes of 16-byte chunks without a swizzle: in bytes, how far the next chunk is along K; 8 rows are 128 bytes.
__device__ __forceinline__ uint64_t chunk_descriptor(uint32_t address, uint32_t plane) {
    return uint64_t{128 >> 4} << 32 | uint64_t{plane >> 4} << 16 | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last kPending groups are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The same; `ready` are then the results of a group that is.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&ready)[kCount]) {
    wgmma_wait<kPending>();
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(ready[i])::"memory");
}

// sums (64, kColumns) [+]= a (64, 16) b (kColumns, 16)^T. A thread holds, of row 16 (warp % 4) + lane / 4 [+ 8],
// columns 8 j + 2 (lane % 4) [+ 1], at index 4 j [+ 2] [+ 1]. Without `add` the sums begin at 0. In shared memory K
// runs along the rows of a factor, or across them where kAcross (rows_descriptor).
template <class T, int kColumns, bool kAcrossA = false, bool kAcrossB = kAcrossA>
struct Wgmma;

#define GM_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define GM_D16(i) GM_D4(i), GM_D4((i) + 4), GM_D4((i) + 8), GM_D4((i) + 12)
#define GM_WGMMA_OF(TYPE, COLUMNS, REGISTERS, A, B, ADD, ACROSS_A, ACROSS_B, ...)                                    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                         \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
                 ", add, 1, 1, " ACROSS_A ", " ACROSS_B ";\n}"                                                       \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kAcrossA)),                      \
                   "n"(static_cast<int>(kAcrossB)))
#define GM_WGMMA(COLUMNS, COUNT, REGISTERS, ...)                                                          \
    template <class T, bool kAcrossA, bool kAcrossB>                                                      \
    struct Wgmma<T, COLUMNS, kAcrossA, kAcrossB> {                                                        \
        static __device__ __forceinline__ void run(float (&d)[COUNT], uint64_t a, uint64_t b, bool add) { \
            if constexpr (std::is_same_v<T, __half>) {                                                    \
                GM_WGMMA_OF("f16", COLUMNS, REGISTERS, __VA_ARGS__);                                      \
            } else {                                                                                      \
                GM_WGMMA_OF("bf16", COLUMNS, REGISTERS, __VA_ARGS__);                                     \
            }                                                                                             \
        }                                                                                                 \
    };
#define GM_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GM_REGISTERS_28 GM_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27"
#define GM_REGISTERS_32 GM_REGISTERS_28 ", %28, %29, %30, %31"
#define GM_REGISTERS_36 GM_REGISTERS_32 ", %32, %33, %34, %35"
#define GM_REGISTERS_48 GM_REGISTERS_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define GM_REGISTERS_64 \
    GM_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
GM_WGMMA(32, 16, GM_REGISTERS_16, "%16", "%17", "%18", "%19", "%20", GM_D16(0))
GM_WGMMA(56, 28, GM_REGISTERS_28, "%28", "%29", "%30", "%31", "%32", GM_D16(0), GM_D4(16), GM_D4(20), GM_D4(24))
GM_WGMMA(64, 32, GM_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", GM_D16(0), GM_D16(16))
GM_WGMMA(72, 36, GM_REGISTERS_36, "%36", "%37", "%38", "%39", "%40", GM_D16(0), GM_D16(16), GM_D4(32))
GM_WGMMA(96, 48, GM_REGISTERS_48, "%48", "%49", "%50", "%51", "%52", GM_D16(0), GM_D16(16), GM_D16(32))
GM_WGMMA(128, 64, GM_REGISTERS_64, "%64", "%65", "%66", "%67", "%68", GM_D16(0), GM_D16(16), GM_D16(32), GM_D16(48))
#undef GM_D4
#undef GM_D16
#undef GM_WGMMA_OF
#undef GM_WGMMA
#undef GM_REGISTERS_16
#undef GM_REGISTERS_28
#undef GM_REGISTERS_32
#undef GM_REGISTERS_36
#undef GM_REGISTERS_48
#undef GM_REGISTERS_64

// d (16, 8) = a (16, 16) b (16, 8) + c. A lane holds of a: row lane / 4, then + 8, then both again 8 columns further
// on; of b: rows 2 (lane % 4), then + 8; of c and d: row lane / 4, then + 8. Its adjacent elements are numbers 2 (lane
// % 4) and + 1 along the other side.
template <class T>
__device__ __forceinline__ void warp_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float (&c)[4]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
}

// The same of half the depth: d (16, 8) = a (16, 8) b (8, 8) + c, of a's rows lane / 4, then + 8.
template <class T>
__device__ __forceinline__ void warp_mma(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
}

// A float as TF32 has it: rounded to 10 bits behind the first. 16-bit values are such floats as they are.
__device__ __forceinline__ float to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// d (16, 8) = a (16, 8) b (8, 8) + c in TF32, of floats that to_tf32 has rounded. A lane holds of a: row lane / 4, then
// + 8, in column lane % 4, then both 4 columns further on; of b: rows lane % 4, then + 4, in column lane / 4; of c and
// d: as warp_mma does.
__device__ __forceinline__ void warp_mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1,
                                              const float (&c)[4]) {
    const auto bits = [](float x) { return __float_as_uint(x); };
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b0)), "r"(bits(b1)), "f"(c[0]),
          "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Loads four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8, and gets elements
// 2 (l % 4) and + 1 of row l / 4 of each matrix.
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}
// Two matrices; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
}
// Transposed: lane l gets rows 2 (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// The counterpart of ldmatrix (sm_90 and newer).
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&in)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(in[0]),
                 "r"(in[1]), "r"(in[2]), "r"(in[3])
                 : "memory");
}
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&in)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(in[0]), "r"(in[1])
                 : "memory");
}

// Transposed: lane l has rows 2 (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void stmatrix_trans(uint32_t address, const uint32_t (&in)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(in[0]),
                 "r"(in[1]), "r"(in[2]), "r"(in[3])
                 : "memory");
}
__device__ __forceinline__ void stmatrix_trans(uint32_t address, const uint32_t (&in)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(in[0]), "r"(in[1])
                 : "memory");
}

// Transposes a matrix of 8 rows of 8 elements that the warp holds: lane l has elements 2 (l % 4) and + 1 of row l / 4.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t pair) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

// Two floats as one 32-bit word of 16-bit elements, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

}  // namespace gm
