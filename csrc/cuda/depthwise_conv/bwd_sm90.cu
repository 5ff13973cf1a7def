// SPDX-License-Identifier: Apache-2.0
// The backward of bwd.cu by tensor cores, sm_90, 16-bit storage: the same results, in one read of x and dy and one
// write of dx and, on request, of the forward's result y. bwd_walk.cuh says what a warp does with a row.
#include "cuda/common/dispatch.h"
#include "cuda/common/launch_kernel.cuh"
#include "cuda/depthwise_conv/bwd_walk.cuh"
#include "cuda/depthwise_conv/launch.h"

namespace gm {
namespace {

struct KernelArgs {
    CUtensorMap x, dy, dx, y;
    ConvBwdArgs args;
};

// Rows that come and go together. Four need fewer barriers than two, and registers, which not all kernels have.
constexpr int rows_at_once(int octets, Activation activation) {
    return activation == Activation::kGelu && octets > 2 ? 4 : 2;
}

template <int kOctets, int kRowsAtOnce>
struct Layout : ConvBwdRows<kOctets, kRowsAtOnce> {
    using Rows = ConvBwdRows<kOctets, kRowsAtOnce>;
    static constexpr int kStages = kRowsAtOnce == 4 ? 3 : 4;  // on their way, or in use
    // The results are in two halves.
    static constexpr int kFirstResults = kStages * Rows::kStage, kBarriers = kFirstResults + 2 * Rows::kResults;
    static constexpr int kBytes = kBarriers + kStages * 8;
};

// The warps whose first thread moves rows: one each, so that no warp falls behind the others.
enum Mover { kLoadX, kLoadDy, kStoreY, kStoreDx };

template <class T, int kOctets, Activation kActivation>
__global__ void __launch_bounds__(kConvSm90Threads, kConvBwdSm90Resident)
    depthwise_conv_bwd_sm90_kernel(const __grid_constant__ KernelArgs maps) {
    begin_kernel();
#if __CUDA_ARCH__ == 900
    using Layout = Layout<kOctets, rows_at_once(kOctets, kActivation)>;
    using Row = typename Layout::Row;
    constexpr int kRows = Layout::kRows;
    extern __shared__ __align__(1024) unsigned char shared[];
    const ConvBwdArgs& args = maps.args;
    const ConvShape& s = args.shape;
    const uint32_t base = shared_address(shared), barriers = base + Layout::kBarriers;
    const ConvPlace<kOctets, kConvBwdSm90Columns> at(s, args.sm90);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Layout::kStages; ++i) mbarrier_init(barriers + i * 8, 2);
        mbarrier_init_fence();
    }
    __syncthreads();
    const bool of_x = at.warp == kLoadX, loads_rows = of_x || at.warp == kLoadDy;
    RowLoads loads{at.block_channel, at.block_column - (of_x ? 2 : 1), at.group, at.batch, at.batch_end};
    const auto load = [&](int stage) {
        loads.next<kRows>(args.drop_path, s.height + 2, of_x ? &maps.x : &maps.dy, of_x ? 0 : 1,
                          base + stage * Layout::kStage + (of_x ? 0 : kRows * Layout::kX),
                          of_x ? Layout::kX : Layout::kDy, (Layout::kColumns + (of_x ? 4 : 2)) * Row::kPixel,
                          barriers + stage * 8);
    };
    if (loads_rows) {
        loads.skip_dropped(args.drop_path);
#pragma unroll 1
        for (int i = 0; i < Layout::kStages; ++i) load(i);
    }
    uint32_t diagonals[3][3];
    float bias[4];
    load_diagonals<T>(args.weight, s.dim, at, diagonals);
    load_bias<T>(args.bias, s.dim, at, bias);
    const ConvBwdLane<typename Layout::Rows> lane(at, s.width, base, base + Layout::kFirstResults);
    for (int i = 0; i < Layout::kStages; ++i)
        Layout::write_ones(shared + i * Layout::kStage, pack_pair<T>(1.f, 1.f), threadIdx.x);
    __syncthreads();

    ConvBwdWalk walk;
    const bool of_y = at.warp == kStoreY,
               stores_rows = at.lane == 0 && ((of_y && args.y.ptr != nullptr) || at.warp == kStoreDx);
    int stage = 0;
    uint32_t parity = 0, half = 0;
    for (int batch = at.batch; batch < at.batch_end; ++batch) {
        if (!keeps_branch(args.drop_path, batch)) {
            for (const ImageArg* image : {&args.dx, &args.y})
                if (image->ptr != nullptr)
                    clear_image<T>(*image, s, batch, at.group, at.block_channel, at.block_column, kOctets * kOctet,
                                   Layout::kColumns);
            continue;
        }
        walk.begin_image(bias);
        for (int first = 0; first < s.height + 2; first += kRows) {
            const uint32_t from = stage * Layout::kStage;
            mbarrier_wait(barriers + stage * 8, parity);
            if (!at.idle) {
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                    walk.row<T, kActivation>(lane, from, i, half * Layout::kResults,
                                             first + i >= 2 && first + i < s.height + 2, diagonals, bias);
            }
            fence_proxy_async();
            if (stores_rows) tma_wait_read();  // the stores before, whose half of the results is next
            __syncthreads();
            if (loads_rows) load(stage);
            if (stores_rows)
                store_rows<kRows>(
                    of_y ? &maps.y : &maps.dx,
                    base + Layout::kFirstResults + half * Layout::kResults + (of_y ? 0 : kRows * Layout::kOut),
                    Layout::kOut, s.height, at.block_channel, at.block_column, first - (of_y ? 1 : 2), at.group, batch);
            half ^= 1;
            if (++stage == Layout::kStages) stage = 0, parity ^= 1;
        }
    }
    if (!at.idle) walk.leave_sums(args, at);
    if (at.lane == 0) tma_wait_read();  // the end of the kernel makes visible what was written
#endif
}

}  // namespace

bool has_depthwise_conv_bwd_sm90() {
    static const bool built = is_built_for(
        reinterpret_cast<const void*>(depthwise_conv_bwd_sm90_kernel<__nv_bfloat16, 8, Activation::kGelu>), 90);
    return built && has_tensor_maps() && capability_of_device() == 90;
}

cudaError_t launch_depthwise_conv_bwd_sm90(const ConvBwdArgs& args, DType dtype, cudaStream_t stream) {
    const ConvShape& s = args.shape;
    return dispatch_conv_sm90<kConvBwdSm90Octets>(
        dtype, args.sm90.octets, s.activation, [&](auto tag, auto octets, auto activation) {
            using Layout =
                Layout<decltype(octets)::value, rows_at_once(decltype(octets)::value, decltype(activation)::value)>;
            KernelArgs maps{{}, {}, {}, {}, args};
            const auto encode = [&](CUtensorMap& map, const ImageArg& image, int columns) {
                return image.ptr == nullptr || encode_rows<typename Layout::Row>(map, image, s, columns, dtype);
            };
            if (!encode(maps.x, args.x, Layout::kColumns + 4) || !encode(maps.dy, args.dy, Layout::kColumns + 2) ||
                !encode(maps.dx, args.dx, Layout::kColumns) || !encode(maps.y, args.y, Layout::kColumns))
                return cudaErrorInvalidValue;
            return launch_kernel(depthwise_conv_bwd_sm90_kernel<typename decltype(tag)::type, decltype(octets)::value,
                                                                decltype(activation)::value>,
                                 args.sm90.blocks, kConvSm90Threads, Layout::kBytes, stream, maps);
        });
}

}  // namespace gm
