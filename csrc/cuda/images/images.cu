// SPDX-License-Identifier: Apache-2.0
// Images stored one after another: their sum, in float32, rounded once; zeros in some of them. Rows copied to longer
// or shorter ones.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/packed.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/images/launch.h"

namespace gm {
namespace {

constexpr int kThreads = 256;

// The row of element `i`, of rows of `width` elements; by a division of 32 bits where that is enough.
__device__ __forceinline__ int64_t row_of(int64_t i, int width) {
    return (i >> 32) == 0 ? static_cast<uint32_t>(i) / static_cast<uint32_t>(width) : i / width;
}

template <class T, int kCount, bool kRows>
__global__ void __launch_bounds__(kThreads, 3) sum_images_kernel(const __grid_constant__ SumImagesArgs args) {
    begin_kernel();
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
    if (i >= args.count) return;
    const T* const from =
        static_cast<const T*>(args.in) + i + (kRows ? row_of(i, args.channels) * (args.pitch - args.channels) : 0);
    float sum[kCount] = {};
    if constexpr (kCount == 1) {
        load_ahead(
            0, args.parts, 1, [&](int k) { return to_float(from[k * args.stride]); },
            [&](float v, int) { sum[0] += v; });
        static_cast<T*>(args.out)[i] = from_float<T>(sum[0]);
    } else {
        load_ahead(
            0, args.parts, 1, [&](int k) { return load_packed<kCount>(from + k * args.stride, true); },
            [&](const Packed<T, kCount>& words, int) {
                float v[kCount];
                words.widen(v);
#pragma unroll
                for (int j = 0; j < kCount; ++j) sum[j] += v[j];
            });
        store_packed<kCount>(static_cast<T*>(args.out) + i, sum, true);
    }
}

constexpr int kClearedByBlock = 16 * kThreads * 8;  // bytes

__global__ void __launch_bounds__(kThreads) clear_images_kernel(const __grid_constant__ ClearImagesArgs args) {
    begin_kernel();
    const int64_t blocks = (args.bytes + kClearedByBlock - 1) / kClearedByBlock, image = blockIdx.x / blocks;
    if (keeps_branch(args.drop_path, image)) return;
    const int64_t first = (blockIdx.x - image * blocks) * kClearedByBlock;
    const int64_t end = min(args.bytes, first + kClearedByBlock);
    for (int64_t i = first + threadIdx.x * 16; i < end; i += kThreads * 16)
        *reinterpret_cast<uint4*>(static_cast<char*>(args.images) + image * args.bytes + i) = make_uint4(0, 0, 0, 0);
}

constexpr int kCopyUnits = 4;  // of a thread: that many loads in flight

// Units of kVec elements, kCount of which are read at once. With kCount 1 a unit may begin in one row and end in the
// next.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const __grid_constant__ CopyRowsArgs args) {
    begin_kernel();
    const int64_t elements = args.rows * args.width, units = (elements + kVec - 1) / kVec;
    const int64_t blocks = (units + kCopyUnits * kThreads - 1) / (kCopyUnits * kThreads), image = blockIdx.x / blocks;
    const int64_t first = (blockIdx.x - image * blocks) * (kCopyUnits * kThreads) + threadIdx.x;
    Packed<T, kVec> words[kCopyUnits];
#pragma unroll
    for (int k = 0; k < kCopyUnits; ++k) {
        const int64_t i = (first + k * kThreads) * kVec;
        int64_t row = row_of(i, args.width);
        int column = static_cast<int>(i - row * args.width);
        const T* const from = static_cast<const T*>(args.from[image]);
        if constexpr (kCount == kVec) {
            words[k] = load_packed<kVec>(from + row * args.stride + column, row < args.rows && column < args.channels);
        } else {
            T x[kVec];
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                x[j] =
                    row < args.rows && column < args.channels ? from[row * args.stride + column] : from_float<T>(0.f);
                if (++column == args.width) column = 0, ++row;
            }
            memcpy(&words[k], x, sizeof(x));
        }
    }
    T* const to = static_cast<T*>(args.to[image]);
#pragma unroll
    for (int k = 0; k < kCopyUnits; ++k) {
        const int64_t i = (first + k * kThreads) * kVec;
        if (kCount == kVec ? i < elements : i + kVec <= elements) {
            *reinterpret_cast<Packed<T, kVec>*>(to + i) = words[k];
        } else {
            T x[kVec];
            memcpy(x, &words[k], sizeof(x));
            for (int j = 0; j < kVec && i + j < elements; ++j) to[i + j] = x[j];
        }
    }
}

}  // namespace

cudaError_t launch_copy_rows(const CopyRowsArgs& args, DType dtype, cudaStream_t stream) {
    const int64_t units = (args.rows * args.width + kVec - 1) / kVec, of_block = kCopyUnits * kThreads;
    const int64_t blocks = (units + of_block - 1) / of_block * args.images;
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        bool vectors = args.channels % kVec == 0 && args.stride % kVec == 0 && args.width % kVec == 0;
        for (int i = 0; i < args.images; ++i)
            vectors = vectors && reinterpret_cast<uintptr_t>(args.from[i]) % (kVec * sizeof(T)) == 0;
        return launch_kernel(vectors ? copy_rows_kernel<T, kVec> : copy_rows_kernel<T, 1>, blocks, kThreads, 0, stream,
                             args);
    });
}

cudaError_t launch_clear_images(const ClearImagesArgs& args, cudaStream_t stream) {
    const int64_t blocks = (args.bytes + kClearedByBlock - 1) / kClearedByBlock;
    return launch_kernel(clear_images_kernel, args.batch * blocks, kThreads, 0, stream, args);
}

cudaError_t launch_sum_images(const SumImagesArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool rows = args.channels > 0;
        const int count = rows ? kVec : 16 / sizeof(T);
        const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % (count * sizeof(T)) == 0; };
        const bool vectors = args.count % count == 0 && args.stride % count == 0 && aligned(args.in) &&
                             aligned(args.out) && args.channels % count == 0 && args.pitch % count == 0;
        const int64_t block = int64_t{kThreads} * (vectors ? count : 1), blocks = (args.count + block - 1) / block;
        const auto kernel =
            rows ? (vectors ? sum_images_kernel<T, kVec, true> : sum_images_kernel<T, 1, true>)
                 : (vectors ? sum_images_kernel<T, 16 / sizeof(T), false> : sum_images_kernel<T, 1, false>);
        return launch_kernel(kernel, blocks, kThreads, 0, stream, args);
    });
}

}  // namespace gm
