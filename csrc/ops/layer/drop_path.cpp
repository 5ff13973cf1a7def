// SPDX-License-Identifier: Apache-2.0
// Stochastic depth: what the entries of the layer and the feed-forward network share.
#include "ops/layer/drop_path.h"

#include "cuda/images/launch.h"

namespace gm {

KeptArg kept_arg(const OptTensor& kept, double scale, bool residual, int64_t batch, const Tensor& like) {
    if (!kept) {
        GM_CHECK(scale == 1., "kept_scale goes with kept, got ", scale);
        return {};
    }
    GM_CHECK(residual, "kept goes with residual");
    check_shape(*kept, "kept", {batch});
    GM_CHECK(is_float(*kept) && kept->is_contiguous() && same_device(*kept, like),
             "kept must be contiguous float32 on the device of x");
    return {static_cast<const float*>(kept->data_ptr()), static_cast<float>(scale)};
}

void clear_left_out(const Tensor& images, int64_t batch, const KeptArg& kept, const CudaContext& context) {
    if (kept.images == nullptr) return;
    const ClearImagesArgs args{images.data_ptr(), batch,
                               images.numel() / batch * static_cast<int64_t>(images.element_size()), kept};
    check_cuda(launch_clear_images(args, context.stream()), "images left out");
}

}  // namespace gm
