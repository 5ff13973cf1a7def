// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/common/ptx/mma.cuh: products by a warp or a warpgroup, and the moves of matrices between the
// lanes of a warp and shared memory. Sums are float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/ptx/tma.cuh"

namespace gm {

// 16-bit elements ---------------------------------------------------------------------------------------------

inline uint32_t pair_of(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }
inline uint16_t element_of(uint32_t pair, int i) { return static_cast<uint16_t>(pair >> 16 * i); }

template <class T>
float widened(uint16_t bits) {
    T v;
    std::memcpy(&v, &bits, 2);
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(v);
    else
        return __bfloat162float(v);
}

template <class T>
uint32_t pack_pair(float low, float high) {
    const auto bits = [](float x) {
        uint16_t out;
        if constexpr (std::is_same_v<T, __half>) {
            const __half v = __float2half_rn(x);
            std::memcpy(&out, &v, 2);
        } else {
            const __nv_bfloat16 v = __float2bfloat16_rn(x);
            std::memcpy(&out, &v, 2);
        }
        return out;
    };
    return pair_of(bits(low), bits(high));
}

// d (16, 8) = a (16, 8 kOctets) b (8 kOctets, 8) + c, of matrices of 8 by 8: of a the two of the first 8 columns, then
// those of the next; of b, c and d from the top. A lane has elements 2 (lane % 4) and + 1 of row lane / 4 of a, c and
// d, of column lane / 4 of b.
template <class T, int kOctets>
void warp_products(float (&d)[4], const uint32_t* a, const uint32_t* b, const float (&c)[4]) {
    emulation::Warp& warp = *emulation::self().warp;
    const int lane = static_cast<int>(emulation::self().lane), row = lane / 4, column = lane % 4 * 2;
    constexpr int kOfA = 4 * kOctets;
    for (int i = 0; i < kOfA; ++i) warp.factors[lane][i] = widened<T>(element_of(a[i / 2], i % 2));
    for (int i = 0; i < 2 * kOctets; ++i) warp.factors[lane][kOfA + i] = widened<T>(element_of(b[i / 2], i % 2));
    emulation::wait(warp.barrier);
    for (int i = 0; i < 4; ++i) {
        float sum = c[i];
        for (int k = 0; k < 8 * kOctets; ++k)
            sum += warp.factors[row * 4 + k % 8 / 2][k / 8 * 4 + i / 2 * 2 + k % 2] *
                   warp.factors[(column + i % 2) * 4 + k % 8 / 2][kOfA + k / 8 * 2 + k % 2];
        d[i] = sum;
    }
    emulation::wait(warp.barrier);
}
template <class T>
void warp_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    const uint32_t b[2] = {b0, b1};
    warp_products<T, 2>(d, a, b, c);
}
template <class T>
void warp_mma(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
    warp_products<T, 1>(d, a, &b, c);
}

// Matrices of 8 rows of 8 elements ------------------------------------------------------------------------------

// visit(number of a matrix, address in shared memory of its row `row`), where lane l says that of row l % 8 of matrix
// l / 8.
template <class F>
void visit_matrices(uint32_t address, int matrices, F&& visit) {
    emulation::Warp& warp = *emulation::self().warp;
    warp.values[emulation::self().lane] = address;
    emulation::wait(warp.barrier);
    for (int i = 0; i < matrices; ++i)
        visit(i, [&warp, i](int row) {
            return reinterpret_cast<uint16_t*>(shared_memory(warp.values[i * 8 + row], 16, 16));
        });
    emulation::wait(warp.barrier);
}

template <int kMatrices>
void ldmatrix(uint32_t (&out)[kMatrices], uint32_t address) {
    const int row = static_cast<int>(emulation::self().lane / 4), column = emulation::self().lane % 4 * 2;
    visit_matrices(address, kMatrices, [&](int i, auto row_of) {
        const uint16_t* const from = row_of(row);
        out[i] = pair_of(from[column], from[column + 1]);
    });
}
template <int kMatrices>
void ldmatrix_trans(uint32_t (&out)[kMatrices], uint32_t address) {
    const int column = static_cast<int>(emulation::self().lane / 4), row = emulation::self().lane % 4 * 2;
    visit_matrices(address, kMatrices,
                   [&](int i, auto row_of) { out[i] = pair_of(row_of(row)[column], row_of(row + 1)[column]); });
}
template <int kMatrices>
void store_matrices(uint32_t address, const uint32_t (&in)[kMatrices]) {
    const int row = static_cast<int>(emulation::self().lane / 4), column = emulation::self().lane % 4 * 2;
    visit_matrices(address, kMatrices, [&](int i, auto row_of) {
        uint16_t* const to = row_of(row);
        to[column] = element_of(in[i], 0), to[column + 1] = element_of(in[i], 1);
    });
}
inline void stmatrix(uint32_t address, const uint32_t (&in)[4]) { store_matrices(address, in); }
inline void stmatrix(uint32_t address, const uint32_t (&in)[2]) { store_matrices(address, in); }

template <int kMatrices>
void stmatrix_trans(uint32_t address, const uint32_t (&in)[kMatrices]) {
    const int column = static_cast<int>(emulation::self().lane / 4), row = emulation::self().lane % 4 * 2;
    visit_matrices(address, kMatrices, [&](int i, auto row_of) {
        row_of(row)[column] = element_of(in[i], 0), row_of(row + 1)[column] = element_of(in[i], 1);
    });
}

inline uint32_t movmatrix_trans(uint32_t pair) {
    const int column = static_cast<int>(emulation::self().lane / 4), row = emulation::self().lane % 4 * 2;
    const uint32_t upper = emulation::shuffle(pair, row * 4 + column / 2),
                   lower = emulation::shuffle(pair, (row + 1) * 4 + column / 2);
    return pair_of(element_of(upper, column % 2), element_of(lower, column % 2));
}

// By a warpgroup, both factors in shared memory -----------------------------------------------------------------

// What a descriptor says: bytes from one set of columns to the next, from 8 rows to the next 8, and of a row, which is
// what the swizzle exchanges chunks in; 16 where there is none.
struct Factor {
    uint32_t address, leading, stride, row;

    explicit Factor(uint64_t descriptor)
        : address((descriptor & 0x3fff) << 4),
          leading((descriptor >> 16 & 0x3fff) << 4),
          stride((descriptor >> 32 & 0x3fff) << 4),
          row(descriptor >> 62 == 0 ? 16 : 256u >> (descriptor >> 62)) {}

    // Element k of row (of the product) i.
    template <class T>
    float at(int i, int k, bool across) const {
        // Along the rows a set is as wide as one; the next 8 elements without a swizzle are `leading` away.
        uint32_t place = across      ? i / (row / 2) * leading + k / 8 * stride + k % 8 * row + i % (row / 2) * 2
                         : row == 16 ? i / 8 * stride + i % 8 * row + k / 8 * leading + k % 8 * 2
                                     : i / 8 * stride + i % 8 * row + k * 2;
        place += address;
        if (row > 16) place ^= (place >> 7 & (row / 16 - 1)) << 4;
        return widened<T>(*reinterpret_cast<const uint16_t*>(shared_memory(place, 2, 2)));
    }
};

constexpr int kPanelRow = 128;
inline uint32_t panel_offset(int row, int chunk) { return row * kPanelRow + ((chunk ^ row) & 7) * 16; }
inline uint64_t descriptor_of(uint64_t swizzle, uint32_t address, uint32_t leading, uint32_t stride) {
    return swizzle << 62 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (address & 0x3ffff) >> 4;
}
inline uint64_t panel_descriptor(uint32_t address) { return descriptor_of(1, address, 16, 1024); }
template <int kRowBytes>
uint64_t rows_descriptor(uint32_t address, uint32_t leading) {
    return descriptor_of(kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3, address, leading, 8 * kRowBytes);
}
inline uint64_t chunk_descriptor(uint32_t address, uint32_t plane) { return descriptor_of(0, address, plane, 128); }

inline void wgmma_fence() {}
inline void wgmma_commit() { emulation::self().products.emplace_back(); }
// Products are done when their warp waits for them: the latest moment.
template <int kPending>
void wgmma_wait() {
    auto& groups = emulation::self().products;  // the last one is still open
    while (groups.size() > kPending + 1) {
        for (const auto& product : groups.front()) product();
        groups.pop_front();
    }
    emulation::wait(emulation::self().warp->barrier);
}
template <int kPending, int kCount>
void wgmma_wait(float (&)[kCount]) {
    wgmma_wait<kPending>();
}

template <class T, int kColumns, bool kAcrossA = false, bool kAcrossB = kAcrossA>
struct Wgmma {
    static void run(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
        float* const sums = d;
        emulation::self().products.back().push_back([=] {
            const Factor left(a), right(b);
            const int lane = static_cast<int>(emulation::self().lane), warp = emulation::self().index.x / 32 % 4;
            float rows[2][16];
            for (int half = 0; half < 2; ++half)
                for (int k = 0; k < 16; ++k) rows[half][k] = left.at<T>(16 * warp + lane / 4 + 8 * half, k, kAcrossA);
            for (int i = 0; i < kColumns / 2; ++i) {
                const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                float sum = add ? sums[i] : 0.f;
                for (int k = 0; k < 16; ++k) sum += rows[i / 2 % 2][k] * right.at<T>(column, k, kAcrossB);
                sums[i] = sum;
            }
        });
    }
};

// TF32 ------------------------------------------------------------------------------------------------------------

inline float to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

inline void warp_mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1, const float (&c)[4]) {
    emulation::Warp& warp = *emulation::self().warp;
    const int lane = static_cast<int>(emulation::self().lane), row = lane / 4, column = lane % 4;
    const float own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < 6; ++i) {  // tensor cores do not see the last 13 bits
        warp.factors[lane][i] = __uint_as_float(__float_as_uint(own[i]) & 0xffffe000u);
        if (own[i] != own[i]) warp.factors[lane][i] = own[i];
    }
    emulation::wait(warp.barrier);
    for (int i = 0; i < 4; ++i) {
        d[i] = c[i];
        for (int k = 0; k < 8; ++k)
            d[i] += warp.factors[row * 4 + k % 4][k / 4 * 2 + i / 2] *
                    warp.factors[(2 * column + i % 2) * 4 + k % 4][4 + k / 4];
    }
    emulation::wait(warp.barrier);
}

}  // namespace gm
