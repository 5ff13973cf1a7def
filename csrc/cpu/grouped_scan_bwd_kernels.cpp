// SPDX-License-Identifier: Apache-2.0
// Backward of the grouped scan: chunks in reverse, each from the state saved before it. With gh_t the gradient of h_t,
//   gh_t = C_t gy_t + exp(step_{t+1} A) gh_{t+1},   gy the gradient of y_t = C_t . h_t + D u_t,
// everything else is local to a token. Sums over tokens are float within a chunk and double across chunks.
#include <initializer_list>

#include <initializer_list>

#include "cpu/grouped_scan.h"
#include "cpu/grouped_scan_block.h"

namespace gm::cpu::GM_CPU_CAPABILITY {
namespace {

inline int64_t chunk_capacity(const ScanParams& p) {
    const int64_t length = p.height * p.width;
    return p.chunk < length ? p.chunk : length;
}

// Rows of parameter gradients, in the order of ScanGradients::partials.
template <class A>
struct ParameterSums {
    A *decay, *dt_weight, *dt_bias, *skip, *norm_weight, *norm_bias, *gate;

    ParameterSums(A* rows, const ScanParams& p) {
        decay = rows;
        dt_weight = decay + p.states * p.padded;
        dt_bias = dt_weight + p.rank * p.padded;
        skip = dt_bias + p.padded;
        norm_weight = skip + p.padded;
        norm_bias = norm_weight + p.padded;
        gate = norm_bias + p.padded;
    }
    static int64_t rows(const ScanParams& p) { return p.states + p.rank + 5; }
};

template <class A>
struct BackwardScratch {
    int64_t capacity;
    Block<A> block;
    // (tokens, padded); `before` is the state before each token, `du` takes the place of y
    A *slope, *y, *gy, *factor, *before, *du, *dstep;
    A* carry;              // (states, padded): exp(step A) gh of the token after the chunk
    A *dt, *dB, *dC;       // gradients of the rows of `block`
    A *lanes_B, *lanes_C;  // (tokens, lanes): sums over channels, not yet over lanes
    A* sums;

    BackwardScratch(Scratch& scratch, const ScanParams& p)
        : capacity(chunk_capacity(p)), block(scratch, p, capacity, p.padded) {
        for (A** rows : {&slope, &y, &gy, &factor, &before, &dstep}) *rows = scratch.take<A>(capacity * p.padded);
        du = y;
        carry = scratch.take<A>(p.states * p.padded);
        dt = scratch.take<A>(capacity * p.rank + kLanes<A>);
        dB = scratch.take<A>(capacity * p.states + kLanes<A>);
        dC = scratch.take<A>(capacity * p.states + kLanes<A>);
        lanes_B = scratch.take<A>(capacity * kLanes<A>);
        lanes_C = scratch.take<A>(capacity * kLanes<A>);
        sums = scratch.take<A>(ParameterSums<A>::rows(p) * p.padded);
    }
};

// State n over the chunk from its saved start: exp(step A), the state before each token and, if wanted, y (+)= C h.
template <class A, bool kOutput>
void replay_state(const ScanParams& p, const Slice& s, const SliceParameters<A>& w, const A* saved, int64_t n,
                  int64_t count, const BackwardScratch<A>& scratch) {
    const Block<A>& block = scratch.block;
    for_vectors<A>(s.channels, [&](int64_t i, auto lanes) {
        const Vec<A> decay = load(w.decay + n * p.padded + i), skip = load(w.skip + i);
        Vec<A> h = load(saved + n * p.dim + i, lanes);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t at = t * s.pitch + i;
            const Vec<A> step = load(block.step + at), u = load(block.u + at), factor = exp(step * decay);
            store(scratch.before + at, h);
            store(scratch.factor + at, factor);
            h = factor * h + step * u * block.B[t * p.states + n];
            if constexpr (kOutput) {
                const Vec<A> y = n == 0 ? skip * u : load(scratch.y + at);
                store(scratch.y + at, y + h * block.C[t * p.states + n]);
            }
        }
    });
}

// gy from dy through the gates and the norm; dz; sums for gate, norm_weight and norm_bias.
template <class T>
void output_gradient(const ScanParams& p, const ScanGradients& grads, const Slice& s,
                     const SliceParameters<Accumulate<T>>& w, int64_t count,
                     const BackwardScratch<Accumulate<T>>& scratch) {
    using A = Accumulate<T>;
    const bool norm = w.norm_weight != nullptr, gated = p.z.data != nullptr;
    const A eps = static_cast<A>(p.norm_eps);
    const T* dy_rows = rows_of<T>(grads.dy, s.batch, s.group);
    const T* z_rows = gated ? rows_of<T>(p.z, s.batch, s.group) : nullptr;
    T* dz_rows = gated ? rows_of<T>(grads.dz, s.batch, s.group) : nullptr;
    const ParameterSums<A> sums(scratch.sums, p);
    for (int64_t t = 0; t < count; ++t) {
        const int64_t token = scratch.block.tokens[t];
        A *y = scratch.y + t * s.pitch, *gy = scratch.gy + t * s.pitch;
        A shift = 0, rstd = 1;
        if (norm) center_row(y, s.channels, eps, shift, rstd);
        Vec<A> total{}, moment{};
        for_vectors<A>(s.channels, [&](int64_t i, auto lanes) {
            const Vec<A> unit = (load(y + i) - shift) * rstd;
            const Vec<A> value = norm ? unit * load(w.norm_weight + i) + load(w.norm_bias + i) : load(y + i);
            const Vec<A> dy = load(dy_rows + token * grads.dy.token + i, lanes);
            Vec<A> g = dy * load(w.gate + i), ungated = value;
            if (gated) {
                const Vec<A> z = load(z_rows + token * p.z.token + i, lanes), open = sigmoid(z);
                store(dz_rows + token * grads.dz.token + i, g * value * open * (A(1) + z * (A(1) - open)), lanes);
                g *= z * open;
                ungated *= z * open;
            }
            add_to(sums.gate + i, dy * ungated);
            if (norm) {
                add_to(sums.norm_weight + i, g * unit);
                add_to(sums.norm_bias + i, g);
                g *= load(w.norm_weight + i);
                total += g;
                moment += g * unit;
            }
            store(gy + i, g);
        });
        if (!norm) continue;
        const A mean_g = sum(total) / A(s.channels), mean_moment = sum(moment) / A(s.channels);
        for_vectors<A>(s.channels, [&](int64_t i, auto lanes) {
            const Vec<A> unit = (load(y + i) - shift) * rstd;
            store(gy + i, keep((load(gy + i) - mean_g - unit * mean_moment) * rstd, lanes));
        });
    }
    clear_padding(scratch.gy, count, s.channels, s.pitch);
}

// out[t * stride] = the sum of row t's lanes.
template <class A>
GM_INLINE void sum_rows(const A* lanes, int64_t count, A* out, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) out[t * stride] = sum(load(lanes + t * kLanes<A>));
}

// The recurrence in reverse for state n: du, dstep, dB, dC; sums for A and, with the first state, D.
template <class A, bool kFirst>
void reverse_state(const ScanParams& p, const Slice& s, const SliceParameters<A>& w, int64_t n, int64_t count,
                   const BackwardScratch<A>& scratch) {
    const Block<A>& block = scratch.block;
    const ParameterSums<A> sums(scratch.sums, p);
    for (int64_t i = 0; i < s.pitch; i += kLanes<A>) {
        const Vec<A> decay = load(w.decay + n * p.padded + i), skip = load(w.skip + i);
        Vec<A> carry = load(scratch.carry + n * p.padded + i), decay_sum{}, skip_sum{};
        for (int64_t t = count; t-- > 0;) {
            const int64_t at = t * s.pitch + i;
            const A B = block.B[t * p.states + n], C = block.C[t * p.states + n];
            const Vec<A> gy = load(scratch.gy + at), u = load(block.u + at), step = load(block.step + at);
            const Vec<A> factor = load(scratch.factor + at), kept = factor * load(scratch.before + at);
            const Vec<A> gh = gy * C + carry;
            carry = gh * factor;
            const Vec<A> in_B = gh * step * u, in_C = gy * (kept + step * u * B);
            A *sum_B = scratch.lanes_B + t * kLanes<A>, *sum_C = scratch.lanes_C + t * kLanes<A>;
            store(sum_B, i == 0 ? in_B : load(sum_B) + in_B);
            store(sum_C, i == 0 ? in_C : load(sum_C) + in_C);
            const Vec<A> du = kFirst ? gy * skip : load(scratch.du + at);
            const Vec<A> dstep = gh * (u * B + decay * kept);
            store(scratch.du + at, du + gh * step * B);
            store(scratch.dstep + at, kFirst ? dstep : load(scratch.dstep + at) + dstep);
            decay_sum += gh * step * kept;
            if constexpr (kFirst) skip_sum += gy * u;
        }
        store(scratch.carry + n * p.padded + i, carry);
        add_to(sums.decay + n * p.padded + i, decay_sum);
        if constexpr (kFirst) add_to(sums.skip + i, skip_sum);
    }
    sum_rows(scratch.lanes_B, count, scratch.dB + n, p.states);
    sum_rows(scratch.lanes_C, count, scratch.dC + n, p.states);
}

// Through softplus and the low-rank projection: `dstep` becomes the gradient before the softplus, then ddt.
template <class A>
void step_gradient(const ScanParams& p, const Slice& s, const SliceParameters<A>& w, int64_t count,
                   const BackwardScratch<A>& scratch) {
    const ParameterSums<A> sums(scratch.sums, p);
    for (int64_t i = 0; i < s.pitch; i += kLanes<A>) {
        Vec<A> total{};
        for (int64_t t = 0; t < count; ++t) {
            const int64_t at = t * s.pitch + i;
            const Vec<A> g = load(scratch.dstep + at) * load(scratch.slope + at);
            store(scratch.dstep + at, g);
            total += g;
        }
        add_to(sums.dt_bias + i, total);
    }
    for (int64_t r = 0; r < p.rank; ++r) {
        for (int64_t i = 0; i < s.pitch; i += kLanes<A>) {
            const Vec<A> weight = load(w.dt_weight + r * p.padded + i);
            Vec<A> total{};
            for (int64_t t = 0; t < count; ++t) {
                const Vec<A> g = load(scratch.dstep + t * s.pitch + i);
                A* lanes = scratch.lanes_B + t * kLanes<A>;
                store(lanes, i == 0 ? g * weight : load(lanes) + g * weight);
                total += g * scratch.block.dt[t * p.rank + r];
            }
            add_to(sums.dt_weight + r * p.padded + i, total);
        }
        sum_rows(scratch.lanes_B, count, scratch.dt + r, p.rank);
    }
}

template <class T>
void scan_group(const ScanParams& p, const ScanGradients& grads, const Slice& s, void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const BackwardScratch<A> scratch(arena, p);
    const SliceParameters<A> w(p, s);
    const int64_t image = s.batch * p.groups + s.group, sum_size = ParameterSums<A>::rows(p) * p.padded;
    double* partials = grads.partials + image * sum_size;
    for (int64_t i = 0; i < sum_size; ++i) partials[i] = 0;
    for (int64_t i = 0; i < p.states * p.padded; ++i) scratch.carry[i] = 0;
    for (A* rows : {scratch.before, scratch.factor, scratch.y})
        clear_padding(rows, scratch.capacity, s.channels, s.pitch);

    const int64_t length = p.height * p.width;
    for (int64_t chunk = p.chunks; chunk-- > 0;) {
        const int64_t first = chunk * p.chunk;
        const int64_t count = first + p.chunk < length ? p.chunk : length - first;
        const A* saved = static_cast<const A*>(grads.states) + (image * p.chunks + chunk) * p.states * p.dim;
        for (int64_t i = 0; i < sum_size; ++i) scratch.sums[i] = 0;
        load_block<T, true>(p, s, w, first, count, scratch.block, scratch.slope);
        for (int64_t n = 0; n < p.states; ++n) replay_state<A, true>(p, s, w, saved, n, count, scratch);
        output_gradient<T>(p, grads, s, w, count, scratch);
        for (int64_t n = 0; n < p.states; ++n) {
            if (p.states > 1) replay_state<A, false>(p, s, w, saved, n, count, scratch);
            if (n == 0) {
                reverse_state<A, true>(p, s, w, n, count, scratch);
            } else {
                reverse_state<A, false>(p, s, w, n, count, scratch);
            }
        }
        step_gradient<A>(p, s, w, count, scratch);
        for (int64_t i = 0; i < sum_size; ++i) partials[i] += scratch.sums[i];

        const auto scatter = [&](const A* rows, int64_t pitch, int64_t size, const Image& out) {
            scatter_rows<T>(rows, pitch, scratch.block.tokens, count, size, out.token,
                            rows_of<T>(out, s.batch, s.group));
        };
        if (grads.du_sum.data != nullptr) {
            scatter_sums(scratch.du, s.pitch, scratch.block.tokens, count, s.channels, s.group > 0, grads.du_sum.token,
                         rows_of<A>(grads.du_sum, s.batch, 0));
        } else {
            scatter(scratch.du, s.pitch, s.channels, grads.du);
        }
        scatter(scratch.dB, p.states, p.states, grads.dB);
        scatter(scratch.dC, p.states, p.states, grads.dC);
        if (p.rank > 0) {
            scatter(scratch.dt, p.rank, p.rank, grads.ddt);
        } else {
            scatter(scratch.dstep, s.pitch, s.channels, grads.ddt);
        }
    }
}

}  // namespace

int64_t grouped_scan_bwd_scratch(const ScanParams& p) {
    Scratch arena(nullptr);
    if (p.dtype == DType::kDouble) {
        BackwardScratch<double>(arena, p);
    } else {
        BackwardScratch<float>(arena, p);
    }
    return arena.used();
}

void grouped_scan_bwd(const ScanParams& p, const ScanGradients& grads, int64_t batch, int64_t group, void* memory) {
    const Slice slice{batch, group, 0, p.dim, p.padded};
    switch (p.dtype) {
        case DType::kFloat: return scan_group<float>(p, grads, slice, memory);
        case DType::kDouble: return scan_group<double>(p, grads, slice, memory);
        case DType::kHalf: return scan_group<Half>(p, grads, slice, memory);
        case DType::kBFloat16: return scan_group<BFloat16>(p, grads, slice, memory);
    }
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
