// SPDX-License-Identifier: Apache-2.0
// The Python module `_C`: what was built, how the CUDA kernels would be launched, and how memory is laid out. No torch
// header here: the module depends on one Python, the op library on none, and TORCH_TARGET_VERSION must not be seen by a
// translation unit that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "build_facts.h"
#include "cpu/capability.h"
#include "cuda/batch_norm/args.h"
#include "cuda/depthwise_conv/plan.h"
#include "cuda/layer_norm/plan.h"
#include "cuda/narrow_conv/plan.h"
#include "cuda/scan/args.h"
#include "cuda/scan/plan.h"
#include "kernel_count.h"
#include "ops/layer/layout.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = GM_VERSION;
    info["torch_target"] = GM_TORCH_TARGET;
    info["cuda"] = GM_WITH_CUDA != 0;
    info["cuda_version"] = GM_WITH_CUDA ? py::object(py::str(GM_CUDA_VERSION)) : py::object(py::none());
    info["cuda_archs"] = std::vector<std::string> GM_CUDA_ARCHITECTURES;
    info["cpu_capability"] = gm::cpu::cpu_capability();
    info["cpu_vendor"] = gm::cpu::cpu_vendor();
    info["kernel_count"] = GM_KERNEL_COUNT;
    return info;
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (low <= value && value <= high) return;
    throw std::invalid_argument(std::string(name) + " must be in [" + std::to_string(low) + ", " +
                                std::to_string(high) + "], got " + std::to_string(value));
}

// The kernels for any architecture, dtype of `element_size` bytes and number of states.
py::dict grouped_selective_scan_plan(int64_t tokens, int dim, int states, int element_size) {
    check_range("tokens", tokens, 1, INT32_MAX);
    check_range("dim", dim, 1, gm::kMaxScanDim);
    check_range("states", states, 1, gm::kMaxStates);
    check_range("element_size", element_size, 2, 4);
    const int lanes = gm::scan_lanes(dim);
    return py::dict("lanes"_a = lanes, "forward_threads"_a = gm::scan_fwd_threads(lanes, tokens),
                    "forward_tokens_per_thread"_a = gm::kFwdTokens,
                    "backward_threads"_a = gm::scan_bwd_threads(lanes, tokens, states == 1, element_size),
                    "backward_tokens_per_thread"_a = gm::bwd_tokens(states == 1, element_size));
}

py::dict depthwise_conv3x3_plan(int64_t batch, int height, int width, int groups, int dim) {
    check_range("batch", batch, 1, INT32_MAX);
    check_range("height", height, 1, INT32_MAX);
    check_range("width", width, 1, INT32_MAX);
    check_range("groups", groups, 1, INT32_MAX);
    check_range("dim", dim, 1, INT32_MAX);
    const gm::ConvFwdPlan forward = gm::conv_fwd_plan(batch, height, width, groups, dim);
    const gm::ConvBwdPlan backward = gm::conv_bwd_plan(batch, height, width, groups, dim);
    return py::dict("forward_threads"_a = forward.threads, "forward_rows"_a = forward.rows,
                    "forward_strips"_a = forward.strips, "backward_threads"_a = backward.threads,
                    "backward_rows"_a = backward.rows, "backward_strips"_a = backward.strips,
                    "backward_images"_a = backward.images);
}

// Of the forward passes of layer_norm_pool and modulated_layer_norm.
py::dict layer_norm_plan(int64_t batch, int64_t tokens, int dim) {
    check_range("batch", batch, 1, INT32_MAX);
    check_range("tokens", tokens, 1, INT32_MAX);
    check_range("dim", dim, 1, INT32_MAX);
    const gm::NormPlan plan = gm::norm_plan(batch, tokens, dim, gm::NormPass::kForward);
    return py::dict("lanes"_a = plan.lanes, "vectors"_a = plan.vecs, "strip_tokens"_a = plan.strip_tokens,
                    "strips"_a = plan.strips);
}

// What groupmamba_ext/layouts.py repeats.
py::dict limits() {
    return py::dict("states"_a = gm::kMaxStates, "groups"_a = gm::kMaxGroups, "scanned_channels"_a = gm::kMaxScanDim,
                    "batch_norm_channels"_a = gm::kBatchNormUnit * gm::kBatchNormThreads,
                    "biased_channels"_a = gm::kBiasedChannels, "pixel_unit"_a = gm::kPixelUnit,
                    "workspace_unit"_a = gm::WorkspaceLayout::kAlignment);
}

int64_t chunk_of(int64_t dim, int64_t states) {
    check_range("dim", dim, 1, gm::kMaxScanDim);
    check_range("states", states, 1, gm::kMaxStates);
    return gm::scan_chunk(dim, states);
}

int64_t saved_states(int64_t height, int64_t width, int64_t dim, int64_t states) {
    check_range("height", height, 0, INT32_MAX);
    check_range("width", width, 0, INT32_MAX);
    return gm::scan_saved_states(height, width, dim, chunk_of(dim, states));
}

int64_t slice_width(int64_t dim) {
    check_range("dim", dim, 1, INT32_MAX);
    return gm::scan_slice_width(dim);
}

gm::Shape shape(const std::vector<int64_t>& values) { return gm::Shape(values.begin(), values.end()); }

std::vector<int64_t> strides_by(gm::Shape (*strides_of)(const gm::Shape&, const gm::Shape&),
                                const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    check_range("the number of strides", static_cast<int64_t>(strides.size()), static_cast<int64_t>(sizes.size()),
                static_cast<int64_t>(sizes.size()));
    const gm::Shape result = strides_of(shape(sizes), shape(strides));
    return {result.begin(), result.end()};
}

// Elements that the layer's forward saves for its backward: in the dtype of the images, in float32.
std::pair<int64_t, int64_t> layer_saved(int64_t batch, int64_t height, int64_t width, int64_t groups, int64_t channels,
                                        int64_t inner, int64_t states, int64_t rank, int64_t hidden, bool merges) {
    check_range("groups", groups, 1, gm::kMaxGroups);
    gm::LayerSizes s = gm::layer_sizes_of(batch, height, width, groups, channels, inner, states, rank, hidden, merges);
    s.saved_states = saved_states(height, width, s.inner_pad, s.states);
    gm::WorkspaceLayout workspace;
    gm::reserve_layer(s, true, workspace);
    return {workspace.image_elements(), workspace.float_elements()};
}

int64_t feed_forward_saved(int64_t tokens, int64_t channels, int64_t hidden, bool narrow) {
    gm::WorkspaceLayout workspace;
    if (gm::keeps_hidden(channels, narrow)) gm::reserve_feed_forward(tokens, channels, hidden, workspace);
    return workspace.image_elements();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What the libraries of groupmamba_ext were built for, how the CUDA kernels are launched, and layouts.";
    m.def("build_info", &build_info, "A dict; groupmamba_ext.build_info() documents its keys.");
    m.def("grouped_selective_scan_plan", &grouped_selective_scan_plan, "tokens"_a, "dim"_a, "states"_a = 1,
          "element_size"_a = 2, "Lanes that share a token, threads of a block, tokens of a thread.");
    m.def("depthwise_conv3x3_plan", &depthwise_conv3x3_plan, "batch"_a, "height"_a, "width"_a, "groups"_a, "dim"_a,
          "Threads of a block, rows of a strip, strips of an image, images of a backward block.");
    m.def(
        "layer_norm_plan", &layer_norm_plan, "batch"_a, "tokens"_a, "dim"_a,
        "Lanes that share a token, 4-channel vectors of a lane (0: wide rows), tokens of a strip, strips of an image.");

    py::module_ layouts = m.def_submodule("layouts", "Sizes and strides of what the ops allocate; sizes of CUDA.");
    layouts.def("limits", &limits);
    layouts.def("takes_narrow_conv", &gm::takes_narrow_conv, "in_channels"_a, "out_channels"_a, "taps"_a);
    layouts.def("chunk_tokens", &chunk_of, "dim"_a, "states"_a, "Path tokens between two saved states.");
    layouts.def("saved_states", &saved_states, "height"_a, "width"_a, "dim"_a, "states"_a,
                "Of a plane, for its backward.");
    layouts.def("slice_width", &slice_width, "dim"_a, "Channels of a slice of the cross scan.");
    layouts.def("padded_features", &gm::padded_features, "features"_a, "inner_pad"_a);
    layouts.def(
        "image_result_strides",
        [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
            return strides_by(&gm::image_result_strides, sizes, strides);
        },
        "sizes"_a, "strides"_a, "Of a result like an image.");
    layouts.def(
        "gradient_strides",
        [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
            return strides_by(&gm::gradient_strides, sizes, strides);
        },
        "sizes"_a, "strides"_a, "Of the gradient of a layer's parameter.");
    layouts.def("layer_saved", &layer_saved, "batch"_a, "height"_a, "width"_a, "groups"_a, "channels"_a, "inner"_a,
                "states"_a, "rank"_a, "hidden"_a, "merges"_a, "Elements of both buffers for the layer's backward.");
    layouts.def("feed_forward_saved", &feed_forward_saved, "tokens"_a, "channels"_a, "hidden"_a, "narrow"_a);
}
