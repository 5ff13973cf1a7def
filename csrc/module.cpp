// SPDX-License-Identifier: Apache-2.0
// The Python module `_C`: what was built, and how the CUDA kernels would be launched. No torch header here: the module
// depends on one Python, the op library on none, and TORCH_TARGET_VERSION must not be seen by a translation unit that
// includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_facts.h"
#include "cpu/capability.h"
#include "cuda/depthwise_conv/plan.h"
#include "cuda/layer_norm/plan.h"
#include "cuda/scan/plan.h"
#include "kernel_count.h"

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
    const gm::NormPlan plan = gm::norm_plan(batch, tokens, dim, gm::tuning::kNormFwdBlocks);
    return py::dict("lanes"_a = plan.lanes, "vectors"_a = plan.vecs, "strip_tokens"_a = plan.strip_tokens,
                    "strips"_a = plan.strips);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What the libraries of groupmamba_ext were built for, and how the CUDA kernels are launched.";
    m.def("build_info", &build_info, "A dict; groupmamba_ext.build_info() documents its keys.");
    m.def("grouped_selective_scan_plan", &grouped_selective_scan_plan, "tokens"_a, "dim"_a, "states"_a = 1,
          "element_size"_a = 2, "Lanes that share a token, threads of a block, tokens of a thread.");
    m.def("depthwise_conv3x3_plan", &depthwise_conv3x3_plan, "batch"_a, "height"_a, "width"_a, "groups"_a, "dim"_a,
          "Threads of a block, rows of a strip, strips of an image, images of a backward block.");
    m.def(
        "layer_norm_plan", &layer_norm_plan, "batch"_a, "tokens"_a, "dim"_a,
        "Lanes that share a token, 4-channel vectors of a lane (0: wide rows), tokens of a strip, strips of an image.");
}
