// Inference: an involution layer with the BatchNorm and the ReLU behind it in one call, its weights packed beforehand.
//   hidden = max(0, reduce x pool(x) + bias)      kernels = span x hidden + bias      out = max(0, scale * sum + shift)
#pragma once
#include "fused.h"

template <class A, class T, class F = Factor<T>>
struct Generator {
    const Problem& p;
    const T* x;
    Panels<A, F> reduce;
    int64_t step;  // R in whole registers

    // Output pixels [first, last), counted over all images, to hidden [last - first][step].
    void make_hidden(int64_t first, int64_t last, F* hidden) const {
        const int64_t area = p.out_height * p.out_width;
        const bool in_place = p.stride == 1 && p.x_row == p.width * p.x_pixel;
        for (int64_t n; first < last; first += n, hidden += n * step) {
            const int64_t image = first / area, pixel = first % area;
            n = std::min({4 * int64_t(kBlockRows), last - first, area - pixel});
            const T* from = x + image * p.x_batch;
            const bool whole = in_place && (std::is_same_v<T, F> || p.x_pixel == p.channels);
            const F* rows = whole ? as<F>(from + pixel * p.x_pixel, n * p.channels, 3) : pool(from, pixel, n);
            reduce.multiply(n, rows, whole ? p.x_pixel : p.channels, 0, step, hidden, step, StorePositive{});
        }
    }

    // The stride x stride cells of n output pixels, [n][C]; cells at the border average the pixels they have.
    const F* pool(const T* image, int64_t pixel, int64_t n) const {
        F* pooled = scratch<F>(3, n * p.channels);
        for (F* to = pooled; n > 0; ++pixel, --n, to += p.channels) {
            const int64_t top = pixel / p.out_width * p.stride, bottom = std::min(top + p.stride, p.height);
            const int64_t left = pixel % p.out_width * p.stride, right = std::min(left + p.stride, p.width);
            const A share = A(1) / A((bottom - top) * (right - left));
            each_register<A>(0, p.channels, [&](auto lanes, int64_t c) INLINED {
                typedef Vec<A, decltype(lanes)::value> V;
                V sum = V{};
                for (int64_t y = top; y < bottom; ++y)
                    for (int64_t z = left; z < right; ++z) sum += load<V>(image + y * p.x_row + z * p.x_pixel + c);
                store(to + c, V(sum * share));
            });
        }
        return pooled;
    }
};

// packed: reduce, its bias, span, its bias, scale and shift one behind the other, the first four in whole panels
template <class A, class T, class F = Factor<T>>
void folded_forward(const Problem& p, const T* x, const F* packed, T* out) {
    const Division division(p, true);
    const int64_t columns = whole_panels(p.groups * p.taps());
    const F* const reduce = packed;
    const F* const reduce_bias = reduce + p.channels * whole_panels(p.hidden);
    const F* const span = reduce_bias + whole_panels(p.hidden);
    const F* const span_bias = span + p.hidden * columns;
    const A* const added = as<A>(reduce_bias, whole_panels(p.hidden), 6);
    const A* const addends = as<A>(span_bias, columns + 2 * p.channels, 7);
    const A* const scale = addends + columns;
    const Generator<A, T> generator{p, x, {reduce, added, p.channels}, whole_registers<A>(p.hidden)};
    const int64_t pixels = p.batch * p.out_height * p.out_width, step = generator.step;
    const bool together = division.chunks > 1;  // threads with some of the groups each need all of hidden
    F* hidden = together ? scratch<F>(5, pixels * step) : nullptr;
    if (together)
        on_threads(p.threads, [&](int thread, int count) {
            const int64_t first = pixels * thread / count;
            generator.make_hidden(first, pixels * (thread + 1) / count, hidden + first * step);
        });
    const auto hidden_of = [&](const Unit& unit, const Tile<A>& tile) -> const F* {
        const int64_t first = first_pixel(p, unit, tile);
        if (together) return hidden + first * step;
        F* own = scratch<F>(5, tile.pixels() * step);
        generator.make_hidden(first, first + tile.pixels(), own);
        return own;
    };
    const Span<A, F> spans{p, {span, addends, p.hidden}};
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int count) {
        each_of(division.units(p), thread, count, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const auto hidden_of_tile = [&](const Tile<A>& tile) { return hidden_of(unit, tile); };
            span_forward<A>(spans, unit, x, hidden_of_tile, step, Finish<A>{scale, scale + p.channels}, out);
        });
    });
}
