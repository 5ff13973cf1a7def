// SPDX-License-Identifier: Apache-2.0
// Shared by the depthwise convolutions by tensor cores, sm_90, 16-bit storage (fwd_sm90.cu, bwd_sm90.cu).
//
// A depthwise convolution has no sum over channels, which a matrix product needs. It gets one here: 16 pixels of 8
// channels at two taps side by side, (16, 16), times (16, 8), the weights of the two taps on the diagonals of two (8,
// 8) matrices. An eighth of the multiplications counts, but one instruction of tensor cores does what eight of single
// threads would, on pixels as they lie in memory, without widening them first. The products add up in float32; float32
// weights are rounded to bfloat16 (float16 images come with float16 weights alone).
//
// A warp has 8 channels of 16 adjacent columns and goes down the rows of whole images. The rows of a block's 8 warps
// come and go by TMA, some at a time; what is outside the image is read as 0 and not written, so that no pixel needs a
// comparison.
//
// A value that is not finite spreads over the 8 channels of a warp, since 0 times it is NaN.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/depthwise_conv/args.h"

namespace gm {

constexpr int kOctet = 8;  // channels of a warp
constexpr int kConvSm90Threads = kConvSm90Warps * 32;

// Rows of pixels of kOctets x 8 channels in shared memory, as the swizzle of TMA has them. Each begins at a multiple of
// 1024 bytes.
template <int kOctetsOfPixel>
struct PixelRow {
    static constexpr int kOctets = kOctetsOfPixel, kPixel = kOctets * 16;  // bytes
    static constexpr CUtensorMapSwizzle kSwizzle = kOctets == 8   ? CU_TENSOR_MAP_SWIZZLE_128B
                                                   : kOctets == 4 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
    static constexpr int bytes(int pixels) { return (pixels * kPixel + 1023) / 1024 * 1024; }
    // Where 8 channels of a pixel are. Those of 8 adjacent pixels fill all banks.
    static __device__ __forceinline__ uint32_t offset(int pixel, int octet) {
        constexpr int kShift = kOctets == 8 ? 0 : kOctets == 4 ? 1 : 2;
        return pixel * kPixel + ((octet ^ pixel >> kShift) & (kOctets - 1)) * 16;
    }
};

// What a block owns, and what one of its warps: kOctets x 8 channels of tiles of kColumns columns.
template <int kOctets, int kColumns>
struct ConvPlace {
    int warp, lane, octet, tile;  // of the block's
    int group, segment;
    int block_channel, channel, block_column, column;  // first ones, of the block and of the warp
    int batch, batch_end;
    bool idle;  // the warp has no pixels

    __device__ ConvPlace(const ConvShape& s, const ConvSm90Plan& plan, unsigned block = blockIdx.x) {
        // The same for all threads of a warp; the shuffle lets the compiler know.
        warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
        octet = warp % kOctets, tile = warp / kOctets;
        unsigned rest = block;
        const auto next = [&rest](int count) {
            const int i = rest % count;
            rest /= count;
            return i;
        };
        block_channel = next(plan.chunks) * kOctets * kOctet, channel = block_channel + octet * kOctet;
        block_column = next(plan.column_blocks) * (kConvSm90Warps / kOctets) * kColumns;
        column = block_column + tile * kColumns;
        group = next(s.groups), segment = static_cast<int>(rest);
        batch = segment * plan.images, batch_end = static_cast<int>(min(batch + int64_t{plan.images}, s.batch));
        idle = channel >= s.dim || column >= s.width;
    }
};

// The weights that a lane holds of both (8, 8) matrices: rows 2 t and 2 t + 1 of column g, an element of the diagonal
// or none, where g = lane / 4 and t = lane % 4.
template <class T, class Place>
__device__ __forceinline__ void load_diagonals(const ParamArg& weight, int dim, const Place& at,
                                               uint32_t (&diagonals)[3][3]) {
    const int g = at.lane / 4, t = at.lane % 4;
    const int64_t first = (static_cast<int64_t>(at.group) * dim + at.channel + g) * kConvTaps;
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            const float w = g / 2 == t && !at.idle ? load_param<T>(weight, first + i * 3 + j) : 0.f;
            diagonals[i][j] = g % 2 == 0 ? pack_pair<T>(w, 0.f) : pack_pair<T>(0.f, w);
        }
}
// The bias as sums to begin with. Kept in four registers as they are, or each row would make them anew.
template <class T, class Place>
__device__ __forceinline__ void load_bias(const ParamArg& bias, int dim, const Place& at, float (&sums)[4]) {
    const int64_t first = static_cast<int64_t>(at.group) * dim + at.channel + at.lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) sums[j] = sums[j + 2] = at.idle ? 0.f : load_param_or<T>(bias, first + j, 0.f);
    asm volatile("" : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]));
}

// What a row of pixels, at the outer two and at the inner tap, adds to the sums of three rows: to[k] = from[k] + the
// products with row rows[k] of the taps. The outer products of all three come first, and `between` behind them: what
// waits for none of them fills the time that they take.
template <class T, class F>
__device__ __forceinline__ void add_taps(float (*const (&to)[3])[4], const float (*const (&from)[3])[4],
                                         const uint32_t (&outer)[4], const uint32_t (&inner)[2],
                                         const uint32_t (&diagonals)[3][3], const int (&rows)[3], F&& between) {
#pragma unroll
    for (int k = 0; k < 3; ++k) warp_mma<T>(*to[k], outer, diagonals[rows[k]][0], diagonals[rows[k]][2], *from[k]);
    between();
#pragma unroll
    for (int k = 0; k < 3; ++k) warp_mma<T>(*to[k], inner, diagonals[rows[k]][1], *to[k]);
}

// What a warp loads next, by its first thread: kRows rows from `row` on, and of the next images, `rows` of each;
// nothing of those whose branch is dropped. The rows of the image are `above` further up.
struct RowLoads {
    int channel, column, group, batch, batch_end, row = 0;

    __device__ __forceinline__ void skip_dropped(const DropPathArg& drop_path) {
        while (batch < batch_end && !keeps_branch(drop_path, batch)) ++batch;
    }
    template <int kRows>
    __device__ __forceinline__ void next(const DropPathArg& drop_path, int rows, const CUtensorMap* map, int above,
                                         uint32_t to, int pitch, int bytes, uint32_t barrier) {
        if (batch >= batch_end) return;
        if (threadIdx.x % 32 == 0) {
            mbarrier_expect(barrier, kRows * bytes);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
                tma_load(to + i * pitch, map, {channel, column, row - above + i, group, batch}, barrier);
        }
        row += kRows;
        if (row >= rows) row = 0, ++batch, skip_dropped(drop_path);
    }
};

// Stores kRows rows from `row` on, those that the image has: a store wholly above or below it is an illegal
// instruction.
template <int kRows>
__device__ __forceinline__ void store_rows(const CUtensorMap* map, uint32_t from, int pitch, int height, int channel,
                                           int column, int row, int group, int batch) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
        if (row + i >= 0 && row + i < height)
            tma_store(from + i * pitch, map, {channel, column, row + i, group, batch});
    tma_commit();
}

// 0 for what a block owns of an image whose branch is dropped.
template <class T>
__device__ __noinline__ void clear_image(const ImageArg& image, const ConvShape& s, int batch, int group, int channel,
                                         int column, int channels, int columns) {
    const int octets = min(s.dim - channel, channels) / kOctet;
    columns = min(s.width - column, columns);
    T* const first = static_cast<T*>(image.ptr) + batch * image.batch + group * image.group + channel;
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.height) * columns * octets; i += kConvSm90Threads) {
        const int64_t pixel = i / octets, token = pixel / columns * s.width + column + pixel % columns;
        *reinterpret_cast<uint4*>(first + token * image.token + i % octets * kOctet) = uint4{};
    }
}

// The map of single rows of `columns` pixels.
template <class Row>
bool encode_rows(CUtensorMap& map, const ImageArg& image, const ConvShape& s, int columns, DType dtype) {
    const TensorMapShape shape{{s.dim, s.width, s.height, s.groups, s.batch},
                               {image.token, image.token * s.width, image.group, image.batch},
                               {Row::kOctets * kOctet, columns, 1}};
    return encode_tensor_map(map, image.ptr, dtype, shape, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, Row::kSwizzle);
}

// Calls f(type tag, octets of a pixel, activation) with integral constants; not for float. The plan has no fewer octets
// than kLeast.
template <int kLeast, class F>
cudaError_t dispatch_conv_sm90(DType dtype, int octets, Activation activation, F&& f) {
    const auto with_activation = [&](auto tag, auto octets) {
        switch (activation) {
            case Activation::kSilu: return f(tag, octets, std::integral_constant<Activation, Activation::kSilu>{});
            case Activation::kGelu: return f(tag, octets, std::integral_constant<Activation, Activation::kGelu>{});
            default: return f(tag, octets, std::integral_constant<Activation, Activation::kNone>{});
        }
    };
    return dispatch_dtype(dtype, [&](auto tag) {
        if constexpr (std::is_same_v<typename decltype(tag)::type, float>) {
            return cudaErrorInvalidValue;
        } else {
            if constexpr (kLeast == 2)
                if (octets == 2) return with_activation(tag, std::integral_constant<int, 2>{});
            return octets == 8 ? with_activation(tag, std::integral_constant<int, 8>{})
                               : with_activation(tag, std::integral_constant<int, 4>{});
        }
    });
}

}  // namespace gm
