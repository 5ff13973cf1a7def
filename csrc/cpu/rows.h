// SPDX-License-Identifier: Apache-2.0
// Rows of channels: where they are in an image, their moments, sums of many.
#pragma once

#include "cpu/math.h"
#include "cpu/params.h"

namespace gm::cpu::GM_CPU_CAPABILITY {

GM_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Token 0 of one image of one group.
template <class T>
GM_INLINE const T* rows_of(const ConstImage& image, int64_t batch, int64_t group) {
    return static_cast<const T*>(image.data) + batch * image.batch + group * image.group;
}
template <class T>
GM_INLINE T* rows_of(const Image& image, int64_t batch, int64_t group) {
    return static_cast<T*>(image.data) + batch * image.batch + group * image.group;
}

// Subtracts from a row a first estimate of its mean, so that (row - shift) * rstd is the row normalised: `shift` is
// what the estimate's rounding left, which shows where the mean is large against the deviations. Beyond `size` the row
// is zero to a whole vector, before and after.
template <class A>
GM_INLINE void center_row(A* row, int64_t size, A eps, A& shift, A& rstd) {
    Vec<A> total{}, rest{}, squares{};
    for (int64_t i = 0; i < size; i += kLanes<A>) total += load(row + i);
    const A estimate = sum(total) / A(size);
    for_vectors<A>(size, [&](int64_t i, auto lanes) {
        const Vec<A> d = keep(load(row + i) - estimate, lanes);
        store(row + i, d);
        rest += d;
        squares += d * d;
    });
    shift = sum(rest) / A(size);
    const A variance = sum(squares) / A(size) - shift * shift;
    rstd = A(1) / square_root((variance < 0 ? A(0) : variance) + eps);
}

template <class A>
GM_INLINE void add_to(A* row, Vec<A> v) {
    store(row, load(row) + v);
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
