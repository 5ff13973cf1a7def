// SPDX-License-Identifier: Apache-2.0
// Products of many tokens with a weight that is too large for registers, or of other widths than skinny_gemm.cu takes:
// the weight is kept in shared memory, in the order in which the lanes read it. They can scale the result and add a
// bias and an image, as the last product of a layer needs, and take the weight transposed, as a backward needs.
#include <algorithm>

#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/gemm/launch.h"
#include "cuda/gemm/rows.cuh"

namespace gm {
namespace {

// Two blocks of 8 warps an SM, of up to 128 registers: each warp computes with 16 tokens while it loads the next 16.
constexpr int kThreads = 256, kWarps = kThreads / 32, kResident = 2;
constexpr int kWindow = 32, kMostWindows = 4;
constexpr int kStepsOfWindow = 2;  // of 16 terms

int windows_of(int columns) { return (columns + kWindow - 1) / kWindow; }

// 32-bit words of the weight in shared memory: (window of the result, step, 2 pairs of tiles, lane, 4 words).
int weight_bytes(const TallGemmArgs& args) {
    return windows_of(args.out) * windows_of(args.in) * kStepsOfWindow * 2 * 32 * 16;
}

// The index of the words of a lane's tile of a window of the result: the tile of `column`, for a step and the terms of
// lanes q.
template <int kSteps>
__device__ __forceinline__ int word_of(int column, int step, int q) {
    const int inside = column % kWindow, tile = inside % 8 / 2, lane = (inside / 8 * 2 + inside % 2) * 4 + q;
    return (((column / kWindow * kSteps + step) * 2 + tile / 2) * 32 + lane) * 4 + tile % 2 * 2;
}

// Copies the weight (out, in) to shared memory: a thread takes 8 adjacent terms of a column of the result at a time.
template <class T, int kWindows>
__device__ __forceinline__ void stage_weight(const TallGemmArgs& args, const T* weight, uint32_t* shared) {
    constexpr int kChunks = kWindows * kWindow / 8, kSteps = kWindows * kStepsOfWindow, kAhead = 8;
    const int count = (args.out + kWindow - 1) / kWindow * kWindow * kChunks;
    for (int begin = threadIdx.x; begin < count; begin += kAhead * kThreads) {
        Packed<T, 8> terms[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int unit = begin + i * kThreads, column = unit / kChunks, term = unit % kChunks * 8;
            terms[i] = load_packed<8>(weight + static_cast<int64_t>(column) * args.in + term,
                                      column < args.out && term < args.in);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int unit = begin + i * kThreads, column = unit / kChunks, chunk = unit % kChunks;
            if (unit >= count) break;
            const int step = chunk / 4 * kStepsOfWindow;
            *reinterpret_cast<uint2*>(shared + word_of<kSteps>(column, step, chunk % 4)) =
                make_uint2(terms[i].words[0], terms[i].words[1]);
            *reinterpret_cast<uint2*>(shared + word_of<kSteps>(column, step + 1, chunk % 4)) =
                make_uint2(terms[i].words[2], terms[i].words[3]);
        }
    }
}

// The same for a weight (in, out): a thread takes a pair of terms of 8 adjacent columns at a time.
template <class T, int kWindows>
__device__ __forceinline__ void stage_transposed_weight(const TallGemmArgs& args, const T* weight, uint32_t* shared) {
    constexpr int kPairs = kWindows * kWindow / 2, kSteps = kWindows * kStepsOfWindow, kAhead = 4;
    const int chunks = (args.out + kWindow - 1) / kWindow * (kWindow / 8), count = kPairs * chunks;
    for (int begin = threadIdx.x; begin < count; begin += kAhead * kThreads) {
        Packed<T, 8> even[kAhead], odd[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int unit = begin + i * kThreads, pair = unit / chunks, column = (unit - pair * chunks) * 8;
            const bool in = 2 * pair < args.in && column < args.out;
            const T* const from = weight + int64_t{2 * pair} * args.out + column;
            even[i] = load_packed<8>(from, in), odd[i] = load_packed<8>(from + args.out, in);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int unit = begin + i * kThreads, pair = unit / chunks, column = (unit - pair * chunks) * 8;
            if (unit >= count) break;
            const int step = pair / 16 * kStepsOfWindow + pair % 4 / 2, q = pair % 16 / 4;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                shared[word_of<kSteps>(column + j, step, q) + pair % 2] =
                    __byte_perm(even[i].words[j / 2], odd[i].words[j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
        }
    }
}

template <class T, int kWindows>
__global__ void __launch_bounds__(kThreads, kResident) tall_gemm_kernel(const __grid_constant__ TallGemmArgs args) {
    begin_kernel();
#if __CUDA_ARCH__ >= 800
    constexpr int kPairs = kWindows * 4, kSteps = kWindows * kStepsOfWindow;
    extern __shared__ uint4 dynamic_shared[];
    const int part = static_cast<int>(blockIdx.x) / args.groups;
    const int group = static_cast<int>(blockIdx.x) - part * args.groups;
    const int q = threadIdx.x % 4, row = threadIdx.x % 32 / 4, lane = threadIdx.x % 32;
    const int64_t step = int64_t{args.parts} * kWarps * kTileRows;
    const int64_t begin = (int64_t{part} * kWarps + threadIdx.x / 32) * kTileRows;
    const int64_t of_group = group * args.tokens;
    uint32_t next[2][kPairs];
    const auto load = [&](int64_t first) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t token = first + half * 8 + row;
#pragma unroll
            for (int v = 0; v < kWindows; ++v) {
                const int column = v * kWindow + q * 8;
                const auto terms = load_packed<8>(static_cast<const T*>(args.x) + (of_group + token) * args.in + column,
                                                  token < args.tokens && column < args.in);
#pragma unroll
                for (int w = 0; w < 4; ++w) next[half][4 * v + w] = terms.words[w];
            }
        }
    };
    load(begin);
    const T* const weight_of_group =
        static_cast<const T*>(args.weight) + static_cast<int64_t>(group) * args.in * args.out;
    uint32_t* const staged = reinterpret_cast<uint32_t*>(dynamic_shared);
    if (args.transposed) {
        stage_transposed_weight<T, kWindows>(args, weight_of_group, staged);
    } else {
        stage_weight<T, kWindows>(args, weight_of_group, staged);
    }
    __syncthreads();
    for (int64_t first = begin; first < args.tokens; first += step) {
        uint32_t now[2][kPairs];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < kPairs; ++i) now[half][i] = next[half][i];
        load(first + step);
        const uint4* weight = dynamic_shared + lane;
#pragma unroll 1
        for (int window = 0; window < args.out; window += kWindow) {
            const int column = window + q * 8;
            float sums[4][4] = {};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                const uint32_t a[4] = {now[0][2 * s], now[1][2 * s], now[0][2 * s + 1], now[1][2 * s + 1]};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint4 b = weight[(s * 2 + i) * 32];
                    warp_mma<T>(sums[2 * i], a, b.x, b.y, sums[2 * i]);
                    warp_mma<T>(sums[2 * i + 1], a, b.z, b.w, sums[2 * i + 1]);
                }
            }
            weight += kSteps * 2 * 32;
            if (column >= args.out) continue;
            float bias[8] = {};
            if (args.bias != nullptr) load_packed<8>(static_cast<const T*>(args.bias) + column, true).widen(bias);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t token = first + half * 8 + row;
                if (token >= args.tokens) continue;
                const int64_t place = (of_group + token) * args.out + column;
                float y[8];
                load_packed<8>(static_cast<const T*>(args.added) + place, args.added != nullptr).widen(y);
#pragma unroll
                for (int j = 0; j < 8; ++j) y[j] = fmaf(args.scale, sums[j / 2][2 * half + j % 2], y[j] + bias[j]);
                store_packed<8>(static_cast<T*>(args.y) + place, y, true);
            }
        }
    }
#endif
}

}  // namespace

const char* why_not_tall_gemm(DType dtype, int64_t in, int64_t out) {
    constexpr int64_t kMostShared = 99 << 10;  // fits a block on the smallest GPUs, and two on an SM of the largest
    if (dtype == DType::kFloat) return "the images are float32, not float16 or bfloat16";
    if (in % 8 != 0 || out % 8 != 0) return "the columns are no multiples of 8";
    if (in > kMostWindows * kWindow) return "there are more than 128 input columns";
    TallGemmArgs args;
    args.in = static_cast<int>(in), args.out = static_cast<int>(std::min<int64_t>(out, 1 << 12));
    if (weight_bytes(args) > kMostShared) return "the weight does not fit in shared memory";
    return has_warp_mma() ? nullptr : "the GPU or the build is older than compute capability 8.0";
}

cudaError_t launch_tall_gemm(const TallGemmArgs& given, DType dtype, cudaStream_t stream) {
    TallGemmArgs args = given;
    int multiprocessors = 0;
    const cudaError_t error = multiprocessors_of_device(multiprocessors);
    if (error != cudaSuccess) return error;
    const int64_t rows = kWarps * kTileRows, steps = (args.tokens + rows - 1) / rows;
    const int64_t at_once = std::max(kResident * multiprocessors / args.groups, 1);
    args.parts = static_cast<int>(std::min(at_once, steps));
    const auto launch = [&](auto tag, auto windows) {
        return launch_kernel(tall_gemm_kernel<typename decltype(tag)::type, decltype(windows)::value>,
                             int64_t{args.groups} * args.parts, kThreads, weight_bytes(args), stream, args);
    };
    const auto with_windows = [&](auto tag) {
        switch (windows_of(args.in)) {
            case 1: return launch(tag, std::integral_constant<int, 1>{});
            case 2: return launch(tag, std::integral_constant<int, 2>{});
            case 3: return launch(tag, std::integral_constant<int, 3>{});
            default: return launch(tag, std::integral_constant<int, 4>{});
        }
    };
    return dtype == DType::kHalf ? with_windows(TypeTag<__half>{}) : with_windows(TypeTag<__nv_bfloat16>{});
}

}  // namespace gm
