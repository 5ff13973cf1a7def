// SPDX-License-Identifier: Apache-2.0
// Encodes the tensor maps of slab.h. The driver's encoder is found at run time, so that the library links no libcuda.
#include <numeric>

#include "cuda/grouped_scan_sm90.h"

namespace gm {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
    static const Encode encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry)
                                                                             : nullptr;
    }();
    return encoder;
}

constexpr int kRank = 5;
constexpr int64_t kBoxLimit = 256;

bool encode(CUtensorMap& map, const ImageArg& image, DType dtype, int64_t element, const int64_t (&sizes)[kRank],
            const int64_t (&strides)[kRank - 1], const int64_t (&box)[2 + 1], CUtensorMapL2promotion promotion) {
    cuuint64_t dims[kRank], steps[kRank - 1];
    cuuint32_t boxes[kRank] = {1, 1, 1, 1, 1}, ones[kRank] = {1, 1, 1, 1, 1};
    for (int i = 0; i < kRank; ++i) {
        if (sizes[i] < 1 || sizes[i] > INT32_MAX) return false;
        dims[i] = static_cast<cuuint64_t>(sizes[i]);
    }
    for (int i = 0; i < kRank - 1; ++i) {
        // A dimension of size 1 is never stepped along: any legal stride does.
        const int64_t bytes = sizes[i + 1] == 1 ? 16 : strides[i] * element;
        if (bytes <= 0 || bytes % 16 != 0 || bytes >= (int64_t{1} << 40)) return false;
        steps[i] = static_cast<cuuint64_t>(bytes);
    }
    for (int i = 0; i < 3; ++i) {
        if (box[i] < 1 || box[i] > kBoxLimit) return false;
        boxes[i] = static_cast<cuuint32_t>(box[i]);
    }
    if (box[0] * element % 16 != 0 || reinterpret_cast<uintptr_t>(image.ptr) % 16 != 0) return false;
    const CUtensorMapDataType type =
        dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return find_encoder()(&map, type, kRank, image.ptr, dims, steps, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_NONE, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool make_slab_maps(const ImageArg& image, const ScanShape& s, const SlabPlan& plan, DType dtype, SlabMaps& maps) {
    if (find_encoder() == nullptr || dtype == DType::kFloat) return false;
    const int64_t element = 2, dim = s.dim, width = s.width, height = s.height, tokens = width * height;
    const bool contiguous = image.token == dim;
    // Fetching whole lines ahead pays where a plane's tokens follow one another; elsewhere it drags in other groups.
    const auto promotion = contiguous ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE;

    // Rows: (channel, token). Fused: as many tokens a run as divide both the plane and the slab.
    maps.row_fuse = 1;
    if (contiguous) {
        const int64_t common = std::gcd(tokens, static_cast<int64_t>(plan.tokens));
        for (int64_t fuse = kBoxLimit / dim; fuse > 1; --fuse) {
            if (common % fuse == 0) {
                maps.row_fuse = static_cast<int>(fuse);
                break;
            }
        }
    }
    const int64_t fuse = maps.row_fuse;
    if (!encode(maps.map[0], image, dtype, element, {dim * fuse, tokens / fuse, 1, s.groups, s.batch},
                {image.token * fuse, 16, image.group, image.batch}, {dim * fuse, plan.tokens / fuse, 1}, promotion))
        return false;

    // Columns: (channel, column, row), or (channel of a column, row) fused.
    const int64_t columns = plan.columns > 0 ? plan.columns : 1, rows = plan.columns > 0 ? height : plan.tokens;
    maps.column_fuse = contiguous && columns * dim <= kBoxLimit ? 1 : 0;
    if (maps.column_fuse)
        return encode(maps.map[1], image, dtype, element, {dim * width, 1, height, s.groups, s.batch},
                      {16, image.token * width, image.group, image.batch}, {dim * columns, 1, rows}, promotion);
    return encode(maps.map[1], image, dtype, element, {dim, width, height, s.groups, s.batch},
                  {image.token, image.token * width, image.group, image.batch}, {dim, columns, rows}, promotion);
}

namespace {

bool takes(const ScanShape& s, const ImageArg& z, const ParamArg& norm_weight, DType dtype) {
    const bool shape = dtype != DType::kFloat && s.states == 1 && s.rank > 0 && s.softplus && s.lanes >= 4 &&
                       s.rank + 2 <= sm90_features(s.lanes) && s.dim % 8 == 0;
    if (!shape || z.ptr == nullptr || norm_weight.ptr == nullptr) return false;
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
           grouped_scan_sm90_built();
}

template <int kCount>
bool make_maps(const ImageArg* const (&images)[kCount], CUtensorMap* const (&maps)[kCount],
               SlabMapKind (&kinds)[kCount], const ScanShape& s, const SlabPlan& plan, DType dtype) {
    for (int i = 0; i < kCount; ++i) {
        SlabMaps found;
        if (!make_slab_maps(*images[i], s, plan, dtype, found)) return false;
        maps[i][0] = found.map[0], maps[i][1] = found.map[1];
        kinds[i] = {found.row_fuse, found.column_fuse};
    }
    return true;
}

}  // namespace

bool prepare_grouped_scan_fwd_sm90(const ScanFwdArgs& scan, DType dtype, ScanFwdSm90Args& args) {
    const ScanShape& s = scan.shape;
    if (!takes(s, scan.z, scan.norm_weight, dtype)) return false;
    args.plan = plan_slabs(s.height, s.width, s.lanes);
    if (scan.states != nullptr && !slabs_follow_path(args.plan, s.height, s.width)) return false;
    args.scan = scan;
    return make_maps<3>({&scan.u, &scan.z, &scan.y}, {args.u, args.z, args.y}, args.kind, s, args.plan, dtype);
}

bool prepare_grouped_scan_bwd_sm90(const ScanBwdArgs& scan, DType dtype, ScanBwdSm90Args& args) {
    const ScanShape& s = scan.shape;
    if (!takes(s, scan.z, scan.norm_weight, dtype)) return false;
    args.plan = plan_slabs(s.height, s.width, s.lanes);
    if (!slabs_follow_path(args.plan, s.height, s.width)) return false;
    args.scan = scan;
    return make_maps<5>({&scan.u, &scan.z, &scan.dy, &scan.du, &scan.dz}, {args.u, args.z, args.dy, args.du, args.dz},
                        args.kind, s, args.plan, dtype);
}

}  // namespace gm
