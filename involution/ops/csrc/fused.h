// The fused operator: kernels are the product weight x reduced + bias, made a tile at a time in the second-level cache,
// used at once and dropped. The backward makes them again, turns them into their gradients in place, and multiplies
// those with the weight and the reduced tensor before the next tile.
#pragma once
#include "gemm.h"
#include "planes.h"
#include "tiles.h"

template <class A>
int64_t whole_registers(int64_t n) {
    return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A matrix [columns][depth] transposed in panels of 32 columns, [panel][depth][32], the last filled up with anything.
template <class A, class F>
struct Panels {
    const F* values;
    const A* bias;  // as long as the panels, or nullptr
    int64_t depth;

    // C [rows][last - first] = a [rows][depth] x columns first...last + bias, whole registers
    template <class C, class Done = Store>
    void multiply(int64_t rows, const F* a, int64_t a_row, int64_t first, int64_t last, C* c, int64_t c_row,
                  Done done = {}) const {
        gemm<A>(rows, last - first, depth, a, a_row, 1,
                [&](int64_t j) { return values + (first + j) / kPanel * kPanel * depth + (first + j) % kPanel; }, kPanel,
                c, c_row, bias ? bias + first : nullptr, false, done);
    }
};

// The first pixel of a tile, counted over all images; its other pixels follow.
template <class A>
int64_t first_pixel(const Problem& p, const Unit& unit, const Tile<A>& tile) {
    return (unit.image * p.out_height + tile.row) * p.out_width + tile.column;
}

template <class A, class F>
struct Span {
    const Problem& p;
    Panels<A, F> weight;  // G*K*K columns

    // The columns of a unit, from the panel where its groups begin.
    int64_t first_column(const Unit& unit) const { return unit.group * p.taps() / kPanel * kPanel; }
    int64_t columns(const Unit& unit) const {
        return whole_registers<A>(unit.last_group * p.taps() - first_column(unit));
    }

    // From the hidden tensor of the tile's pixels, [pixels][step].
    Tile<A> kernels(const Unit& unit, Tile<A> tile, const F* hidden, int64_t step, int slot) const {
        const int64_t first = first_column(unit), count = columns(unit);
        A* to = scratch<A>(slot, tile.pixels() * count);
        weight.multiply(tile.pixels(), hidden, step, first, first + count, to, count);
        tile.values = to + unit.group * p.taps() - first;
        tile.pixel_step = count;
        tile.row_step = count * (tile.last_column - tile.column);
        return tile;
    }
};

// The span convolution's weight [G*K*K][R], packed for one call: transposed, and, for the backward, its rows filled up
// to whole registers. Each thread packs its share.
template <class A, class T, class F = Factor<T>>
struct PackedWeight {
    const T* weight;
    const A* bias;
    int64_t taps, depth, hidden;  // G*K*K, R, R rounded up to registers
    F *panels, *padded = nullptr;
    A* biases = nullptr;

    PackedWeight(const Problem& p, const T* w, const A* b, bool backward)
        : weight(w), bias(b), taps(p.groups * p.taps()), depth(p.hidden), hidden(whole_registers<A>(p.hidden)) {
        const int64_t columns = whole_panels(taps);
        panels = scratch<F>(6, columns * depth);
        if (bias) biases = scratch<A>(7, columns);
        if (bias) std::copy_n(bias, taps, biases);
        if (backward && (hidden != depth || !std::is_same_v<T, F>)) padded = scratch<F>(8, taps * hidden);
    }

    Panels<A, F> transposed() const { return {panels, biases, depth}; }
    const F* rows() const {
        if constexpr (std::is_same_v<T, F>)
            if (!padded) return weight;
        return padded;
    }

    void pack(int thread, int threads) {
        each_of(whole_panels(taps) / kPanel, thread, threads, [&](int64_t panel) {
            const int64_t have = std::min(kPanel, taps - panel * kPanel);
            const T* from = weight + panel * kPanel * depth;
            F* to = panels + panel * kPanel * depth;
            int64_t r = 0;
            for (; have == kPanel && r + kLanes<A> <= depth; r += kLanes<A>)
                for (int64_t i = 0; i < kPanel; i += kLanes<A>) {
                    Vec<A> v[kLanes<A>];
                    unroll<kLanes<A>>([&](auto n) INLINED { v[n] = load<Vec<A>>(from + (i + n) * depth + r); });
                    transpose<A, kLanes<A> / 2>(v);
                    unroll<kLanes<A>>([&](auto n) INLINED { store(to + (r + n) * kPanel + i, v[n]); });
                }
            for (; r < depth; ++r)
                for (int64_t i = 0; i < have; ++i) store(to + r * kPanel + i, load<A>(from + i * depth + r));
        });
        if (padded)
            each_of(taps, thread, threads, [&](int64_t n) {
                convert<A>(weight + n * depth, depth, padded + n * hidden);
                std::fill(padded + n * hidden + depth, padded + (n + 1) * hidden, F{});
            });
    }
};

// hidden_of(tile): the hidden tensor of the tile's pixels.
template <class A, class F, class T, class Hidden>
void span_forward(const Span<A, F>& span, const Unit& unit, const T* x, Hidden hidden_of, int64_t step,
                  Finish<A> finish, T* out) {
    const Problem& p = span.p;
    const Tiling<A> tiling(p, unit);
    InputRows<A, T> rows(p, unit, tiling.rows, x + unit.image * p.x_batch);
    tiling.each(p, unit, [&](Tile<A> tile) {
        tile = span.kernels(unit, tile, hidden_of(tile), step, 2);
        tile_forward(unit, tile, rows, out + unit.image * p.out_height * p.out_width * p.channels, finish);
    });
}

template <class A, class T, class F = Factor<T>>
void span_forward(const Problem& p, const T* x, const T* reduced, const T* weight, const A* bias, T* out) {
    const Division division(p, true);
    PackedWeight<A, T> packed(p, weight, bias, false);
    on_threads(p.threads, [&](int thread, int count) { packed.pack(thread, count); });
    const Span<A, F> span{p, packed.transposed()};
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int count) {
        each_of(division.units(p), thread, count, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const auto hidden_of = [&](const Tile<A>& tile) {
                return as<F>(reduced + first_pixel(p, unit, tile) * p.hidden, tile.pixels() * p.hidden, 0);
            };
            span_forward<A>(span, unit, x, hidden_of, p.hidden, Finish<A>{}, out);
        });
    });
}

// What one thread adds up over its tiles, and the products of one tile with it.
template <class A, class T, class F = Factor<T>>
struct SpanGradients {
    const Problem& p;
    const PackedWeight<A, T>& packed;
    A *weight, *bias;  // [G*K*K][R in whole registers], [G*K*K], of this thread alone

    // `in`, `to`: the hidden tensor of the tile's pixels and its gradient
    void add_tile(const Unit& unit, const Tile<A>& tile, const F* in, T* to) const {
        const int64_t taps = unit.groups() * p.taps(), first = unit.group * p.taps(), pixels = tile.pixels();
        const int64_t hidden = packed.hidden;
        if (hidden != p.hidden) {
            F* padded = scratch<F>(4, pixels * hidden);
            std::fill(padded, padded + pixels * hidden, F{});
            for (int64_t m = 0; m < pixels; ++m) std::copy_n(in + m * p.hidden, p.hidden, padded + m * hidden);
            in = padded;
        }
        const F* rows;  // of the gradients of the kernels
        int64_t step;
        if constexpr (std::is_same_v<F, A>) {
            rows = tile.values, step = tile.pixel_step;
        } else {
            F* narrow = scratch<F>(2, pixels * taps);
            for (int64_t m = 0; m < pixels; ++m) convert<A>(tile.values + m * tile.pixel_step, taps, narrow + m * taps);
            rows = narrow, step = taps;
        }
        add_products_of_tile(rows, step, taps, first, in, to, pixels);
        for (int64_t m = 0; m < pixels; ++m) {
            const A* __restrict row = tile.values + m * tile.pixel_step;
            A* __restrict sum = bias + first;
            for (int64_t t = 0; t < taps; ++t) sum[t] += row[t];
        }
    }

private:
    void add_products_of_tile(const F* rows, int64_t step, int64_t taps, int64_t first, const F* in, T* to,
                              int64_t pixels) const {
        const int64_t hidden = packed.hidden;
        A* product = nullptr;
        if constexpr (std::is_same_v<A, T>)
            if (hidden == p.hidden) product = to;
        if (!product) product = scratch<A>(11, pixels * hidden);
        constexpr int64_t depth = 256;  // so that a panel of the weight stays in the first-level cache
        for (int64_t k = 0; k < taps; k += depth)
            gemm<A>(pixels, hidden, std::min(depth, taps - k), rows + k, step, 1,
                    [&](int64_t j) { return packed.rows() + (first + k) * hidden + j; }, hidden, product, hidden,
                    nullptr, k > 0);
        if (static_cast<void*>(product) != to)
            for (int64_t m = 0; m < pixels; ++m) convert<A>(product + m * hidden, p.hidden, to + m * p.hidden);
        const Columns<F> columns(rows, step, pixels, taps, 3);
        gemm<A>(taps, hidden, pixels, columns.values, columns.row, columns.step, [&](int64_t j) { return in + j; },
                hidden, weight + first * hidden, hidden, nullptr, true);
    }
};

// grad_reduced has one [B*Ho*Wo][R] for every chunk of groups (Division::chunks of them); the caller adds them up.
template <class A, class T, class F = Factor<T>>
void span_backward(const Problem& p, const T* grad, const T* x, const T* reduced, const T* weight, const A* bias,
                   T* grad_x, T* grad_reduced, A* grad_weight, A* grad_bias) {
    const Division division(p, false);
    const int64_t threads = std::min(p.threads, division.units(p)), taps = p.groups * p.taps();
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    PackedWeight<A, T> packed(p, weight, bias, true);
    on_threads(p.threads, [&](int thread, int count) { packed.pack(thread, count); });
    const Span<A, F> span{p, packed.transposed()};
    A* sums = scratch<A>(9, threads * taps * (packed.hidden + 1));
    int team = 1;
    on_threads(threads, [&](int thread, int count) {
        if (thread == 0) team = count;
        A* own = sums + thread * taps * (packed.hidden + 1);
        std::fill(own, own + taps * (packed.hidden + 1), A(0));
        const SpanGradients<A, T> gradients{p, packed, own, own + taps * packed.hidden};
        each_of(division.units(p), thread, count, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const Tiling<A> tiling(p, unit);
            const T* grads = grad + unit.image * p.out_height * p.out_width * p.channels;
            Planes<A, T> planes(p, unit, tiling.rows, x + unit.image * p.x_batch);
            GradientRows<A, T> rows(p, unit, tiling.rows, grad_x + unit.image * p.height * p.width * p.channels);
            tiling.each(p, unit, [&](Tile<A> tile) {
                const int64_t at = first_pixel(p, unit, tile) * p.hidden;
                const F* hidden = as<F>(reduced + at, tile.pixels() * p.hidden, 0);
                tile = span.kernels(unit, tile, hidden, p.hidden, 2);
                tile_grad_input(unit, tile, rows, grads);
                tile_grad_kernel(p, unit, tile, planes, grads);
                gradients.add_tile(unit, tile, hidden, grad_reduced + unit.chunk * pixels * p.hidden + at);
            });
            rows.finish();
        });
    });
    on_threads(threads, [&](int thread, int count) {
        each_of(taps, thread, count, [&](int64_t t) {
            for (int64_t r = 0; r <= p.hidden; ++r) {
                const int64_t at = r < p.hidden ? t * packed.hidden + r : taps * packed.hidden + t;
                A sum = 0;
                for (int n = 0; n < team; ++n) sum += sums[n * taps * (packed.hidden + 1) + at];
                (r < p.hidden ? grad_weight[t * p.hidden + r] : grad_bias[t]) = sum;
            }
        });
    });
}
