// SPDX-License-Identifier: Apache-2.0
// All parameters of a layer in one launch each way: cast and padded before its products, and their partial gradients
// summed after them.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/common/packed.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/parameters/launch.h"

namespace gm {
namespace {

constexpr int kThreads = 256;

// A sum of many parts is shared by the rows of a block whose columns are one 32-byte sector of float partials. A sum
// of fewer parts is one thread's, for kVec elements at once where they are adjacent.
constexpr int kSumColumns = 8, kSumRows = kThreads / kSumColumns, kManyParts = 128;

// Elements of a block.
__host__ __device__ __forceinline__ int unit_of(const PackItem& item) {
    return item.vectors ? kThreads * kVec : kThreads;
}
__host__ __device__ __forceinline__ bool shares_sums(const SumItem& item) { return item.parts >= kManyParts; }
__host__ __device__ __forceinline__ int unit_of(const SumItem& item) {
    return shares_sums(item) ? kSumColumns : item.vectors ? kThreads * kVec : kThreads;
}

// Items follow one another, and a block belongs to one of them: returns that item and the first element of the block.
template <class Args>
__device__ __forceinline__ const auto& find_item(const Args& args, int64_t& first) {
    const int block = static_cast<int>(blockIdx.x);
    int i = 0;
    while (i + 1 < args.count && block >= args.items[i + 1].first_block) ++i;
    first = int64_t{block - args.items[i].first_block} * unit_of(args.items[i]);
    return args.items[i];
}

// Sets the first block of every item; returns the number of all blocks.
template <class Args>
int64_t place_blocks(Args& args) {
    int64_t blocks = 0;
    for (int i = 0; i < args.count; ++i) {
        args.items[i].first_block = static_cast<int>(std::min<int64_t>(blocks, INT32_MAX));
        blocks += (args.items[i].count + unit_of(args.items[i]) - 1) / unit_of(args.items[i]);
    }
    return blocks;
}

// kVec elements of a tensor in the dtype of the images or float32, adjacent and aligned to their size.
template <class T>
__device__ __forceinline__ void load_vector(const void* p, bool is_float, int64_t i, float (&out)[kVec]) {
    if (is_float) {
        to_floats(*reinterpret_cast<const Vec4<float>*>(static_cast<const float*>(p) + i), out);
    } else {
        to_floats(*reinterpret_cast<const Vec4<T>*>(static_cast<const T*>(p) + i), out);
    }
}

template <class T>
__device__ __forceinline__ void store_vector(const ParamOut& out, int64_t i, const float (&x)[kVec]) {
    if (out.is_float) {
        store4<true>(static_cast<float*>(out.ptr) + i, x, kVec);
    } else {
        store4<true>(static_cast<T*>(out.ptr) + i, x, kVec);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_parameters_kernel(const __grid_constant__ PackArgs args) {
    begin_kernel();
    int64_t element = 0;
    const PackItem& item = find_item(args, element);
    const int width = item.vectors ? kVec : 1;
    element += threadIdx.x * width;
    if (element >= item.count) return;
    const unsigned e = static_cast<unsigned>(element);  // an item has fewer than 2^31
    const unsigned row = e / item.w2, i0 = row / item.w1;
    const int i2 = static_cast<int>(e - row * item.w2), i1 = static_cast<int>(row - i0 * item.w1);
    float v[kVec] = {};
    if (i1 < item.n1) {
        const int64_t from = i0 * item.strides[0] + i1 * item.strides[1] + i2 * item.strides[2];
        if (item.vectors && i2 + kVec <= item.n2 && item.reads_vectors) {
            load_vector<T>(item.from.ptr, item.from.is_float, from, v);
        } else {
#pragma unroll
            for (int k = 0; k < kVec; ++k)
                if (k < width && i2 + k < item.n2) v[k] = load_param<T>(item.from, from + k * item.strides[2]);
        }
        if (item.negative_exp) {
#pragma unroll
            for (int k = 0; k < kVec; ++k) v[k] = i2 + k < item.n2 ? -expf(v[k]) : 0.f;
        }
    }
    if (item.vectors) {
        store_vector<T>(item.to, element, v);
    } else {
        store_param<T>(item.to, element, v[0]);
    }
}

// The sum of p[0], p[step], ...
template <class T>
__device__ __forceinline__ float strided_sum(const T* p, int count, int64_t step) {
    float sum = 0.f;
    load_ahead(0, count, 1, [&](int i) { return p[i * step]; }, [&](const T& v, int) { sum += to_float(v); });
    return sum;
}

template <class T>
__device__ __forceinline__ void strided_vector_sum(const T* p, int count, int64_t step, float (&sum)[kVec]) {
    load_ahead(
        0, count, 1, [&](int i) { return *reinterpret_cast<const Vec4<T>*>(p + i * step); },
        [&](const Vec4<T>& v, int) {
            float x[kVec];
            to_floats(v, x);
#pragma unroll
            for (int k = 0; k < kVec; ++k) sum[k] += x[k];
        });
}

// Where an element of a gradient comes from and goes to.
struct SumPlace {
    int64_t first, in_matrix, to;

    __device__ SumPlace(const SumItem& item, int64_t element) {
        const unsigned e = static_cast<unsigned>(element);  // an item has fewer than 2^31
        const unsigned line = e / item.n2, matrix = line / item.n1;
        const unsigned i2 = e - line * item.n2, i1 = line - matrix * item.n1;
        const unsigned i0 = matrix / item.inner, j = matrix - i0 * item.inner;
        const int64_t place = (static_cast<int64_t>(j) * item.w1 + i1) * item.w2 + i2;
        first = static_cast<int64_t>(i0) * item.parts * item.part_stride + place;
        in_matrix = static_cast<int64_t>(i0) * item.inner * item.w1 * item.w2 + place;
        to = matrix * item.to_strides[0] + i1 * item.to_strides[1] + i2 * item.to_strides[2];
    }
};

template <class T>
__device__ __forceinline__ void sum_vector(const SumItem& item, int64_t element) {
    if (element >= item.count) return;
    const SumPlace at(item, element);
    float sum[kVec] = {};
    if (item.from.is_float) {
        strided_vector_sum(static_cast<const float*>(item.from.ptr) + at.first, item.parts, item.part_stride, sum);
    } else {
        strided_vector_sum(static_cast<const T*>(item.from.ptr) + at.first, item.parts, item.part_stride, sum);
    }
    store_vector<T>(item.to, at.to, sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) sum_parameters_kernel(const __grid_constant__ SumArgs args) {
    begin_kernel();
    __shared__ float rows[kSumRows][kSumColumns];
    int64_t element = 0;
    const SumItem& item = find_item(args, element);
    const bool shares = shares_sums(item);
    if (!shares && item.vectors) return sum_vector<T>(item, element + threadIdx.x * kVec);
    const int row = shares ? threadIdx.x / kSumColumns : 0, by = shares ? kSumRows : 1;
    element += shares ? threadIdx.x % kSumColumns : threadIdx.x;
    const bool in = element < item.count;
    const SumPlace at(item, in ? element : 0);
    float sum = 0.f;
    if (in) {
        const int64_t first = at.first + row * item.part_stride;
        const int count = (item.parts - row + by - 1) / by;
        sum = item.from.is_float
                  ? strided_sum(static_cast<const float*>(item.from.ptr) + first, count, by * item.part_stride)
                  : strided_sum(static_cast<const T*>(item.from.ptr) + first, count, by * item.part_stride);
        if (item.more != nullptr)
            sum += strided_sum(item.more + element + row * item.more_stride, (item.more_parts - row + by - 1) / by,
                               by * item.more_stride);
    }
    if (shares) {
        rows[row][threadIdx.x % kSumColumns] = sum;
        __syncthreads();
        if (row != 0) return;
        sum = 0.f;
#pragma unroll 8
        for (int i = 0; i < kSumRows; ++i) sum += rows[i][threadIdx.x];
    }
    if (!in) return;
    if (item.scale != nullptr) sum *= item.scale[at.in_matrix];
    store_param<T>(item.to, at.to, sum);
}

// A thread adds kVec adjacent columns of every `row_threads`-th row of its block.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(const __grid_constant__ ColumnSumArgs args) {
    begin_kernel();
    extern __shared__ float partial[];  // (row threads, columns)
    const int vectors = (args.columns + kVec - 1) / kVec, row_threads = max(1, kThreads / vectors);
    const int64_t rows = (args.rows + args.blocks - 1) / args.blocks, from = blockIdx.x * rows;
    const int64_t to = min(args.rows, from + rows);
    const int r = threadIdx.x / vectors;
    for (int v = threadIdx.x % vectors; r < row_threads && v < vectors; v += kThreads) {
        float sum[kVec] = {};
        const T* const p = static_cast<const T*>(args.x) + from * args.row_stride + v * kVec;
        const int channels = min(kVec, args.columns - v * kVec);
        load_ahead(
            r, static_cast<int>(to - from), row_threads,
            [&](int t) {
                const T* const row = p + t * args.row_stride;
                Packed<T, kVec> x;
                if constexpr (kAligned) {
                    x = load_packed<kVec>(row, true);
                } else {
                    T elements[kVec];
#pragma unroll
                    for (int j = 0; j < kVec; ++j) elements[j] = j < channels ? row[j] : from_float<T>(0.f);
                    memcpy(&x, elements, sizeof(x));
                }
                return x;
            },
            [&](const Packed<T, kVec>& packed, int t) {
                float x[kVec], factor = 1.f;
                packed.widen(x);
                // Only then: a 64-bit division for each row takes longer than everything else here.
                if (args.drop_path.mask != nullptr)
                    factor = drop_path_factor(args.drop_path, (from + t) / args.rows_of_image);
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum[j] = fmaf(factor, x[j], sum[j]);
            });
        for (int j = 0; j < channels; ++j) partial[r * args.columns + v * kVec + j] = sum[j];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < args.columns; c += kThreads) {
        float sum = 0.f;
        for (int i = 0; i < row_threads; ++i) sum += partial[i * args.columns + c];
        args.partials[static_cast<int64_t>(blockIdx.x) * args.columns + c] = sum;
    }
}

}  // namespace

cudaError_t launch_pack_parameters(const PackArgs& given, DType dtype, cudaStream_t stream) {
    PackArgs args = given;
    const int64_t blocks = place_blocks(args);
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(pack_parameters_kernel<typename decltype(tag)::type>, blocks, kThreads, 0, stream, args);
    });
}

cudaError_t launch_sum_parameters(const SumArgs& given, DType dtype, cudaStream_t stream) {
    SumArgs args = given;
    const int64_t blocks = place_blocks(args);
    return dispatch_dtype(dtype, [&](auto tag) {
        return launch_kernel(sum_parameters_kernel<typename decltype(tag)::type>, blocks, kThreads, 0, stream, args);
    });
}

cudaError_t launch_column_sums(const ColumnSumArgs& args, DType dtype, cudaStream_t stream) {
    const int vectors = (args.columns + kVec - 1) / kVec;
    const size_t shared = sizeof(float) * args.columns * std::max(1, kThreads / vectors);
    return dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool aligned = args.columns % kVec == 0 && args.row_stride % kVec == 0 &&
                             reinterpret_cast<uintptr_t>(args.x) % (kVec * sizeof(T)) == 0;
        return launch_kernel(aligned ? column_sums_kernel<T, true> : column_sums_kernel<T, false>, args.blocks,
                             kThreads, shared, stream, args);
    });
}

}  // namespace gm
