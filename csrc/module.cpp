// SPDX-License-Identifier: Apache-2.0
// The Python module `_C`: what was built. No torch header here: the module depends on one Python, the op library on
// none, and TORCH_TARGET_VERSION must not be seen by a translation unit that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_facts.h"
#include "cpu/capability.h"
#include "cuda/scan_plan.h"
#include "kernel_count.h"

namespace py = pybind11;

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

// Block shapes of the scan's CUDA kernels for one image of `tokens` tokens and `dim` channels a group.
py::dict grouped_selective_scan_plan(int dim, int64_t tokens, int states, int element_size) {
    if (dim < 1 || dim > gm::kMaxScanDim) {
        throw std::invalid_argument("dim must be in [1, " + std::to_string(gm::kMaxScanDim) + "], got " +
                                    std::to_string(dim));
    }
    if (states < 1 || states > gm::kMaxStates) {
        throw std::invalid_argument("states must be in [1, " + std::to_string(gm::kMaxStates) + "], got " +
                                    std::to_string(states));
    }
    if (tokens < 0) throw std::invalid_argument("tokens must not be negative, got " + std::to_string(tokens));
    if (element_size != 2 && element_size != 4) {
        throw std::invalid_argument("element_size must be 2 or 4, got " + std::to_string(element_size));
    }
    const int lanes = gm::scan_lanes(dim);
    py::dict plan;
    plan["lanes"] = lanes;
    plan["forward_threads"] = gm::scan_fwd_threads(lanes, tokens);
    plan["forward_tokens_per_thread"] = gm::kFwdTokens;
    plan["backward_threads"] = gm::scan_bwd_threads(lanes, tokens, states == 1, element_size);
    plan["backward_tokens_per_thread"] = gm::bwd_tokens(states == 1, element_size);
    return plan;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What the libraries of groupmamba_ext were built for.";
    m.def("build_info", &build_info, "A dict; groupmamba_ext.build_info() documents its keys.");
    m.def("grouped_selective_scan_plan", &grouped_selective_scan_plan, py::arg("dim"), py::arg("tokens"),
          py::arg("states") = 1, py::arg("element_size") = 2,
          "Lanes that share a token, threads of a block and tokens of a thread in the CUDA kernels.");
}
