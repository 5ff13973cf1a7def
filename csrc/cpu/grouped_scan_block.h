// SPDX-License-Identifier: Apache-2.0
// A block of path tokens of one group in scratch: what the forward and the backward of the scan both need.
#pragma once

#include "cpu/math.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace gm::cpu::GM_CPU_CAPABILITY {

// Row-major numbers of the path tokens [first, first + count).
inline void path_tokens(const ScanParams& p, int64_t direction, int64_t first, int64_t count, int64_t* tokens) {
    const bool reversed = direction == 1 || direction == 3;
    const int64_t last = p.height * p.width - 1;
    const int64_t step = reversed ? -1 : 1;
    int64_t q = reversed ? last - first : first;
    if (direction < 2) {
        for (int64_t t = 0; t < count; ++t, q += step) tokens[t] = q;
        return;
    }
    int64_t column = q / p.height, row = q % p.height;
    for (int64_t t = 0; t < count; ++t) {
        tokens[t] = row * p.width + column;
        row += step;
        if (row == p.height) row = 0, ++column;
        if (row < 0) row = p.height - 1, --column;
    }
}

// out[t * pitch + i] = rows[tokens[t] * stride + i] for i < size. Whole vectors are stored: `out` needs a vector of
// slack where pitch < round_up(size, lanes); lanes from size to there are zero.
template <class T>
inline void gather_rows(const T* rows, int64_t stride, const int64_t* tokens, int64_t count, int64_t size,
                        int64_t pitch, Accumulate<T>* out) {
    for (int64_t t = 0; t < count; ++t) {
        const T* row = rows + tokens[t] * stride;
        Accumulate<T>* to = out + t * pitch;
        for_vectors<Accumulate<T>>(size, [&](int64_t i, auto lanes) { store(to + i, load(row + i, lanes)); });
    }
}

// rows[tokens[t] * stride + i] = from[t * pitch + i]; reads of `from` may pass `size` by less than a vector.
template <class T>
inline void scatter_rows(const Accumulate<T>* from, int64_t pitch, const int64_t* tokens, int64_t count, int64_t size,
                         int64_t stride, T* rows) {
    for (int64_t t = 0; t < count; ++t) {
        T* row = rows + tokens[t] * stride;
        const Accumulate<T>* in = from + t * pitch;
        for_vectors<Accumulate<T>>(size, [&](int64_t i, auto lanes) { store(row + i, load(in + i), lanes); });
    }
}

// The same into a wide image, or with `add` onto it.
template <class A>
inline void scatter_sums(const A* from, int64_t pitch, const int64_t* tokens, int64_t count, int64_t size, bool add,
                         int64_t stride, A* rows) {
    for (int64_t t = 0; t < count; ++t) {
        A* row = rows + tokens[t] * stride;
        const A* in = from + t * pitch;
        for_vectors<A>(size, [&](int64_t i, auto lanes) {
            const Vec<A> v = load(in + i);
            store(row + i, add ? v + load(row + i, lanes) : v, lanes);
        });
    }
}

// Which channels of which group. `pitch` is the length of their rows in scratch: `channels` rounded up to kRowUnit.
struct Slice {
    int64_t batch, group, first_channel, channels, pitch;
};

// Parameter rows start at the slice's first channel and are p.padded apart.
template <class A>
struct SliceParameters {
    const A *decay, *dt_weight, *skip, *dt_bias, *norm_weight, *norm_bias, *gate;

    SliceParameters(const ScanParams& p, const Slice& s) {
        const int64_t at = s.group * p.padded + s.first_channel;
        const auto row = [](const void* data, int64_t offset) {
            return data == nullptr ? nullptr : static_cast<const A*>(data) + offset;
        };
        decay = row(p.A, s.group * p.states * p.padded + s.first_channel);
        dt_weight = row(p.dt_weight, s.group * p.rank * p.padded + s.first_channel);
        skip = row(p.D, at);
        dt_bias = row(p.dt_bias, at);
        norm_weight = row(p.norm_weight, at);
        norm_bias = row(p.norm_bias, at);
        gate = row(p.gate, s.batch * p.groups * p.padded + at);
    }
};

// Inputs of `count` tokens: u and step (count, pitch), dt (count, rank), B and C (count, states).
template <class A>
struct Block {
    int64_t* tokens;
    A *u, *step, *dt, *B, *C;

    Block(Scratch& scratch, const ScanParams& p, int64_t capacity, int64_t pitch) {
        const int64_t slack = kLanes<A>;
        tokens = scratch.take<int64_t>(capacity);
        u = scratch.take<A>(capacity * pitch);
        step = scratch.take<A>(capacity * pitch);
        dt = scratch.take<A>(capacity * p.rank + slack);
        B = scratch.take<A>(capacity * p.states + slack);
        C = scratch.take<A>(capacity * p.states + slack);
    }
};

template <class A>
GM_INLINE void clear_padding(A* rows, int64_t count, int64_t size, int64_t pitch) {
    const int64_t written = round_up(size, kLanes<A>);
    for (int64_t t = 0; t < count && written < pitch; ++t) {
        for (int64_t i = written; i < pitch; i += kLanes<A>) store(rows + t * pitch + i, Vec<A>{});
    }
}

// step = softplus(bias + sum_r weight_r dt_r), and softplus's derivative where it is wanted (1 without softplus).
// With rank 0 `step` holds the unbiased steps already.
template <class A, bool kDerivative>
inline void finish_steps(const ScanParams& p, const Slice& s, const SliceParameters<A>& w, int64_t count,
                         const Block<A>& block, A* derivative) {
    constexpr int kTokens = 4;  // share the loads of a weight
    for (int64_t i = 0; i < s.pitch; i += kLanes<A>) {
        const Vec<A> bias = load(w.dt_bias + i);
        const auto tile = [&](int64_t t, auto tokens) __attribute__((always_inline)) {
            constexpr int kCount = decltype(tokens)::value;
            Vec<A> x[kCount];
            for (int k = 0; k < kCount; ++k) x[k] = bias;
            if (p.rank == 0) {
                for (int k = 0; k < kCount; ++k) x[k] += load(block.step + (t + k) * s.pitch + i);
            }
            for (int64_t r = 0; r < p.rank; ++r) {
                const Vec<A> weight = load(w.dt_weight + r * p.padded + i);
                for (int k = 0; k < kCount; ++k) x[k] += weight * block.dt[(t + k) * p.rank + r];
            }
            for (int k = 0; k < kCount; ++k) {
                const int64_t at = (t + k) * s.pitch + i;
                if constexpr (kDerivative) {
                    Vec<A> slope = splat(A(1));
                    const Vec<A> smooth = softplus(x[k], slope);
                    store(block.step + at, p.softplus ? smooth : x[k]);
                    store(derivative + at, p.softplus ? slope : splat(A(1)));
                } else {
                    store(block.step + at, p.softplus ? softplus(x[k]) : x[k]);
                }
            }
        };
        int64_t t = 0;
        for (; t + kTokens <= count; t += kTokens) tile(t, std::integral_constant<int, kTokens>{});
        for (; t < count; ++t) tile(t, std::integral_constant<int, 1>{});
    }
}

// Fills `block` with the path tokens [first, first + count).
template <class T, bool kDerivative>
inline void load_block(const ScanParams& p, const Slice& s, const SliceParameters<Accumulate<T>>& w, int64_t first,
                       int64_t count, const Block<Accumulate<T>>& block, Accumulate<T>* derivative) {
    path_tokens(p, p.directions[s.group], first, count, block.tokens);
    const auto gather = [&](const ConstImage& image, int64_t offset, int64_t size, int64_t pitch, Accumulate<T>* out) {
        gather_rows<T>(rows_of<T>(image, s.batch, s.group) + offset, image.token, block.tokens, count, size, pitch,
                       out);
    };
    gather(p.u, s.first_channel, s.channels, s.pitch, block.u);
    clear_padding(block.u, count, s.channels, s.pitch);
    if (p.rank > 0) {
        gather(p.dt, 0, p.rank, p.rank, block.dt);
    } else {
        gather(p.dt, s.first_channel, s.channels, s.pitch, block.step);
        clear_padding(block.step, count, s.channels, s.pitch);
    }
    gather(p.B, 0, p.states, p.states, block.B);
    gather(p.C, 0, p.states, p.states, block.C);
    finish_steps<Accumulate<T>, kDerivative>(p, s, w, count, block, derivative);
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
