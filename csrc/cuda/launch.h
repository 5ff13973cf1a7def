// SPDX-License-Identifier: Apache-2.0
// The launchers: what the op entries call. Each queues its kernel, or those of one step after another, and returns what
// the runtime says.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace gm {

cudaError_t launch_grouped_scan_fwd(const ScanFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_grouped_scan_bwd(const ScanBwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_clear_images(const ClearImagesArgs& args, cudaStream_t stream);
cudaError_t launch_sum_images(const SumImagesArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_copy_rows(const CopyRowsArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_scan_reduce(const ScanReduceArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_depthwise_conv_fwd(const ConvFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_depthwise_conv_bwd(const ConvBwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_layer_norm_pool_fwd(const PoolFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_layer_norm_pool_bwd(const PoolBwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_modulated_layer_norm_fwd(const ModulatedFwdArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_modulated_layer_norm_bwd(const ModulatedBwdArgs& args, DType dtype, cudaStream_t stream);
// True where narrow_product_* takes rows of `in` and of `out` columns on the current device.
bool takes_narrow_product(DType dtype, int64_t in, int64_t out);
cudaError_t plan_narrow_product_bwd(DType dtype, NarrowProductArgs& args);
cudaError_t launch_narrow_product_fwd(const NarrowProductArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_narrow_product_bwd(const NarrowProductArgs& args, DType dtype, cudaStream_t stream);
bool takes_wide_product(DType dtype, int64_t in, int64_t out);
bool has_warp_products();  // the current device and this build, for both
cudaError_t launch_wide_product(const WideProductArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_reduce_columns(const ReduceArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_column_sums(const ColumnSumArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_pack_parameters(const PackArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_sum_parameters(const SumArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_batch_norm_relu_fwd(const BatchNormArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_batch_norm_relu_bwd(const BatchNormArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_batch_norm_fold(const FoldArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_channel_affinity_fwd(const AffinityArgs& args, DType dtype, cudaStream_t stream);
cudaError_t launch_channel_affinity_bwd(const AffinityArgs& args, DType dtype, cudaStream_t stream);

}  // namespace gm
