// SPDX-License-Identifier: Apache-2.0
// Encodes the tensor maps of slab.h. The driver's encoder is found at run time, so that the library links no libcuda.
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

bool make_slab_maps(const ImageArg& image, const ScanShape& s, const SlabPlan& plan, DType dtype, CUtensorMap (&map)[2],
                    SlabMapKind& kind) {
    if (find_encoder() == nullptr || dtype == DType::kFloat) return false;
    const int64_t element = 2, dim = s.dim, width = s.width, height = s.height, tokens = width * height;
    const bool contiguous = image.token == dim;
    // Fetching whole lines ahead pays where a plane's tokens follow one another; elsewhere it drags in other groups.
    const auto promotion = contiguous ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE;

    // Rows: (channel, token). Fused for longer runs: the largest power of two of tokens that divides plane and slab.
    kind.row_shift = 0;
    while (contiguous && (dim << (kind.row_shift + 1)) <= kBoxLimit && (tokens >> kind.row_shift) % 2 == 0 &&
           (plan.tokens >> kind.row_shift) % 2 == 0)
        ++kind.row_shift;
    const int64_t fuse = int64_t{1} << kind.row_shift;
    kind.boxes[0] = plan.tokens / fuse > kBoxLimit ? 2 : 1;
    if (!encode(map[0], image, dtype, element, {dim * fuse, tokens / fuse, 1, s.groups, s.batch},
                {image.token * fuse, 16, image.group, image.batch}, {dim * fuse, plan.tokens / fuse / kind.boxes[0], 1},
                promotion))
        return false;

    // Columns: (channel, column, row), or (channel of a column, row) fused.
    const int64_t columns = plan.columns > 0 ? plan.columns : 1, rows = plan.columns > 0 ? height : plan.tokens;
    kind.boxes[1] = rows > kBoxLimit ? 2 : 1;
    const int64_t box_rows = rows / kind.boxes[1];
    kind.column_fuse = contiguous && columns * dim <= kBoxLimit;
    if (kind.column_fuse)
        return encode(map[1], image, dtype, element, {dim * width, 1, height, s.groups, s.batch},
                      {16, image.token * width, image.group, image.batch}, {dim * columns, 1, box_rows}, promotion);
    return encode(map[1], image, dtype, element, {dim, width, height, s.groups, s.batch},
                  {image.token, image.token * width, image.group, image.batch}, {dim, columns, box_rows}, promotion);
}

bool takes_grouped_scan_sm90(const ScanShape& s, bool has_z, bool has_norm, DType dtype) {
    const bool shape = dtype != DType::kFloat && s.states == 1 && s.rank > 0 && s.softplus && s.lanes >= 4 &&
                       s.rank + 2 <= sm90_features(s.lanes) && s.dim % 8 == 0 && has_z && has_norm;
    if (!shape || find_encoder() == nullptr) return false;
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
           grouped_scan_sm90_built();
}

bool prepare_grouped_scan_fwd_sm90(DType dtype, ScanFwdSm90Args& args) {
    const ScanShape& s = args.scan.shape;
    args.plan = plan_slabs(s.height, s.width, s.lanes, sm90_fwd_parts(s.lanes));
    const auto make = [&](const ImageArg& image, CUtensorMap(&map)[2], SlabMapKind& kind) {
        return make_slab_maps(image, s, args.plan, dtype, map, kind);
    };
    return make(args.scan.u, args.u, args.kind[0]) && make(args.scan.z, args.z, args.kind[1]) &&
           make(args.scan.y, args.y, args.kind[2]);
}

bool prepare_grouped_scan_bwd_sm90(DType dtype, ScanBwdSm90Args& args) {
    const ScanShape& s = args.scan.shape;
    args.plan = plan_slabs(s.height, s.width, s.lanes, 1);
    const auto make = [&](const ImageArg& image, CUtensorMap(&map)[2], SlabMapKind& kind) {
        return make_slab_maps(image, s, args.plan, dtype, map, kind);
    };
    return make(args.scan.u, args.u, args.kind[0]) && make(args.scan.z, args.z, args.kind[1]) &&
           make(args.scan.dy, args.dy, args.kind[2]) && make(args.scan.du, args.du, args.kind[3]) &&
           make(args.scan.dz, args.dz, args.kind[4]);
}

}  // namespace gm
