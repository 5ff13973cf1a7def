// SPDX-License-Identifier: Apache-2.0
// The template arguments of the kernels for several states.
#pragma once

#include <type_traits>

#include "cuda/common/dispatch.h"
#include "cuda/scan/many_states/plan.h"

namespace gm {

// Calls f(type tag, std::integral_constant<int, states of a thread>).
template <class F>
cudaError_t dispatch_many_states(DType dtype, const ManyStatesLayout& layout, F&& f) {
    return dispatch_dtype(dtype, [&](auto tag) {
        switch (layout.each) {
            case 2: return f(tag, std::integral_constant<int, 2>{});
            case 4: return f(tag, std::integral_constant<int, 4>{});
            default: return f(tag, std::integral_constant<int, 8>{});
        }
    });
}

}  // namespace gm
