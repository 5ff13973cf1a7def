// SPDX-License-Identifier: Apache-2.0
// Products of many tokens with a small weight for each group, 16-bit storage, sums in float32, and their backward: dx
// and dweight in one read of dy. Such products are limited by the bytes of their images alone. So a warp loads 16
// tokens at a time from device memory straight into the operands of its tensor cores, without shared memory, and holds
// the weight in registers.
#include <algorithm>

#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/gemm/launch.h"
#include "cuda/gemm/rows.cuh"

namespace gm {
namespace {

// Blocks of four warps: their sums of dweight are combined in a few steps.
constexpr int kThreads = 128, kWarps = kThreads / 32;

// Two rows of a tile, 8 apart.
template <int kWidth>
struct TilePart {
    RowPart<kWidth> low, high;

    // Of the image (tokens, kWidth) at `p`; rows beyond its end are zeros, and are not stored.
    template <class T>
    __device__ __forceinline__ void load(const T* p, int64_t token, int64_t tokens, int q) {
        low.load(p + token * kWidth, q, token < tokens);
        high.load(p + (token + 8) * kWidth, q, token + 8 < tokens);
    }
    template <class T>
    __device__ __forceinline__ void store(T* p, int64_t token, int64_t tokens, int q) const {
        low.store(p + token * kWidth, q, token < tokens);
        high.store(p + (token + 8) * kWidth, q, token + 8 < tokens);
    }
};

// A weight as the second operand of products from rows of kFrom columns to rows of kTo columns, its columns and terms
// in the order of RowPart.
template <class T, int kFrom, int kTo>
struct HeldWeight {
    static constexpr int kSteps = (RowPart<kFrom>::kPairs + 1) / 2, kColumns = RowPart<kTo>::kPairs;
    uint32_t words[kSteps][kColumns][2];

    // at(term, column): the number of the element.
    template <class At>
    __device__ __forceinline__ void load(const T* weight, const At& at) {
        const int q = threadIdx.x % 4, column = threadIdx.x % 32 / 4;
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int pair = 2 * s + half;
                    words[s][j][half] = 0;
                    if (pair >= RowPart<kFrom>::kPairs) continue;
                    const int term = RowPart<kFrom>::column(pair, q);
                    const int to = RowPart<kTo>::column(j, column / 2) + column % 2;
                    if (!RowPart<kFrom>::exists(term) || !RowPart<kTo>::exists(to)) continue;
                    words[s][j][half] = bits(weight[at(term, to)]) | bits(weight[at(term + 1, to)]) << 16;
                }
    }
    // rows x weight, added to `out` if `add`; rounded once.
    __device__ __forceinline__ void multiply(const TilePart<kFrom>& rows, bool add, TilePart<kTo>& out) const {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            float sum[4] = {};
            if (add) {
                widen(out.low.pairs[j], sum[0], sum[1]);
                widen(out.high.pairs[j], sum[2], sum[3]);
            }
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                constexpr int kPairs = RowPart<kFrom>::kPairs;
                const bool whole = 2 * s + 1 < kPairs;
                const uint32_t a[4] = {rows.low.pairs[2 * s], rows.high.pairs[2 * s],
                                       whole ? rows.low.pairs[(2 * s + 1) % kPairs] : 0,
                                       whole ? rows.high.pairs[(2 * s + 1) % kPairs] : 0};
                warp_mma<T>(sum, a, words[s][j][0], words[s][j][1], sum);
            }
            out.low.pairs[j] = pack_pair<T>(sum[0], sum[1]);
            out.high.pairs[j] = pack_pair<T>(sum[2], sum[3]);
        }
    }

private:
    static __device__ __forceinline__ uint32_t bits(const T& element) {
        uint16_t out;
        memcpy(&out, &element, sizeof(out));
        return out;
    }
    static __device__ __forceinline__ void widen(uint32_t pair, float& a, float& b) {
        Packed<T, 2> packed;
        packed.words[0] = pair;
        float out[2];
        packed.widen(out);
        a = out[0], b = out[1];
    }
};

// The tokens of a warp: kTiles adjacent tiles from `first` on, then those `step` tokens further on, and so on.
template <int kTiles>
struct WarpTokens {
    int group;
    int64_t first, step;

    __device__ explicit WarpTokens(const SkinnyGemmArgs& args) {
        const int part = static_cast<int>(blockIdx.x) / args.groups;
        group = static_cast<int>(blockIdx.x) - part * args.groups;
        step = int64_t{args.parts} * kWarps * kTiles * kTileRows;
        first = (int64_t{part} * kWarps + threadIdx.x / 32) * kTiles * kTileRows;
    }
};

// Tiles that a warp loads at once: about 32 bytes a lane, twice that with those of the next step. A lane has as many
// bytes of a tile as a row has columns: 16 rows of 2 bytes a column, shared by 32 lanes.
template <int kColumns>
constexpr int kTilesOf = kColumns >= 32 ? 1 : 32 / kColumns;
template <int kIn>
constexpr int kFwdTiles = kTilesOf<kIn>;
template <int kIn, int kOut>
constexpr int kBwdTiles = kTilesOf<kIn + kOut>;

// Registers limit the blocks of an SM.
template <int kIn, int kOut>
constexpr int kFwdBlocks = kIn * kOut >= 1024 ? 4 : 8;
template <int kIn, int kOut>
constexpr int kBwdBlocks = kIn * kOut >= 2048  ? 2
                           : kIn * kOut >= 512 ? 4
                                               : 6;

template <class T, int kIn, int kOut>
__global__ void __launch_bounds__(kThreads, kFwdBlocks<kIn, kOut>)
    skinny_gemm_fwd_kernel(const __grid_constant__ SkinnyGemmArgs args) {
    begin_kernel();
#if __CUDA_ARCH__ >= 800
    constexpr int kTiles = kFwdTiles<kIn>;
    const WarpTokens<kTiles> walk(args);
    const int q = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
    const T* const x = static_cast<const T*>(args.x) + walk.group * args.tokens * kIn;
    T* const y = static_cast<T*>(args.y) + walk.group * args.tokens * kOut;
    TilePart<kIn> next[kTiles];
    const auto load = [&](int64_t first) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) next[i].load(x, first + i * kTileRows + row, args.tokens, q);
    };
    load(walk.first);
    HeldWeight<T, kIn, kOut> weight;
    weight.load(static_cast<const T*>(args.weight) + walk.group * kIn * kOut,
                [](int term, int column) { return column * kIn + term; });
    for (int64_t first = walk.first; first < args.tokens; first += walk.step) {
        TilePart<kIn> now[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) now[i] = next[i];
        load(first + walk.step);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            TilePart<kOut> out;
            weight.multiply(now[i], false, out);
            out.store(y, first + i * kTileRows + row, args.tokens, q);
        }
    }
#endif
}

template <class T, int kIn, int kOut>
__global__ void __launch_bounds__(kThreads, kBwdBlocks<kIn, kOut>)
    skinny_gemm_bwd_kernel(const __grid_constant__ SkinnyGemmArgs args) {
    begin_kernel();
#if __CUDA_ARCH__ >= 800
    constexpr int kTiles = kBwdTiles<kIn, kOut>;
    constexpr int kRowTiles = RowPart<kIn>::kPairs / 2, kColumnTiles = RowPart<kOut>::kPairs;
    static_assert(RowPart<kIn>::kPairs % 2 == 0);
    __shared__ float sums_of_block[kIn * kOut];
    const WarpTokens<kTiles> walk(args);
    const int q = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
    const T* const x = static_cast<const T*>(args.x) + walk.group * args.tokens * kIn;
    const T* const dy = static_cast<const T*>(args.dy) + walk.group * args.tokens * kOut;
    T* const dx = static_cast<T*>(args.dx) + walk.group * args.tokens * kIn;
    // The padding columns of dy may hold anything.
    const uint32_t used = 2 * q + 1 < args.used ? 0xffffffff : 2 * q < args.used ? 0xffff : 0;
    TilePart<kIn> next_x[kTiles];
    TilePart<kOut> next_dy[kTiles];
    const auto load = [&](int64_t first) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            next_x[i].load(x, first + i * kTileRows + row, args.tokens, q);
            next_dy[i].load(dy, first + i * kTileRows + row, args.tokens, q);
            if constexpr (kOut == 4) next_dy[i].low.pairs[0] &= used, next_dy[i].high.pairs[0] &= used;
        }
    };
    load(walk.first);
    HeldWeight<T, kOut, kIn> weight;
    weight.load(static_cast<const T*>(args.weight) + walk.group * kIn * kOut,
                [](int term, int column) { return term * kIn + column; });
    float sums[kRowTiles][kColumnTiles][4] = {};  // x^T dy
    for (int64_t first = walk.first; first < args.tokens; first += walk.step) {
        TilePart<kIn> now_x[kTiles];
        TilePart<kOut> now_dy[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) now_x[i] = next_x[i], now_dy[i] = next_dy[i];
        TilePart<kIn> out[kTiles];
        if (args.add) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) out[i].load(dx, first + i * kTileRows + row, args.tokens, q);
        }
        load(first + walk.step);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            uint32_t dy_low[kColumnTiles], dy_high[kColumnTiles];
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j) {
                dy_low[j] = movmatrix_trans(now_dy[i].low.pairs[j]);
                dy_high[j] = movmatrix_trans(now_dy[i].high.pairs[j]);
            }
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                const uint32_t a[4] = {
                    movmatrix_trans(now_x[i].low.pairs[2 * m]), movmatrix_trans(now_x[i].low.pairs[2 * m + 1]),
                    movmatrix_trans(now_x[i].high.pairs[2 * m]), movmatrix_trans(now_x[i].high.pairs[2 * m + 1])};
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j) warp_mma<T>(sums[m][j], a, dy_low[j], dy_high[j], sums[m][j]);
            }
            weight.multiply(now_dy[i], args.add, out[i]);
            out[i].store(dx, first + i * kTileRows + row, args.tokens, q);
        }
    }
    // The warps add one after another, so that the bits do not depend on the order in which they arrive.
    for (int warp = 0; warp < kWarps; ++warp) {
        if (static_cast<int>(threadIdx.x) / 32 == warp) {
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const int in = RowPart<kIn>::column(2 * m + k / 2, row / 2) + row % 2;
                        const int out = RowPart<kOut>::column(j, q) + k % 2;
                        if (!RowPart<kOut>::exists(out)) continue;
                        float& sum = sums_of_block[out * kIn + in];
                        sum = warp == 0 ? sums[m][j][k] : sum + sums[m][j][k];
                    }
        }
        __syncthreads();
    }
    const int64_t part = static_cast<int>(blockIdx.x) / args.groups;
    float* const partials = args.dweight + (int64_t{walk.group} * args.parts + part) * (kIn * kOut);
    for (int i = threadIdx.x; i < kIn * kOut; i += kThreads) partials[i] = sums_of_block[i];
#endif
}

// Calls f(type tag, integral_constant of the columns of x, of y) for the widths below.
template <class F>
auto dispatch(DType dtype, int in, int out, F&& f) {
    const auto with_type = [&](auto tag) {
        const auto with = [&](auto from, auto to) { return f(tag, from, to); };
        using std::integral_constant;
        if (in == 16)
            return out == 4    ? with(integral_constant<int, 16>{}, integral_constant<int, 4>{})
                   : out == 16 ? with(integral_constant<int, 16>{}, integral_constant<int, 16>{})
                               : with(integral_constant<int, 16>{}, integral_constant<int, 32>{});
        return out == 4    ? with(integral_constant<int, 32>{}, integral_constant<int, 4>{})
               : out == 32 ? with(integral_constant<int, 32>{}, integral_constant<int, 32>{})
                           : with(integral_constant<int, 32>{}, integral_constant<int, 64>{});
    };
    return dtype == DType::kHalf ? with_type(TypeTag<__half>{}) : with_type(TypeTag<__nv_bfloat16>{});
}

template <class Kernel>
cudaError_t launch(Kernel kernel, const SkinnyGemmArgs& args, cudaStream_t stream) {
    return launch_kernel(kernel, int64_t{args.groups} * args.parts, kThreads, 0, stream, args);
}

// As many blocks as run at once, each with at least one step.
cudaError_t parts_of(int resident, int tiles, const SkinnyGemmArgs& args, int& parts) {
    int multiprocessors = 0;
    const cudaError_t error = multiprocessors_of_device(multiprocessors);
    const int64_t rows = int64_t{kWarps} * tiles * kTileRows, steps = (args.tokens + rows - 1) / rows;
    parts = static_cast<int>(std::max<int64_t>(std::min<int64_t>(resident * multiprocessors / args.groups, steps), 1));
    return error;
}

}  // namespace

bool takes_skinny_gemm(DType dtype, int64_t in, int64_t out) {
    const bool widths =
        (in == 16 && (out == 4 || out == 16 || out == 32)) || (in == 32 && (out == 4 || out == 32 || out == 64));
    return dtype != DType::kFloat && widths && has_warp_mma();
}

bool has_warp_mma() {
    if (capability_of_device() < 80) return false;
    static const bool built =
        is_built_for(reinterpret_cast<const void*>(skinny_gemm_fwd_kernel<__nv_bfloat16, 16, 4>), 80);
    return built;
}

cudaError_t plan_skinny_gemm_bwd(DType dtype, SkinnyGemmArgs& args) {
    return dispatch(dtype, args.in, args.out, [&](auto, auto in, auto out) {
        constexpr int kIn = decltype(in)::value, kOut = decltype(out)::value;
        return parts_of(kBwdBlocks<kIn, kOut>, kBwdTiles<kIn, kOut>, args, args.parts);
    });
}

cudaError_t launch_skinny_gemm_fwd(const SkinnyGemmArgs& given, DType dtype, cudaStream_t stream) {
    return dispatch(dtype, given.in, given.out, [&](auto tag, auto in, auto out) {
        constexpr int kIn = decltype(in)::value, kOut = decltype(out)::value;
        SkinnyGemmArgs args = given;
        const cudaError_t error = parts_of(kFwdBlocks<kIn, kOut>, kFwdTiles<kIn>, args, args.parts);
        if (error != cudaSuccess) return error;
        return launch(skinny_gemm_fwd_kernel<typename decltype(tag)::type, kIn, kOut>, args, stream);
    });
}

cudaError_t launch_skinny_gemm_bwd(const SkinnyGemmArgs& args, DType dtype, cudaStream_t stream) {
    return dispatch(dtype, args.in, args.out, [&](auto tag, auto in, auto out) {
        constexpr int kIn = decltype(in)::value, kOut = decltype(out)::value;
        return launch(skinny_gemm_bwd_kernel<typename decltype(tag)::type, kIn, kOut>, args, stream);
    });
}

}  // namespace gm
