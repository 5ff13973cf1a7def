// SPDX-License-Identifier: Apache-2.0
// Drop path (stochastic depth): what the entries of the layer and the feed-forward network share.
#include "ops/layer/drop_path.h"

#include "cuda/images/launch.h"

namespace gm {

DropPathArg drop_path_arg(const OptTensor& mask, double scale, bool residual, int64_t batch, const Tensor& like) {
    if (!mask) {
        GM_CHECK(scale == 1., "drop_path_scale goes with drop_path_mask, got ", scale);
        return {};
    }
    GM_CHECK(residual, "drop_path_mask goes with residual");
    check_shape(*mask, "drop_path_mask", {batch});
    GM_CHECK(is_float(*mask) && mask->is_contiguous() && same_device(*mask, like),
             "drop_path_mask must be contiguous float32 on the device of x");
    return {static_cast<const float*>(mask->data_ptr()), static_cast<float>(scale)};
}

void clear_dropped(const Tensor& images, int64_t batch, const DropPathArg& drop_path, const CudaContext& context) {
    if (drop_path.mask == nullptr) return;
    const ClearImagesArgs args{images.data_ptr(), batch,
                               images.numel() / batch * static_cast<int64_t>(images.element_size()), drop_path};
    check_cuda(launch_clear_images(args, context.stream()), "images whose branch is dropped");
}

}  // namespace gm
