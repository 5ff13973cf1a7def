// SPDX-License-Identifier: Apache-2.0
// LayerNorm with pooling, and LayerNorm of a gated product, one row of channels at a time. The row is widened into
// scratch once; with unit = (row - mean) rstd and g the gradient of unit, that of the row is
//   (g - mean(g) - unit mean(g unit)) rstd.
// Sums over tokens are float within a block and double across blocks.
#include <initializer_list>

#include "cpu/norm.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace gm::cpu::GM_CPU_CAPABILITY {
namespace {

template <class A>
struct NormScratch {
    A *row, *g;  // a vector longer than padded: groups are written one after another
    A *weight_sum, *bias_sum, *gate_sum;

    NormScratch(Scratch& scratch, int64_t padded) {
        for (A** p : {&row, &g, &weight_sum, &bias_sum, &gate_sum}) *p = scratch.take<A>(padded + kLanes<A>);
    }
    void clear_sums(int64_t padded) const {
        for (A* p : {weight_sum, bias_sum, gate_sum}) {
            for (int64_t i = 0; i < padded; ++i) p[i] = 0;
        }
    }
};

struct Tokens {
    int64_t first, end;
};

GM_INLINE Tokens tokens_of(int64_t block, int64_t tokens_per_block, int64_t tokens) {
    const int64_t first = block * tokens_per_block;
    return {first, first + tokens_per_block < tokens ? first + tokens_per_block : tokens};
}

template <class A>
void store_partial(const A* sums, int64_t padded, double* partial) {
    for (int64_t i = 0; i < padded; ++i) partial[i] = sums[i];
}

// row = from, zero to a whole vector.
template <class T, class A>
GM_INLINE void widen_row(const T* from, int64_t size, A* row) {
    for_vectors<A>(size, [&](int64_t i, auto lanes) { store(row + i, load(from + i, lanes)); });
}

// Sums weight and bias gradients of one row and turns scratch.g, the gradient of the normalised row, into that of the
// row, unit by unit of scratch.row. Both rows are zero from `size` to a whole vector.
template <class A>
GM_INLINE void norm_gradient(const NormScratch<A>& scratch, const A* weight, int64_t size, A shift, A rstd) {
    Vec<A> total{}, moment{};
    for (int64_t i = 0; i < size; i += kLanes<A>) {
        const Vec<A> unit = (load(scratch.row + i) - shift) * rstd, dy = load(scratch.g + i);
        const Vec<A> g = dy * load(weight + i);
        add_to(scratch.weight_sum + i, dy * unit);
        add_to(scratch.bias_sum + i, dy);
        total += g;
        moment += g * unit;
        store(scratch.g + i, g);
    }
    const A mean_g = sum(total) / A(size), mean_moment = sum(moment) / A(size);
    for (int64_t i = 0; i < size; i += kLanes<A>) {
        const Vec<A> unit = (load(scratch.row + i) - shift) * rstd;
        store(scratch.g + i, (load(scratch.g + i) - mean_g - unit * mean_moment) * rstd);
    }
}

template <class T>
void pool_forward(const NormPoolParams& p, const NormPoolOutputs& out, int64_t batch, int64_t block, void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const NormScratch<A> scratch(arena, p.padded);
    scratch.clear_sums(p.padded);
    const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias);
    const T* x = rows_of<T>(p.x, batch, 0);
    T* xn = rows_of<T>(out.xn, batch, 0);
    const Tokens tokens = tokens_of(block, p.block, p.tokens);
    for (int64_t t = tokens.first; t < tokens.end; ++t) {
        widen_row(x + t * p.x.token, p.dim, scratch.row);
        A shift, rstd;
        center_row(scratch.row, p.dim, static_cast<A>(p.eps), shift, rstd);
        for_vectors<A>(p.dim, [&](int64_t i, auto lanes) {
            const Vec<A> v = (load(scratch.row + i) - shift) * rstd * load(weight + i) + load(bias + i);
            store(xn + t * out.xn.token + i, v, lanes);
            add_to(scratch.bias_sum + i, v);
        });
    }
    store_partial(scratch.bias_sum, p.padded, out.partials + (batch * p.blocks + block) * p.padded);
}

template <class T>
void pool_backward(const NormPoolParams& p, const NormPoolGradients& grads, int64_t batch, int64_t block,
                   void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const NormScratch<A> scratch(arena, p.padded);
    scratch.clear_sums(p.padded);
    const A* weight = static_cast<const A*>(p.weight);
    const A* dpooled = static_cast<const A*>(grads.dpooled) + batch * p.padded;
    const A share = A(1) / A(p.tokens);
    const T *x = rows_of<T>(p.x, batch, 0), *dxn = rows_of<T>(grads.dxn, batch, 0);
    T* dx = rows_of<T>(grads.dx, batch, 0);
    const Tokens tokens = tokens_of(block, p.block, p.tokens);
    for (int64_t t = tokens.first; t < tokens.end; ++t) {
        widen_row(x + t * p.x.token, p.dim, scratch.row);
        A shift, rstd;
        center_row(scratch.row, p.dim, static_cast<A>(p.eps), shift, rstd);
        for_vectors<A>(p.dim, [&](int64_t i, auto lanes) {
            store(scratch.g + i, load(dxn + t * grads.dxn.token + i, lanes) + load(dpooled + i) * share);
        });
        norm_gradient(scratch, weight, p.dim, shift, rstd);
        for_vectors<A>(p.dim,
                       [&](int64_t i, auto lanes) { store(dx + t * grads.dx.token + i, load(scratch.g + i), lanes); });
    }
    double* partials = grads.partials + (batch * p.blocks + block) * 2 * p.padded;
    store_partial(scratch.weight_sum, p.padded, partials);
    store_partial(scratch.bias_sum, p.padded, partials + p.padded);
}

// f(channel of the image, channel of the group, group, lanes) for all channels, group by group.
template <class A, class F>
GM_INLINE void for_group_vectors(const ModulatedNormParams& p, const F& f) {
    for (int64_t g = 0; g < p.groups; ++g) {
        for_vectors<A>(p.dim, [&](int64_t i, auto lanes) { f(g * p.dim + i, i, g, lanes); });
    }
}

// scratch.row = o * scale * x * gate of token t.
template <class T>
GM_INLINE void product_row(const ModulatedNormParams& p, const T* o, const T* x, const Accumulate<T>* gate,
                           Accumulate<T>* row) {
    using A = Accumulate<T>;
    const A scale = static_cast<A>(p.scale);
    for_group_vectors<A>(p, [&](int64_t c, int64_t i, int64_t g, auto lanes) {
        store(row + c, load(o + g * p.o.group + i, lanes) * scale * load(x + c, lanes) * load(gate + c, lanes));
    });
    store(row + p.groups * p.dim, Vec<A>{});
}

template <class T>
void modulated_forward(const ModulatedNormParams& p, const Image& y, int64_t batch, int64_t block, void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const NormScratch<A> scratch(arena, p.padded);
    const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias);
    const A* gate = static_cast<const A*>(p.gate) + batch * p.padded;
    const T *o = rows_of<T>(p.o, batch, 0), *x = rows_of<T>(p.x, batch, 0);
    T* to = rows_of<T>(y, batch, 0);
    const int64_t size = p.groups * p.dim;
    const Tokens tokens = tokens_of(block, p.block, p.tokens);
    for (int64_t t = tokens.first; t < tokens.end; ++t) {
        product_row(p, o + t * p.o.token, x + t * p.x.token, gate, scratch.row);
        A shift, rstd;
        center_row(scratch.row, size, static_cast<A>(p.eps), shift, rstd);
        for_vectors<A>(size, [&](int64_t i, auto lanes) {
            const Vec<A> v = (load(scratch.row + i) - shift) * rstd * load(weight + i) + load(bias + i);
            store(to + t * y.token + i, v, lanes);
        });
    }
}

template <class T>
void modulated_backward(const ModulatedNormParams& p, const ModulatedNormGradients& grads, int64_t batch, int64_t block,
                        void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const NormScratch<A> scratch(arena, p.padded);
    scratch.clear_sums(p.padded + kLanes<A>);
    const A* weight = static_cast<const A*>(p.weight);
    const A* gate = static_cast<const A*>(p.gate) + batch * p.padded;
    const A scale = static_cast<A>(p.scale);
    const T *dy = rows_of<T>(grads.dy, batch, 0), *x_rows = rows_of<T>(p.x, batch, 0);
    const T* o_rows = rows_of<T>(p.o, batch, 0);
    T *do_rows = rows_of<T>(grads.d_o, batch, 0), *dx_rows = rows_of<T>(grads.dx, batch, 0);
    const int64_t size = p.groups * p.dim;
    const Tokens tokens = tokens_of(block, p.block, p.tokens);
    double scale_sum = 0;
    for (int64_t t = tokens.first; t < tokens.end; ++t) {
        const T *o_row = o_rows + t * p.o.token, *x_row = x_rows + t * p.x.token;
        product_row(p, o_row, x_row, gate, scratch.row);
        A shift, rstd;
        center_row(scratch.row, size, static_cast<A>(p.eps), shift, rstd);
        widen_row(dy + t * grads.dy.token, size, scratch.g);
        norm_gradient(scratch, weight, size, shift, rstd);
        Vec<A> of_scale{};
        for_group_vectors<A>(p, [&](int64_t c, int64_t i, int64_t g, auto lanes) {
            const Vec<A> o = load(o_row + g * p.o.group + i, lanes), x = load(x_row + c, lanes);
            const Vec<A> open = load(gate + c, lanes), dp = load(scratch.g + c, lanes);
            store(do_rows + t * grads.d_o.token + g * grads.d_o.group + i, dp * scale * x * open, lanes);
            store(dx_rows + t * grads.dx.token + c, dp * scale * o * open, lanes);
            add_to(scratch.gate_sum + c, dp * scale * o * x);
            of_scale += dp * o * x * open;
        });
        scale_sum += sum(of_scale);
    }
    double* partials = grads.partials + (batch * p.blocks + block) * 4 * p.padded;
    store_partial(scratch.weight_sum, p.padded, partials);
    store_partial(scratch.bias_sum, p.padded, partials + p.padded);
    store_partial(scratch.gate_sum, p.padded, partials + 2 * p.padded);
    for (int64_t i = 0; i < p.padded; ++i) partials[3 * p.padded + i] = i == 0 ? scale_sum : 0;
}

}  // namespace

int64_t norm_scratch(DType dtype, int64_t padded) {
    Scratch arena(nullptr);
    if (dtype == DType::kDouble) {
        NormScratch<double>(arena, padded);
    } else {
        NormScratch<float>(arena, padded);
    }
    return arena.used();
}

#define GM_DISPATCH(kernel, ...)                                        \
    switch (p.dtype) {                                                  \
        case DType::kFloat: return kernel<float>(p, __VA_ARGS__);       \
        case DType::kDouble: return kernel<double>(p, __VA_ARGS__);     \
        case DType::kHalf: return kernel<Half>(p, __VA_ARGS__);         \
        case DType::kBFloat16: return kernel<BFloat16>(p, __VA_ARGS__); \
    }

void layer_norm_pool_fwd(const NormPoolParams& p, const NormPoolOutputs& out, int64_t batch, int64_t block,
                         void* scratch) {
    GM_DISPATCH(pool_forward, out, batch, block, scratch)
}

void layer_norm_pool_bwd(const NormPoolParams& p, const NormPoolGradients& grads, int64_t batch, int64_t block,
                         void* scratch) {
    GM_DISPATCH(pool_backward, grads, batch, block, scratch)
}

void modulated_layer_norm_fwd(const ModulatedNormParams& p, const Image& y, int64_t batch, int64_t block,
                              void* scratch) {
    GM_DISPATCH(modulated_forward, y, batch, block, scratch)
}

void modulated_layer_norm_bwd(const ModulatedNormParams& p, const ModulatedNormGradients& grads, int64_t batch,
                              int64_t block, void* scratch) {
    GM_DISPATCH(modulated_backward, grads, batch, block, scratch)
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
