// Inference: an involution layer with the BatchNorm and the ReLU behind it in one call, its weights packed beforehand.
//   hidden = max(0, reduce x pool(x) + bias)      kernels = span x hidden + bias      out = max(0, scale * sum + shift)
#pragma once
#include "fused.h"

template <class A>
struct Generator {
    const Problem& p;
    const A* x;
    Panels<A> reduce;
    int64_t step;  // R in whole registers

    // Output pixels [first, last), counted over all images, to hidden [last - first][step].
    void make_hidden(int64_t first, int64_t last, A* hidden) const {
        const int64_t area = p.out_height * p.out_width;
        const bool in_place = p.stride == 1 && p.x_row == p.width * p.x_pixel;
        for (int64_t n; first < last; first += n, hidden += n * step) {
            const int64_t image = first / area, pixel = first % area;
            n = std::min({4 * int64_t(kBlockRows), last - first, area - pixel});
            const A* from = x + image * p.x_batch;
            if (in_place)
                reduce.multiply(n, from + pixel * p.x_pixel, p.x_pixel, 0, step, hidden, step);
            else
                reduce.multiply(n, pool(from, pixel, n), p.channels, 0, step, hidden, step);
            for (int64_t i = 0; i < n * step; ++i) hidden[i] = hidden[i] < A(0) ? A(0) : hidden[i];
        }
    }

    // The stride x stride cells of n output pixels, [n][C]; cells at the border average the pixels they have.
    const A* pool(const A* image, int64_t pixel, int64_t n) const {
        A* pooled = scratch<A>(3, n * p.channels);
        for (A* to = pooled; n > 0; ++pixel, --n, to += p.channels) {
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
template <class A>
void folded_forward(const Problem& p, const A* x, const A* packed, A* out) {
    const Division division(p, true);
    const A* const reduce = packed;
    const A* const reduce_bias = reduce + p.channels * whole_panels(p.hidden);
    const A* const span = reduce_bias + whole_panels(p.hidden);
    const A* const span_bias = span + p.hidden * whole_panels(p.groups * p.taps());
    const A* const scale = span_bias + whole_panels(p.groups * p.taps());
    const Generator<A> generator{p, x, {reduce, reduce_bias, p.channels}, whole_registers<A>(p.hidden)};
    const int64_t pixels = p.batch * p.out_height * p.out_width, step = generator.step;
    const bool together = division.chunks > 1;  // threads with some of the groups each need all of hidden
    A* hidden = together ? scratch<A>(5, pixels * step) : nullptr;
    if (together)
        on_threads(p.threads, [&](int thread, int count) {
            const int64_t first = pixels * thread / count;
            generator.make_hidden(first, pixels * (thread + 1) / count, hidden + first * step);
        });
    const auto hidden_of = [&](const Unit& unit, const Tile<A>& tile) -> const A* {
        const int64_t first = first_pixel(p, unit, tile);
        if (together) return hidden + first * step;
        A* own = scratch<A>(5, tile.pixels() * step);
        generator.make_hidden(first, first + tile.pixels(), own);
        return own;
    };
    const Span<A> spans{p, {span, span_bias, p.hidden}};
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int count) {
        each_of(division.units(p), thread, count, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            span_forward<A>(spans, unit, x, [&](const Tile<A>& tile) { return hidden_of(unit, tile); }, step,
                            {scale, scale + p.channels}, out);
        });
    });
}
