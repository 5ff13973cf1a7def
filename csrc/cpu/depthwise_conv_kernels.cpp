// SPDX-License-Identifier: Apache-2.0
// 3x3 depthwise convolution, channels last: tiles of pixels by vectors of channels, each input loaded once a tile.
#include "cpu/depthwise_conv.h"
#include "cpu/math.h"
#include "cpu/scratch.h"

namespace gm::cpu::GM_CPU_CAPABILITY {
namespace {

// Output pixels of a tile: their sums and the nine weights fit the registers.
#if defined(GM_AVX512)
constexpr int kRows = 2, kCols = 4, kSumCols = 8;
#else
constexpr int kRows = 2, kCols = 2, kSumCols = 4;
#endif

// An image in memory or scratch; pixels outside of [0, height) x [0, width) are the row `outside`: zeros where they are
// read, scratch where they are written.
template <class T>
struct Pixels {
    T *data, *outside;
    int64_t height, width, row, col;  // sizes, then strides

    T* at(int64_t y, int64_t x) const {
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        return inside ? data + y * row + x * col : outside;
    }
};

// The pixels of a tile of kHeight x kWidth from (y, x).
template <class T, int kHeight, int kWidth>
struct Tile {
    T* at[kHeight][kWidth];

    Tile(const Pixels<T>& pixels, int64_t y, int64_t x) {
        for (int r = 0; r < kHeight; ++r) {
            for (int c = 0; c < kWidth; ++c) at[r][c] = pixels.at(y + r, x + c);
        }
    }
};

template <class T, class Source>
Pixels<T> image_pixels(const ConvParams& p, const Source& image, int64_t batch, int64_t group, int64_t channel,
                       T* outside) {
    T* data = static_cast<T*>(image.data) + batch * image.batch + group * image.group + channel;
    return {data, outside, p.height, p.width, p.width * image.token, image.token};
}

// For the tiles of rows [y0, y1): emit = start(y, x), then emit(i, lanes, sum) for the vectors i of `channels`, where
// sum = bias + the sum over the 3x3 neighbourhood of weight[k * pitch] * pixel. Tiles reach beyond the last row and
// column. kFlip turns the kernel by 180 degrees.
template <class A, bool kFlip, class T, class F>
GM_INLINE void convolve(const Pixels<const T>& in, int64_t y0, int64_t y1, const A* weight, int64_t pitch,
                        const A* bias, int64_t channels, const F& start) {
    for (int64_t y = y0; y < y1; y += kRows) {
        for (int64_t x = 0; x < in.width; x += kCols) {
            const Tile<const T, kRows + 2, kCols + 2> pixels(in, y - 1, x - 1);
            const auto emit = start(y, x);
            for_vectors<A>(
                channels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                    Vec<A> w[9], sum[kRows * kCols];
                    for (int k = 0; k < 9; ++k) w[k] = load(weight + (kFlip ? 8 - k : k) * pitch + i);
                    for (Vec<A>& v : sum) v = bias == nullptr ? Vec<A>{} : load(bias + i);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows + 2; ++r) {
#pragma GCC unroll 8
                        for (int c = 0; c < kCols + 2; ++c) {
                            const Vec<A> v = load(pixels.at[r][c] + i, lanes);
#pragma GCC unroll 9
                            for (int k = 0; k < 9; ++k) {
                                const int to_row = r - k / 3, to_col = c - k % 3;
                                if (to_row >= 0 && to_row < kRows && to_col >= 0 && to_col < kCols) {
                                    sum[to_row * kCols + to_col] += v * w[k];
                                }
                            }
                        }
                    }
                    emit(i, lanes, sum);
                });
        }
    }
}

// What to emit: store the sums after `f(sum)`.
template <class T, class F>
GM_INLINE auto store_tiles(const Pixels<T>& out, const F& f) {
    return [&out, f](int64_t y, int64_t x) {
        const Tile<T, kRows, kCols> to(out, y, x);
        return [ to, f ](int64_t i, auto lanes, auto& sum) __attribute__((always_inline)) {
            f(sum);
#pragma GCC unroll 8
            for (int k = 0; k < kRows * kCols; ++k) store(to.at[k / kCols][k % kCols] + i, sum[k], lanes);
        };
    };
}

template <Activation kActivation, int kCount, class V>
GM_INLINE void activate(V (&v)[kCount]) {
    if constexpr (kActivation == Activation::kSilu) silu(v);
    if constexpr (kActivation == Activation::kGelu) gelu(v);
}

template <Activation kActivation, class V>
GM_INLINE V activation_slope(V v) {
    if constexpr (kActivation == Activation::kSilu) {
        const V open = sigmoid(v);
        return open * (Lane<V>(1) + v * (Lane<V>(1) - open));
    } else {
        V distribution, density;
        normal(v, distribution, density);
        return distribution + v * density;
    }
}

template <class T, Activation kActivation>
void forward_rows(const ConvParams& p, const Image& y, int64_t batch, int64_t group, int64_t first_row, int64_t end_row,
                  void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    T *zeros = arena.take<T>(p.padded), *unused = arena.take<T>(p.padded);
    std::memset(zeros, 0, static_cast<size_t>(p.padded) * sizeof(T));
    const A* weight = static_cast<const A*>(p.weight) + group * 9 * p.padded;
    const A* bias = static_cast<const A*>(p.bias) + group * p.padded;
    Pixels<T> out = image_pixels<T>(p, y, batch, group, 0, unused);
    out.height = end_row;
    convolve<A, false>(image_pixels<const T>(p, p.x, batch, group, 0, zeros), first_row, end_row, weight, p.padded,
                       bias, p.dim,
                       store_tiles(out, [](auto& sum) __attribute__((always_inline)) { activate<kActivation>(sum); }));
}

template <class A>
struct BackwardScratch {
    void *zeros, *unused;
    A* g;     // (tile_rows + 2, width, channels): gradient before the activation, with a row above and below
    A* sums;  // (10, channels) of one row of pixels

    BackwardScratch(Scratch& scratch, const ConvParams& p, const ConvGradients& grads) {
        zeros = scratch.take<double>(grads.tile_channels);
        unused = scratch.take<double>(grads.tile_channels);
        g = scratch.take<A>((grads.tile_rows + 2) * p.width * grads.tile_channels);
        sums = scratch.take<A>(10 * grads.tile_channels);
    }
};

// sums[k] = sum over the pixels of row y of g * x shifted by tap k; sums[9] = sum of g.
template <class A, class T>
void row_sums(const Pixels<const T>& x, const Pixels<const A>& g, int64_t y, int64_t g_row, int64_t channels,
              int64_t pitch, A* sums) {
    for (int64_t i = 0; i < 10 * pitch; ++i) sums[i] = 0;
    for (int64_t col = 0; col < x.width; col += kSumCols) {
        const Tile<const T, 3, kSumCols + 2> pixels(x, y - 1, col - 1);
        const Tile<const A, 1, kSumCols> gradients(g, g_row, col);
        for_vectors<A>(
            channels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                Vec<A> sum[9], gradient[kSumCols], total = load(sums + 9 * pitch + i);
#pragma GCC unroll 8
                for (int c = 0; c < kSumCols; ++c) {
                    gradient[c] = load(gradients.at[0][c] + i);
                    total += gradient[c];
                }
                store(sums + 9 * pitch + i, total);
                for (int k = 0; k < 9; ++k) sum[k] = load(sums + k * pitch + i);
#pragma GCC unroll 3
                for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 10
                    for (int c = 0; c < kSumCols + 2; ++c) {
                        const Vec<A> v = load(pixels.at[r][c] + i, lanes);
#pragma GCC unroll 3
                        for (int k = 0; k < 3; ++k) {
                            if (c - k >= 0 && c - k < kSumCols) sum[r * 3 + k] += v * gradient[c - k];
                        }
                    }
                }
                for (int k = 0; k < 9; ++k) store(sums + k * pitch + i, sum[k]);
            });
    }
}

template <class T, Activation kActivation>
void backward_tile(const ConvParams& p, const ConvGradients& grads, int64_t batch, int64_t group, int64_t row_tile,
                   int64_t channel_tile, void* memory) {
    using A = Accumulate<T>;
    Scratch arena(memory);
    const BackwardScratch<A> scratch(arena, p, grads);
    const int64_t channel = channel_tile * grads.tile_channels, pitch = grads.tile_channels;
    const int64_t channels = p.dim - channel < pitch ? p.dim - channel : pitch;
    const int64_t y0 = row_tile * grads.tile_rows;
    const int64_t y1 = y0 + grads.tile_rows < p.height ? y0 + grads.tile_rows : p.height;
    const int64_t g0 = y0 > 0 ? y0 - 1 : 0, g1 = y1 < p.height ? y1 + 1 : p.height;
    std::memset(scratch.zeros, 0, static_cast<size_t>(pitch) * sizeof(double));

    const T* zeros = static_cast<const T*>(scratch.zeros);
    const Pixels<const T> x = image_pixels<const T>(p, p.x, batch, group, channel, zeros);
    const Pixels<const T> dy = image_pixels<const T>(p, grads.dy, batch, group, channel, zeros);
    Pixels<T> dx = image_pixels<T>(p, grads.dx, batch, group, channel, static_cast<T*>(scratch.unused));
    const A* weight = static_cast<const A*>(p.weight) + group * 9 * p.padded + channel;
    const A* bias = static_cast<const A*>(p.bias) + group * p.padded + channel;

    // Rows [g0, g1) of the gradient before the activation, as an image of their own.
    Pixels<A> g{scratch.g, static_cast<A*>(scratch.unused), g1 - g0, p.width, p.width * pitch, pitch};
    if constexpr (kActivation == Activation::kNone) {
        for (int64_t row = g0; row < g1; ++row) {
            for (int64_t col = 0; col < p.width; ++col) {
                for_vectors<A>(channels, [&](int64_t i, auto lanes) {
                    store(g.at(row - g0, col) + i, load(dy.at(row, col) + i, lanes));
                });
            }
        }
    } else {
        const auto times_slope = [&](int64_t row, int64_t col) {
            const Tile<const T, kRows, kCols> from(dy, row, col);
            const Tile<A, kRows, kCols> to(g, row - g0, col);
            return [ from, to ](int64_t i, auto lanes, Vec<A>(&sum)[kRows * kCols]) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int k = 0; k < kRows * kCols; ++k) {
                    store(to.at[k / kCols][k % kCols] + i,
                          load(from.at[k / kCols][k % kCols] + i, lanes) * activation_slope<kActivation>(sum[k]));
                }
            };
        };
        convolve<A, false>(x, g0, g1, weight, p.padded, bias, channels, times_slope);
    }

    g.outside = static_cast<A*>(scratch.zeros);
    const Pixels<const A> g_in{g.data, g.outside, g.height, g.width, g.row, g.col};
    dx.height = y1;
    const Pixels<T> dx_rows{dx.at(g0, 0), dx.outside, y1 - g0, dx.width, dx.row, dx.col};
    convolve<A, true>(g_in, y0 - g0, y1 - g0, weight, p.padded, static_cast<const A*>(nullptr), channels,
                      store_tiles(dx_rows, [](auto&) {}));

    double* partials =
        grads.partials + ((batch * grads.row_tiles + row_tile) * p.groups + group) * 10 * p.padded + channel;
    const int64_t written = p.padded - channel < pitch ? p.padded - channel : pitch;
    for (int64_t row = y0; row < y1; ++row) {
        row_sums<A>(x, g_in, row, row - g0, channels, pitch, scratch.sums);
        for (int64_t k = 0; k < 10; ++k) {
            double* to = partials + k * p.padded;
            const A* from = scratch.sums + k * pitch;
            for (int64_t i = 0; i < written; ++i) to[i] = (row == y0 ? 0.0 : to[i]) + from[i];
        }
    }
}

// f(T{}, integral_constant<Activation>) for the params' element type and activation.
template <class F>
void dispatch(const ConvParams& p, const F& f) {
    const auto with_type = [&](auto element) {
        switch (p.activation) {
            case Activation::kNone: return f(element, std::integral_constant<Activation, Activation::kNone>{});
            case Activation::kSilu: return f(element, std::integral_constant<Activation, Activation::kSilu>{});
            case Activation::kGelu: return f(element, std::integral_constant<Activation, Activation::kGelu>{});
        }
    };
    switch (p.dtype) {
        case DType::kFloat: return with_type(float{});
        case DType::kDouble: return with_type(double{});
        case DType::kHalf: return with_type(Half{});
        case DType::kBFloat16: return with_type(BFloat16{});
    }
}

}  // namespace

int64_t depthwise_conv_fwd_scratch(const ConvParams& p) {
    Scratch arena(nullptr);
    arena.take<double>(2 * p.padded);
    return arena.used();
}

void depthwise_conv_fwd(const ConvParams& p, const Image& y, int64_t batch, int64_t group, int64_t first_row,
                        int64_t end_row, void* scratch) {
    dispatch(p, [&](auto element, auto activation) {
        forward_rows<decltype(element), decltype(activation)::value>(p, y, batch, group, first_row, end_row, scratch);
    });
}

int64_t depthwise_conv_bwd_scratch(const ConvParams& p, const ConvGradients& grads) {
    Scratch arena(nullptr);
    if (p.dtype == DType::kDouble) {
        BackwardScratch<double>(arena, p, grads);
    } else {
        BackwardScratch<float>(arena, p, grads);
    }
    return arena.used();
}

void depthwise_conv_bwd(const ConvParams& p, const ConvGradients& grads, int64_t batch, int64_t group, int64_t row_tile,
                        int64_t channel_tile, void* scratch) {
    dispatch(p, [&](auto element, auto activation) {
        backward_tile<decltype(element), decltype(activation)::value>(p, grads, batch, group, row_tile, channel_tile,
                                                                      scratch);
    });
}

}  // namespace gm::cpu::GM_CPU_CAPABILITY
