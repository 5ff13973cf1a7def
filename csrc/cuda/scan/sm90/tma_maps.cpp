// SPDX-License-Identifier: Apache-2.0
// The tensor maps of plan.h.
#include "cuda/common/tensor_map.h"
#include "cuda/scan/sm90/launch.h"
#include "cuda/scan/sm90/select.h"

namespace gm {

bool make_tile_maps(const ImageArg& image, int groups, int channels, const ScanShape& s, const TilePlan& plan,
                    DType dtype, CUtensorMap (&map)[2], TileMapKind& kind) {
    const int64_t dim = s.dim, width = s.width, height = s.height, tokens = width * height;
    // Where a tile has channels that the image has not, TMA reads zeros, and writes nothing.
    const bool contiguous = image.token == dim && channels == dim;
    // Promotion to whole L2 lines pays where the tokens of a plane are adjacent; elsewhere it reads other groups too.
    const auto promotion = contiguous ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE;

    // Along rows: (channel, token). Where tokens are adjacent, channels and tokens are fused for longer runs: the
    // largest power of two of tokens that divides both plane and tile.
    kind.row_shift = 0;
    while (contiguous && (dim << (kind.row_shift + 1)) <= kBoxLimit && (tokens >> kind.row_shift) % 2 == 0 &&
           (plan.tokens >> kind.row_shift) % 2 == 0)
        ++kind.row_shift;
    const int64_t fuse = int64_t{1} << kind.row_shift;
    kind.row_boxes = plan.tokens / fuse > kBoxLimit ? 2 : 1;
    const TensorMapShape by_rows{{channels * fuse, tokens / fuse, 1, groups, s.batch},
                                 {image.token * fuse, 16, image.group, image.batch},
                                 {dim * fuse, plan.tokens / fuse / kind.row_boxes, 1}};
    if (!encode_tensor_map(map[0], image.ptr, dtype, by_rows, promotion)) return false;

    // Along columns: (channel, column, row), or where columns are adjacent (channel of a column, row).
    const int64_t columns = plan.columns > 0 ? plan.columns : 1, rows = plan.columns > 0 ? height : plan.run_rows;
    kind.column_fuse = contiguous && columns * dim <= kBoxLimit;
    TensorMapShape by_columns{{channels, width, height, groups, s.batch},
                              {image.token, image.token * width, image.group, image.batch},
                              {dim, columns, rows}};
    if (kind.column_fuse)
        by_columns = {{dim * width, 1, height, groups, s.batch},
                      {16, image.token * width, image.group, image.batch},
                      {dim * columns, 1, rows}};
    return encode_tensor_map(map[1], image.ptr, dtype, by_columns, promotion);
}

bool prepare_grouped_scan_fwd_sm90(DType dtype, ScanFwdSm90Args& args) {
    const ScanShape& s = args.scan.shape;
    args.plan = plan_tiles(s, sm90_fwd_parts(s.lanes));
    const auto make = [&](const ImageArg& image, CUtensorMap(&map)[2], TileMapKind& kind) {
        return make_tile_maps(image, s.groups, s.param_dim, s, args.plan, dtype, map, kind);
    };
    return make(args.scan.u, args.u, args.kind[0]) && make(args.scan.z, args.z, args.kind[1]) &&
           make(args.scan.y, args.y, args.kind[2]);
}

bool prepare_grouped_scan_bwd_sm90(DType dtype, ScanBwdSm90Args& args) {
    const ScanShape& s = args.scan.shape;
    args.plan = plan_tiles(s, 1);
    const auto make = [&](const ImageArg& image, CUtensorMap(&map)[2], TileMapKind& kind) {
        return make_tile_maps(image, s.groups, s.param_dim, s, args.plan, dtype, map, kind);
    };
    return make(args.scan.u, args.u, args.kind[0]) && make(args.scan.z, args.z, args.kind[1]) &&
           make(args.scan.dy, args.dy, args.kind[2]) && make(args.scan.du, args.du, args.kind[3]) &&
           make(args.scan.dz, args.dz, args.kind[4]);
}

bool prepare_cross_scan_fwd_sm90(DType dtype, ScanFwdSm90Args& args) {
    const ScanShape& s = args.scan.shape;
    args.plan = plan_tiles(s, sm90_fwd_parts(s.lanes));
    return make_tile_maps(args.scan.u, 1, s.param_dim, s, args.plan, dtype, args.u, args.kind[0]) &&
           make_tile_maps(args.scan.y, s.scans, s.param_dim, s, args.plan, dtype, args.y, args.kind[2]);
}

bool prepare_cross_scan_bwd_sm90(DType dtype, ScanBwdSm90Args& args) {
    const ScanShape& s = args.scan.shape;
    args.plan = plan_tiles(s, 1);
    return make_tile_maps(args.scan.u, 1, s.param_dim, s, args.plan, dtype, args.u, args.kind[0]) &&
           make_tile_maps(args.scan.dy, 1, s.param_dim, s, args.plan, dtype, args.dy, args.kind[2]) &&
           make_tile_maps(args.scan.du, s.scans, s.param_dim, s, args.plan, dtype, args.du, args.kind[3]);
}

}  // namespace gm
