// SPDX-License-Identifier: Apache-2.0
// How a thread of the LayerNorm kernels reads and writes its token of an image, step after step.
//
// Cursor takes any image: it has both aligned and single-element accesses, behind a branch, and offsets in shared
// memory. The other cursors are for launches whose images all allow them (access_of): with short code and cheap
// addresses there are registers left for the loads of the next step. All of them give the kernels the same values, bit
// for bit.
#pragma once

#include <cstdlib>

#include "cuda/common/ptx/memory.cuh"
#include "cuda/layer_norm/tile.cuh"

namespace gm {

// Element offsets of the vectors within a token of an image. volatile, so that they are read where they are used: read
// once before the loop they would take registers that the tokens need.
template <int kVecs>
struct VectorOffsets {
    volatile int64_t of[kVecs * 32];

    __device__ void fill(const NormShape& s, const NormImage& image) {
        const int vectors = s.groups * s.group_width / kVec;
        for (int i = threadIdx.x; i < kVecs * 32; i += kNormThreads) {
            const int group = i * kVec / s.group_width;
            of[i] = i < vectors ? group * image.group + (i * kVec - group * s.group_width) : 0;
        }
    }
};

// The same number, but the compiler takes it for another one each time, so that what depends on it is computed where
// it is used: computed once before the loop it would take registers that the tokens need.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

template <class T, class Tile>
struct Cursor {
    static constexpr int kVecs = Tile::kVectors;
    using Element = std::remove_const_t<T>;
    using Stored = Packed<Element, kVec>[kVecs];

    T* p;
    int64_t step;
    const VectorOffsets<kVecs>& offsets;
    bool aligned;
    int pads;  // stored padding channels of a group

    // Fills `shared`; a __syncthreads of the caller makes it visible.
    __device__ Cursor(const NormImage& image, const NormShape& s, const Strip& strip, const Tile& tile,
                      VectorOffsets<kVecs>& shared)
        : p(static_cast<T*>(image.ptr) + strip.batch * image.batch + (strip.first + tile.row) * image.token),
          step(tile.rows * image.token),
          offsets(shared),
          aligned(image.aligned),
          pads(image.width - s.group_dim) {
        shared.fill(s, image);
    }
    // For an image with the layout of `other`'s, `distance` elements behind it.
    template <class Other>
    __device__ Cursor(const Cursor<Other, Tile>& other, int64_t distance)
        : p(const_cast<T*>(other.p) + distance),
          step(other.step),
          offsets(other.offsets),
          aligned(other.aligned),
          pads(other.pads) {}
    __device__ __forceinline__ void advance() { p += step; }
    __device__ __forceinline__ T* at(const Tile& tile, int v) const {
        return p + offsets.of[v * tile.lanes() + tile.lane];
    }

    // The thread's token as it is stored, 0 where there is none. `left` tokens of the strip are still to come.
    __device__ __forceinline__ void load(const Tile& tile, int left, Stored& out) const {
        const bool exists = tile.row < left;
        if (aligned) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v) out[v] = load_packed<kVec>(at(tile, v), exists && tile.is_channel(v, 0));
        } else {
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                Element elements[kVec];
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    elements[j] = exists && tile.is_channel(v, j) ? at(tile, v)[j] : from_float<Element>(0.f);
                memcpy(&out[v], elements, sizeof(elements));
            }
        }
    }
    __device__ __forceinline__ void widen(const Tile&, int v, const Stored& in, float (&out)[kVec]) const {
        in[v].widen(out);
    }
    // `value(vector, channels)` is called once for each vector. Also writes padding where the image has it: values are
    // 0 there.
    template <class F>
    __device__ __forceinline__ void store(const Tile& tile, const F& value) const {
        typename Tile::Values x;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) value(v, x[v]);
        if (aligned) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                store_packed<kVec>(at(tile, v), x[v], tile.exists && tile.channels[v] > -pads);
        } else {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
#pragma unroll
                for (int j = 0; j < kVec; ++j)
                    if (tile.exists && tile.channels[v] > j - pads) at(tile, v)[j] = from_float<Element>(x[v][j]);
        }
    }
};

// An aligned image. Its vectors are as far apart as their slots, except for the gap between two groups: the difference
// between the stride of the groups and their slots.
template <class T, class Tile>
struct AlignedCursor {
    static constexpr int kVecs = Tile::kVectors;
    using Element = std::remove_const_t<T>;
    using Stored = Packed<Element, kVec>[kVecs];

    T* p;
    int64_t step;
    int gap;   // in bytes: an address is then one multiplication and one 64-bit addition
    int pads;  // stored ones of a group

    __device__ AlignedCursor(const NormImage& image, const NormShape& s, const Strip& strip, const Tile& tile,
                             const VectorOffsets<kVecs>&)
        : p(static_cast<T*>(image.ptr) + strip.batch * image.batch + (strip.first + tile.row) * image.token +
            tile.lane * kVec),
          step(tile.rows * image.token),
          gap(static_cast<int>((image.group - s.group_width) * static_cast<int64_t>(sizeof(T)))),
          pads(image.width - s.group_dim) {}
    template <class Other>
    __device__ AlignedCursor(const AlignedCursor<Other, Tile>& other, int64_t distance)
        : p(const_cast<T*>(other.p) + distance), step(other.step), gap(other.gap), pads(other.pads) {}
    __device__ __forceinline__ void advance() { p += step; }
    __device__ __forceinline__ T* at(const Tile& tile, int v) const {
        // unsigned: the upper half is then a constant and not a register
        constexpr unsigned kBytes = kVec * sizeof(T);
        using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
        const int group = anew(tile.group[v]);
        // The compiler multiplies by five instructions; the one takes a register more, which rows of four vectors lack.
        const int64_t gaps = Tile::kKnowsLanes ? multiply_wide(group, gap) : static_cast<int64_t>(group) * gap;
        auto* const first = reinterpret_cast<Byte*>(p) + gaps;
        return reinterpret_cast<T*>(first + static_cast<unsigned>(v * tile.lanes()) * kBytes);
    }

    __device__ __forceinline__ void load(const Tile& tile, int left, Stored& out) const {
        const bool exists = tile.row < left;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) out[v] = load_packed<kVec>(at(tile, v), exists && tile.is_channel(v, 0));
    }
    __device__ __forceinline__ void widen(const Tile&, int v, const Stored& in, float (&out)[kVec]) const {
        in[v].widen(out);
    }
    template <class F>
    __device__ __forceinline__ void store(const Tile& tile, const F& value) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float x[kVec];
            value(v, x);
            store_packed<kVec>(at(tile, v), x, tile.exists && tile.channels[v] > -pads);
        }
    }
};

// An image of 16-bit elements that is aligned, or whose pixels start at a multiple of 4 bytes and whose groups may
// start in the middle of a 32-bit word: 87 channels a group, in pixels without padding between the groups. It moves
// whole words and shifts them into place in registers. A word that holds a wanted element is within the pixel, whose
// channels are a whole number of words.
template <class T, class Tile>
struct RowCursor : AlignedCursor<T, Tile> {
    using Base = AlignedCursor<T, Tile>;
    using Base::kVecs;
    using typename Base::Element;
    static_assert(sizeof(T) == 2, "two elements a word");
    struct Words {
        uint32_t w[3];  // four elements that start in the upper half of a word reach into a third word
    };
    using Stored = Words[kVecs];

    bool aligned;

    __device__ RowCursor(const NormImage& image, const NormShape& s, const Strip& strip, const Tile& tile,
                         const VectorOffsets<kVecs>& offsets)
        : Base(image, s, strip, tile, offsets), aligned(image.aligned) {}

    // 1 where a vector starts with the upper half of a word, else 0.
    static __device__ __forceinline__ int odd(const T* vector) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(vector) / sizeof(T)) & 1;
    }

    __device__ __forceinline__ void load(const Tile& tile, int left, Stored& out) const {
        const bool exists = tile.row < left;
        if (aligned) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                const auto whole = load_packed<kVec>(this->at(tile, v), exists && tile.is_channel(v, 0));
                out[v] = {whole.words[0], whole.words[1], 0};
            }
        } else {
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                const T* const vector = this->at(tile, v);
                const int odd = RowCursor::odd(vector);
                const auto* p = reinterpret_cast<const uint32_t*>(vector - odd);
                out[v].w[0] = exists && tile.is_channel(v, 0) ? p[0] : 0;
                out[v].w[1] = exists && tile.is_channel(v, 2 - odd) ? p[1] : 0;
                out[v].w[2] = exists && odd != 0 && tile.is_channel(v, 3) ? p[2] : 0;
            }
        }
    }
    __device__ __forceinline__ void widen(const Tile& tile, int v, const Stored& in, float (&out)[kVec]) const {
        Packed<Element, kVec> whole = {{in[v].w[0], in[v].w[1]}};
        if (!aligned) {
            const int bits = 8 * (anew(tile.group[v]) * this->gap & 2);  // 16 * odd: only gaps are not whole words
            whole.words[0] = __funnelshift_r(in[v].w[0], in[v].w[1], bits);
            whole.words[1] = __funnelshift_r(in[v].w[1], in[v].w[2], bits);
            // after the channels of a group follow those of the next
            const int channels = anew(tile.channels[v]);
            if (channels < 2) whole.words[0] &= 0xffffu;
            whole.words[1] &= channels >= 4 ? 0xffffffffu : channels == 3 ? 0xffffu : 0u;
        }
        whole.widen(out);
    }
    // A word that two vectors share is written with the second of them, which gets the element of the first by a
    // shuffle, so all lanes must be here. Words that a group shares with a neighbouring group are written by halves.
    template <class F>
    __device__ __forceinline__ void store(const Tile& tile, const F& value) const {
        if (aligned) return Base::store(tile, value);
        const int before = (tile.lane - 1) & (tile.lanes() - 1);
        uint32_t wrapped = 0;  // from the last lane's previous vector, which precedes the first lane's
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float x[kVec];
            value(v, x);
            Element elements[kVec];
#pragma unroll
            for (int j = 0; j < kVec; ++j) elements[j] = from_float<Element>(x[j]);
            uint32_t words[2];
            memcpy(words, elements, sizeof(words));
            const uint32_t passed = __shfl_sync(kFullWarp, words[1], before, tile.lanes());
            const uint32_t previous = tile.lane > 0 ? passed : wrapped;
            wrapped = passed;
            T* const vector = this->at(tile, v);
            const int odd = RowCursor::odd(vector), bits = 16 * odd;
            const int count = tile.exists ? tile.channels[v] + this->pads : 0;  // 0 or less where there is nothing
            T* const p = vector - odd;
            store_halves(p, __funnelshift_l(previous, words[0], bits),
                         count > 0 && (odd == 0 || tile.channels[v] < tile.group_dim), count > 1 - odd);
            store_halves(p + 2, __funnelshift_l(words[0], words[1], bits), count > 2 - odd, count > 3 - odd);
            if (odd != 0 && count == kVec) p[kVec] = elements[kVec - 1];
        }
    }

private:
    static __device__ __forceinline__ void store_halves(T* p, uint32_t word, bool lower, bool upper) {
        if (lower && upper) *reinterpret_cast<uint32_t*>(p) = word;
        if (lower != upper)
            reinterpret_cast<uint16_t*>(p)[upper ? 1 : 0] = static_cast<uint16_t>(upper ? word >> 16 : word);
    }
};

// The cursors of a kernel: for images that may have the layout of the residual stream's pixels, and for the others.
template <class T, class Tile, NormAccess kAccess>
using GroupCursor = std::conditional_t<kAccess == NormAccess::kAny, Cursor<T, Tile>, AlignedCursor<T, Tile>>;
template <class T, class Tile, NormAccess kAccess>
using PixelCursor =
    std::conditional_t<kAccess == NormAccess::kWords, RowCursor<T, Tile>, GroupCursor<T, Tile, kAccess>>;

// What an image allows. `pixels`: it is one that a PixelCursor goes through.
template <class T>
NormAccess access_of(const NormShape& s, const NormImage& image, bool pixels = false) {
    if (image.ptr == nullptr) return NormAccess::kAligned;
    if (std::abs(image.group - s.group_width) > INT32_MAX / static_cast<int64_t>(sizeof(T))) return NormAccess::kAny;
    if (image.aligned) return NormAccess::kAligned;
    const bool words = s.dim % 2 == 0 && image.batch % 2 == 0 && image.token % 2 == 0 &&
                       reinterpret_cast<uintptr_t>(image.ptr) % 4 == 0;
    return pixels && sizeof(T) == 2 && words ? NormAccess::kWords : NormAccess::kAny;
}

}  // namespace gm
