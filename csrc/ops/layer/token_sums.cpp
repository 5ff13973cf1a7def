// SPDX-License-Identifier: Apache-2.0
// Sums over all tokens of an image as many small ones side by side, and rows padded with zeros.
#include "ops/layer/token_sums.h"

#include "cuda/common/tuning.h"
#include "host/stream.h"

namespace gm {

WeightPartials weight_partials(const Tensor& dy, const Tensor& x, const CudaContext& context, double alpha) {
    const int64_t groups = dy.size(0), tokens = dy.size(1), n = dy.size(2), k = x.size(2);
    constexpr int64_t kMinTerms = 256, kMaxParts = 64;
    const bool are_long = std::min(n, k) >= tuning::kLongSide;
    const int64_t tile = are_long ? tuning::kLongTile : tuning::kWeightTile;
    const int64_t most_tiles = are_long ? tuning::kLongTiles : tuning::kWeightTiles;
    const int64_t tiles = groups * ((n + tile - 1) / tile) * ((k + tile - 1) / tile);
    const int64_t wanted = std::min(std::max<int64_t>((most_tiles + tiles - 1) / tiles, 1), kMaxParts);
    const int64_t most = std::max<int64_t>(std::min(wanted, tokens / kMinTerms), 1);
    int64_t parts = most;
    while (tokens % parts != 0) --parts;
    const auto part = [](const Tensor& t, int64_t first, int64_t batch, int64_t terms) {
        return alias(t, {batch, terms, t.size(2)}, {terms * t.size(2), t.size(2), 1}, first * t.size(2));
    };
    if (2 * parts >= most) {
        const Tensor values = empty({groups * parts, n, k}, dy.scalar_type(), dy);
        const int64_t terms = tokens / parts;
        matmul_out(values, transposed(part(dy, 0, groups * parts, terms)), part(x, 0, groups * parts, terms), context,
                   alpha);
        return {values, parts};
    }
    // No number of equal parts will do: one more, shorter part, a group at a time.
    const int64_t terms = tokens / most, rest = tokens - most * terms, count = most + (rest > 0 ? 1 : 0);
    const Tensor values = empty({groups * count, n, k}, dy.scalar_type(), dy);
    for (int64_t g = 0; g < groups; ++g) {
        const auto slot = [&](int64_t i, int64_t batch) {
            return alias(values, {batch, n, k}, {n * k, k, 1}, (g * count + i) * n * k);
        };
        const int64_t first = g * tokens;
        matmul_out(slot(0, most), transposed(part(dy, first, most, terms)), part(x, first, most, terms), context,
                   alpha);
        if (rest > 0)
            matmul_out(slot(most, 1), transposed(part(dy, first + most * terms, 1, rest)),
                       part(x, first + most * terms, 1, rest), context, alpha);
    }
    return {values, count};
}

Tensor sum_of_columns(ParameterSums& sums, const Tensor& bias, const Tensor& rows, int64_t columns, DType dtype,
                      cudaStream_t stream, const DropPathArg& drop_path, int64_t rows_of_image) {
    constexpr int64_t kLeastRows = 16;
    ColumnSumArgs args;
    args.x = rows.data_ptr(), args.rows = rows.size(0), args.row_stride = rows.stride(0);
    args.columns = static_cast<int>(columns);
    args.drop_path = drop_path, args.rows_of_image = rows_of_image;
    args.blocks =
        static_cast<int>(std::min<int64_t>(tuning::kColumnSumBlocks, (rows.size(0) + kLeastRows - 1) / kLeastRows));
    const PartialRows partials = partial_rows(args.blocks, columns, rows);
    args.partials = static_cast<float*>(partials.values.data_ptr());
    check_cuda(launch_column_sums(args, dtype, stream), "bias gradient");
    return sums.add_rows(bias, {1, 1, columns}, partials, 0, 1, columns);
}

PaddedRows::PaddedRows(const Tensor& image, const CudaContext& context) {
    const int64_t channels = image.size(3), step = round_up(channels, kPixelUnit);
    const int64_t tokens = image.size(0) * image.size(1) * image.size(2);
    // What lies between the pixels of a slice of a wider image is multiplied by zeros of a weight, or never read.
    if (channels == step) {
        rows_ = alias(image.is_contiguous() ? image : contiguous_copy(image), {tokens, step});
        return;
    }
    if (is_padded(image, step)) {
        rows_ = alias(image, {tokens, step});
        return;
    }
    rows_ = empty({tokens, step}, image.scalar_type(), image);
    // Most gradients have one stride for all pixels; a slice of a batch may not.
    const std::optional<Shape> strides = view_strides(image, {tokens, channels});
    const bool walks = strides && (channels == 1 || (*strides)[1] == 1);
    const Tensor dense = walks ? image : contiguous_copy(image);
    CopyRowsArgs args;
    args.from[0] = dense.data_ptr(), args.to[0] = rows_.data_ptr(), args.rows = tokens;
    args.stride = walks ? (*strides)[0] : channels;
    args.channels = static_cast<int>(channels), args.width = static_cast<int>(step);
    check_cuda(launch_copy_rows(args, dtype_of(image), context.stream()), "padding rows");
}

bool PaddedRows::is_padded(const Tensor& image, int64_t step) {
    int64_t bytes = 0, offset = 0;
    GM_TORCH_CALL(aoti_torch_get_storage_size(image.get(), &bytes));
    GM_TORCH_CALL(aoti_torch_get_storage_offset(image.get(), &offset));
    const int64_t size = static_cast<int64_t>(image.element_size());
    const int64_t height = image.size(1), width = image.size(2), tokens = image.size(0) * height * width;
    const bool regular = image.stride(3) == 1 && image.stride(2) == step && image.stride(1) == width * step &&
                         image.stride(0) == height * width * step;
    const bool aligned =
        reinterpret_cast<uintptr_t>(image.data_ptr()) % (kPixelUnit * static_cast<uintptr_t>(size)) == 0;
    return regular && aligned && (offset + tokens * step) * size <= bytes;
}

}  // namespace gm
