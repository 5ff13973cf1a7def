// SPDX-License-Identifier: Apache-2.0
// Forward of the grouped scan: blocks of tokens in scratch that stays in the first cache level, image memory touched
// once. Per block: inputs and steps, the recurrence state by state, then norm, gates and the store.
#include "cpu/grouped_scan.h"
#include "cpu/grouped_scan_block.h"

namespace gm::cpu::GM_CPU_CAPABILITY {
namespace {

template <class A>
int64_t block_tokens(int64_t pitch) {
    constexpr int64_t kBlockBytes = 24 * 1024;  // u, step and y of a block; half of a usual first-level cache
    const int64_t tokens = kBlockBytes / (3 * pitch * static_cast<int64_t>(sizeof(A)));
    return tokens < 8 ? 8 : tokens > 128 ? 128 : tokens / 4 * 4;
}

template <class A>
struct ForwardScratch {
    Block<A> block;
    A *y, *h;  // (tokens, pitch), (states, pitch)

    ForwardScratch(Scratch& scratch, const ScanParams& p, int64_t pitch)
        : block(scratch, p, block_tokens<A>(pitch), pitch) {
        y = scratch.take<A>(block_tokens<A>(pitch) * pitch);
        h = scratch.take<A>(p.states * pitch);
    }
};

// y (+)= C h, h = exp(step A) h + step u B for state n over the block; the first state also writes D u.
template <class A, bool kFirst>
void advance_state(const ScanParams& p, const Slice& s, const SliceParameters<A>& w, int64_t n, int64_t count,
                   const ForwardScratch<A>& scratch) {
    const Block<A>& block = scratch.block;
    for (int64_t i = 0; i < s.pitch; i += kLanes<A>) {
        const Vec<A> decay = load(w.decay + n * p.padded + i), skip = load(w.skip + i);
        Vec<A> h = load(scratch.h + n * s.pitch + i);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t at = t * s.pitch + i;
            const Vec<A> step = load(block.step + at), u = load(block.u + at);
            h = exp(step * decay) * h + step * u * block.B[t * p.states + n];
            const Vec<A> y = kFirst ? skip * u : load(scratch.y + at);
            store(scratch.y + at, y + h * block.C[t * p.states + n]);
        }
        store(scratch.h + n * s.pitch + i, h);
    }
}

template <class T>
void store_outputs(const ScanParams& p, const ScanOutputs& out, const Slice& s, const SliceParameters<Accumulate<T>>& w,
                   int64_t count, const ForwardScratch<Accumulate<T>>& scratch) {
    using A = Accumulate<T>;
    const A eps = static_cast<A>(p.norm_eps);
    if (out.sum.data != nullptr) {
        A* sum = rows_of<A>(out.sum, s.batch, 0) + s.first_channel;
        scatter_sums(scratch.y, s.pitch, scratch.block.tokens, count, s.channels, s.group > 0, out.sum.token, sum);
        return;
    }
    T* y_rows = rows_of<T>(out.y, s.batch, s.group) + s.first_channel;
    const T* z_rows = p.z.data == nullptr ? nullptr : rows_of<T>(p.z, s.batch, s.group) + s.first_channel;
    for (int64_t t = 0; t < count; ++t) {
        A* y = scratch.y + t * s.pitch;
        const int64_t token = scratch.block.tokens[t];
        T* to = y_rows + token * out.y.token;
        A shift = 0, rstd = 1;
        if (w.norm_weight != nullptr) center_row(y, s.channels, eps, shift, rstd);
        for_vectors<A>(s.channels, [&](int64_t i, auto lanes) {
            Vec<A> v = load(y + i);
            if (w.norm_weight != nullptr) v = (v - shift) * rstd * load(w.norm_weight + i) + load(w.norm_bias + i);
            if (z_rows != nullptr) v *= silu(load(z_rows + token * p.z.token + i, lanes));
            store(to + i, v * load(w.gate + i), lanes);
        });
    }
}

template <class A>
void save_states(const ScanParams& p, const ScanOutputs& out, const Slice& s, int64_t chunk,
                 const ForwardScratch<A>& scratch) {
    const int64_t image = (s.batch * p.groups + s.group) * p.chunks + chunk;
    A* states = static_cast<A*>(out.states) + image * p.states * p.dim + s.first_channel;
    for (int64_t n = 0; n < p.states; ++n) {
        for_vectors<A>(s.channels, [&](int64_t i, auto lanes) {
            store(states + n * p.dim + i, load(scratch.h + n * s.pitch + i), lanes);
        });
    }
}

template <class T>
void scan_slice(const ScanParams& p, const ScanOutputs& out, const Slice& s, void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const ForwardScratch<A> scratch(arena, p, s.pitch);
    const SliceParameters<A> w(p, s);
    for (int64_t i = 0; i < p.states * s.pitch; ++i) scratch.h[i] = 0;

    const int64_t length = p.height * p.width, capacity = block_tokens<A>(s.pitch);
    int64_t first = 0;
    while (first < length) {
        int64_t end = first + capacity < length ? first + capacity : length;
        if (out.states != nullptr) {
            const int64_t boundary = (first / p.chunk + 1) * p.chunk;
            if (first % p.chunk == 0) save_states(p, out, s, first / p.chunk, scratch);
            if (boundary < end) end = boundary;
        }
        const int64_t count = end - first;
        load_block<T, false>(p, s, w, first, count, scratch.block, nullptr);
        advance_state<A, true>(p, s, w, 0, count, scratch);
        for (int64_t n = 1; n < p.states; ++n) advance_state<A, false>(p, s, w, n, count, scratch);
        store_outputs<T>(p, out, s, w, count, scratch);
        first = end;
    }
}

}  // namespace

int64_t grouped_scan_fwd_scratch(const ScanParams& p, int64_t channels) {
    Scratch arena(nullptr);
    const int64_t pitch = round_up(channels, kRowUnit);
    if (p.dtype == DType::kDouble) {
        ForwardScratch<double>(arena, p, pitch);
    } else {
        ForwardScratch<float>(arena, p, pitch);
    }
    return arena.used();
}

void grouped_scan_fwd(const ScanParams& p, const ScanOutputs& out, int64_t batch, int64_t group, int64_t first_channel,
                      int64_t channels, void* memory) {
    const Slice slice{batch, group, first_channel, channels, round_up(channels, kRowUnit)};
    switch (p.dtype) {
        case DType::kFloat: return scan_slice<float>(p, out, slice, memory);
        case DType::kDouble: return scan_slice<double>(p, out, slice, memory);
        case DType::kHalf: return scan_slice<Half>(p, out, slice, memory);
        case DType::kBFloat16: return scan_slice<BFloat16>(p, out, slice, memory);
    }
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
