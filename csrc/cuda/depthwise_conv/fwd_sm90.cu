// SPDX-License-Identifier: Apache-2.0
// The forward of fwd.cu by tensor cores, sm_90, 16-bit storage (tensor_cores.cuh): row r of x finishes row r - 1 of y.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/depthwise_conv/launch.h"
#include "cuda/depthwise_conv/tensor_cores.cuh"

namespace gm {
namespace {

constexpr int kRows = 4, kStages = 3;  // rows that come and go together; on their way, or in use

struct KernelArgs {
    CUtensorMap x, y;
    ConvFwdArgs args;
};

template <int kOctets>
struct Layout {
    using Row = PixelRow<kOctets>;
    static constexpr int kColumns = kConvSm90Warps / kOctets * kConvFwdSm90Columns;
    static constexpr int kX = Row::bytes(kColumns + 2), kStage = kRows * kX;
    static constexpr int kY = Row::bytes(kColumns), kHalf = kRows * kY;  // results, in each of two halves
    static constexpr int kResults = kStages * kStage, kBarriers = kResults + 2 * kHalf;
    static constexpr int kBytes = kBarriers + kStages * 8;
};

// The warps whose first thread moves rows.
enum Mover { kLoadX, kStoreY };

template <class T, int kOctets, Activation kActivation>
__global__ void __launch_bounds__(kConvSm90Threads, kConvFwdSm90Resident)
    depthwise_conv_fwd_sm90_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
#if __CUDA_ARCH__ == 900
    using Layout = Layout<kOctets>;
    using Row = typename Layout::Row;
    extern __shared__ __align__(1024) unsigned char shared[];
    const ConvFwdArgs& args = maps.args;
    const ConvShape& s = args.shape;
    const uint32_t base = shared_address(shared), barriers = base + Layout::kBarriers;
    const ConvPlace<kOctets, kConvFwdSm90Columns> at(s, args.sm90);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) mbarrier_init(barriers + i * 8, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    RowLoads loads{at.block_channel, at.block_column - 1, at.group, at.batch, at.batch_end};
    const auto load = [&](int stage) {
        loads.next<kRows>(args.drop_path, s.height + 1, &maps.x, 0, base + stage * Layout::kStage, Layout::kX,
                          (Layout::kColumns + 2) * Row::kPixel, barriers + stage * 8);
    };
    if (at.warp == kLoadX) {
        loads.skip_dropped(args.drop_path);
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) load(i);
    }
    uint32_t diagonals[3][3];
    float bias[4];
    load_diagonals<T>(args.weight, s.dim, at, diagonals);
    load_bias<T>(args.bias, s.dim, at, bias);
    // What this lane addresses: of x the pixels at the outer taps, and at the inner one; its results.
    const int pixel = at.tile * kConvFwdSm90Columns + at.lane % 16;
    const uint32_t x_outer = base + Row::offset(pixel + at.lane / 16 * 2, at.octet),
                   x_inner = base + Row::offset(pixel + 1, at.octet),
                   result = base + Layout::kResults + Row::offset(pixel, at.octet);

    float above[4], level[4];
    const auto row = [&](uint32_t stage, uint32_t half) {
        uint32_t outer[4], inner[2];
        ldmatrix(outer, x_outer + stage);
        ldmatrix(inner, x_inner + stage);
        float y[4];
        add_taps<T>({&y, &above, &level}, {&above, &level, &bias}, outer, inner, diagonals, {2, 1, 0}, [] {});
        activate<T>(kActivation, y);
        stmatrix(result + half, {pack_pair<T>(y[0], y[1]), pack_pair<T>(y[2], y[3])});
    };

    int stage = 0;
    uint32_t parity = 0, half = 0;
    for (int batch = at.batch; batch < at.batch_end; ++batch) {
        if (!keeps_branch(args.drop_path, batch)) {
            clear_image<T>(args.y, s, batch, at.group, at.block_channel, at.block_column, kOctets * kOctet,
                           Layout::kColumns);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) above[i] = level[i] = bias[i];
        for (int first = 0; first < s.height + 1; first += kRows) {
            const uint32_t from = stage * Layout::kStage;
            mbarrier_wait(barriers + stage * 8, parity);
            if (!at.idle) {
#pragma unroll
                for (int i = 0; i < kRows; ++i) row(from + i * Layout::kX, half * Layout::kHalf + i * Layout::kY);
            }
            fence_proxy_async();
            const bool stores_rows = at.warp == kStoreY && at.lane == 0;
            if (stores_rows) tma_wait_read();  // the stores before, whose half of the results is next
            __syncthreads();
            if (at.warp == kLoadX) load(stage);
            if (stores_rows)
                store_rows<kRows>(&maps.y, base + Layout::kResults + half * Layout::kHalf, Layout::kY, s.height,
                                  at.block_channel, at.block_column, first - 1, at.group, batch);
            half ^= 1;
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
    }
    if (at.lane == 0) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

}  // namespace

bool has_depthwise_conv_fwd_sm90() {
    static const bool built = is_built_for(
        reinterpret_cast<const void*>(depthwise_conv_fwd_sm90_kernel<__nv_bfloat16, 8, Activation::kGelu>), 90);
    return built && has_tensor_maps() && capability_of_device() == 90;
}

cudaError_t launch_depthwise_conv_fwd_sm90(const ConvFwdArgs& args, DType dtype, cudaStream_t stream) {
    const ConvShape& s = args.shape;
    return dispatch_conv_sm90<kConvFwdSm90Octets>(
        dtype, args.sm90.octets, s.activation, [&](auto tag, auto octets, auto activation) {
            using Layout = Layout<decltype(octets)::value>;
            KernelArgs maps{{}, {}, args};
            if (!encode_rows<typename Layout::Row>(maps.x, args.x, s, Layout::kColumns + 2, dtype) ||
                !encode_rows<typename Layout::Row>(maps.y, args.y, s, Layout::kColumns, dtype))
                return cudaErrorInvalidValue;
            return launch_kernel(depthwise_conv_fwd_sm90_kernel<typename decltype(tag)::type, decltype(octets)::value,
                                                                decltype(activation)::value>,
                                 args.sm90.blocks, kConvSm90Threads, Layout::kBytes, stream, maps);
        });
}

}  // namespace gm
