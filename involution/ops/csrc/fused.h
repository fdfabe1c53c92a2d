// The fused operator: kernels are the product weight x reduced + bias, made a tile at a time in the second-level cache,
// used at once and dropped. The backward makes them again, turns them into their gradients in place, and multiplies
// those with the weight and the reduced tensor before the next tile.
#pragma once
#include "gemm.h"
#include "planes.h"

template <class A>
int64_t whole_registers(int64_t n, int64_t registers = 1) {
    return (n + registers * kLanes<A> - 1) / (registers * kLanes<A>) * registers * kLanes<A>;
}

template <class A>
struct Span {
    const A *reduced, *weight, *bias;  // [B*Ho*Wo][R], [G*K*K][R], [G*K*K] or nullptr
    const Problem& p;
    Division division;
    int64_t taps, columns, hidden;  // of a chunk of groups, rounded up to panels; R rounded up to registers
    std::vector<A> panels, biases, rows;

    Span(const Problem& problem, const Division& cut, const A* r, const A* w, const A* b, bool backward)
        : reduced(r), weight(w), bias(b), p(problem), division(cut) {
        taps = division.chunk_groups(p) * p.taps();
        columns = whole_registers<A>(taps, 2);
        hidden = whole_registers<A>(p.hidden);
        panels.resize(division.chunks * columns * p.hidden);
        biases.resize(division.chunks * columns);
        if (backward && hidden != p.hidden) rows.resize(p.groups * p.taps() * hidden);
    }

    // A unit that alone uses its chunk packs it itself: no thread waits for another.
    bool own_chunk() const { return division.units(p) == division.chunks; }
    const A* weight_rows() const { return rows.empty() ? weight : rows.data(); }

    static constexpr int64_t kPanel = 2 * kLanes<A>;

    // weight^T of every chunk of groups in panels of two registers, [panel][R][2 registers]; the weight's rows padded to
    // whole registers. Each thread packs its share.
    void pack(int thread, int threads) {
        if (!own_chunk()) pack_panels(0, division.chunks, thread, threads);
        if (!rows.empty())
            each_of(p.groups * p.taps(), thread, threads, [&](int64_t n) {
                std::copy_n(weight + n * p.hidden, p.hidden, rows.data() + n * hidden);
            });
    }
    void pack(const Unit& unit) {
        if (own_chunk()) pack_panels(unit.chunk, unit.chunk + 1, 0, 1);
    }
    bool pack_together() const { return !own_chunk() || !rows.empty(); }

    void pack_panels(int64_t from_chunk, int64_t last_chunk, int thread, int threads) {
        const int64_t count = columns / kPanel;
        each_of((last_chunk - from_chunk) * count, thread, threads, [&](int64_t in) {
            const int64_t n = from_chunk * count + in, chunk = n / count, first = n % count * kPanel;
            const int64_t group = p.groups * chunk / division.chunks, end = p.groups * (chunk + 1) / division.chunks;
            A* to = panels.data() + n * kPanel * p.hidden;
            const int64_t have = std::min(kPanel, (end - group) * p.taps() - first);
            const A* from = weight + (group * p.taps() + first) * p.hidden;
            int64_t r = 0;
            for (; have == kPanel && r + kLanes<A> <= p.hidden; r += kLanes<A>)
                for (int64_t i = 0; i < kPanel; i += kLanes<A>) {
                    Vec<A> v[kLanes<A>];
                    unroll<kLanes<A>>([&](auto n) INLINED { v[n] = load<Vec<A>>(from + (i + n) * p.hidden + r); });
                    transpose<A, kLanes<A> / 2>(v);
                    unroll<kLanes<A>>([&](auto n) INLINED { store(to + (r + n) * kPanel + i, v[n]); });
                }
            for (; r < p.hidden; ++r)
                for (int64_t i = 0; i < have; ++i) to[r * kPanel + i] = from[i * p.hidden + r];
            if (bias) std::copy_n(bias + group * p.taps() + first, have, biases.data() + chunk * columns + first);
        });
    }

    Tile<A> kernels(const Unit& unit, Tile<A> tile, int slot) const {
        const int64_t used = whole_registers<A>(unit.groups() * p.taps(), 2);
        tile.pixel_step = columns;
        tile.row_step = columns * (tile.last_column - tile.column);
        tile.values = scratch<A>(slot, tile.pixels() * columns);
        const A* panel = panels.data() + unit.chunk * columns * p.hidden;
        gemm<A>(tile.pixels(), used, p.hidden, pixel(unit, tile), p.hidden, 1,
                [&](int64_t j) { return panel + j * p.hidden; }, kPanel, tile.values, columns,
                biases.data() + unit.chunk * columns, false);
        return tile;
    }

    int64_t pixel_index(const Unit& unit, const Tile<A>& tile) const {
        return (unit.image * p.out_height + tile.row) * p.out_width + tile.column;
    }
    const A* pixel(const Unit& unit, const Tile<A>& tile) const { return reduced + pixel_index(unit, tile) * p.hidden; }
};

template <class A>
void span_forward(const Problem& p, const A* x, const A* reduced, const A* weight, const A* bias, A* out) {
    const Division division(p, true);
    const int64_t threads = std::min(p.threads, division.units(p));
    Span<A> span(p, division, reduced, weight, bias, false);
    if (span.pack_together()) on_threads(threads, [&](int thread, int count) { span.pack(thread, count); });
    const std::vector<A> zeros(p.channels, A(0));
    on_threads(threads, [&](int thread, int count) {
        each_of(division.units(p), thread, count, [&](int64_t n) {
            const Unit unit = division.unit(p, n, thread);
            const A* image = x + unit.image * p.x_batch;
            A* to = out + unit.image * p.out_height * p.out_width * p.channels;
            span.pack(unit);
            Tiling<A>(p, unit).each(p, unit, [&](Tile<A> tile) {
                tile = span.kernels(unit, tile, 2);
                with_window<A>(p, [&](auto k, auto s) {
                    tile_forward<A, decltype(k)::value, decltype(s)::value>(p, unit, tile, image, to,
                                                                            zeros.data() - image);
                });
            });
        });
    });
}

// What one thread adds up over its tiles, and the products of one tile with it.
template <class A>
struct SpanGradients {
    const Span<A>& span;
    A *weight, *bias;  // [G*K*K][R in whole registers], [G*K*K], of this thread alone

    void add_tile(const Unit& unit, const Tile<A>& tile, A* reduced) const {
        const Problem& p = span.p;
        const int64_t taps = unit.groups() * p.taps(), first = unit.group * p.taps(), pixels = tile.pixels();
        const int64_t hidden = span.hidden, step = tile.pixel_step;
        const A* in = span.pixel(unit, tile);
        A* to = reduced + (span.pixel_index(unit, tile)) * p.hidden;
        A* product = to;
        if (hidden != p.hidden) {
            A* padded = scratch<A>(4, 2 * pixels * hidden);
            std::fill(padded, padded + pixels * hidden, A(0));
            for (int64_t m = 0; m < pixels; ++m) std::copy_n(in + m * p.hidden, p.hidden, padded + m * hidden);
            in = padded, product = padded + pixels * hidden;
        }
        constexpr int64_t depth = 256;  // so that a panel of the weight stays in the first-level cache
        for (int64_t k = 0; k < taps; k += depth)
            gemm<A>(pixels, hidden, std::min(depth, taps - k), tile.values + k, step, 1,
                    [&](int64_t j) { return span.weight_rows() + (first + k) * hidden + j; }, hidden, product, hidden,
                    nullptr, k > 0);
        if (product != to)
            for (int64_t m = 0; m < pixels; ++m) std::copy_n(product + m * hidden, p.hidden, to + m * p.hidden);
        gemm<A>(taps, hidden, pixels, tile.values, 1, step, [&](int64_t j) { return in + j; }, hidden,
                weight + first * hidden, hidden, nullptr, true);
        for (int64_t m = 0; m < pixels; ++m) {
            const A* __restrict row = tile.values + m * step;
            A* __restrict sum = bias + first;
            for (int64_t t = 0; t < taps; ++t) sum[t] += row[t];
        }
    }
};

// grad_reduced has one [B*Ho*Wo][R] for every chunk of groups (Division::chunks of them); the caller adds them up.
template <class A>
void span_backward(const Problem& p, const A* grad, const A* x, const A* reduced, const A* weight, const A* bias,
                   A* grad_x, A* grad_reduced, A* grad_weight, A* grad_bias) {
    const Division division(p, false);
    const int64_t threads = std::min(p.threads, division.units(p)), taps = p.groups * p.taps();
    Span<A> span(p, division, reduced, weight, bias, true);
    std::vector<A> sums(threads * taps * (span.hidden + 1));
    int team = 1;
    if (span.pack_together()) on_threads(threads, [&](int thread, int count) { span.pack(thread, count); });
    on_threads(threads, [&](int thread, int count) {
        if (thread == 0) team = count;
        A* own = sums.data() + thread * taps * (span.hidden + 1);
        const SpanGradients<A> gradients{span, own, own + taps * span.hidden};
        each_of(division.units(p), thread, count, [&](int64_t n) {
            const Unit unit = division.unit(p, n, thread);
            const Tiling<A> tiling(p, unit);
            span.pack(unit);
            const A* grads = grad + unit.image * p.out_height * p.out_width * p.channels;
            A* to = grad_x + unit.image * p.height * p.width * p.channels;
            const int64_t outside = scratch<A>(1, p.channels) - to;
            Planes<A> planes(p, unit, tiling.rows, x + unit.image * p.x_batch);
            tiling.each(p, unit, [&](Tile<A> tile) {
                tile = span.kernels(unit, tile, 2);
                with_window<A>(p, [&](auto k, auto s) {
                    tile_grad_input<A, decltype(k)::value, decltype(s)::value>(p, unit, tile, grads, to, outside);
                });
                tile_grad_kernel(p, unit, tile, planes, grads);
                gradients.add_tile(unit, tile, grad_reduced + unit.chunk * p.batch * p.out_height * p.out_width * p.hidden);
            });
        });
    });
    on_threads(threads, [&](int thread, int count) {
        each_of(taps, thread, count, [&](int64_t t) {
            for (int64_t r = 0; r <= p.hidden; ++r) {
                const int64_t at = r < p.hidden ? t * span.hidden + r : taps * span.hidden + t;
                A sum = 0;
                for (int n = 0; n < team; ++n) sum += sums[n * taps * (span.hidden + 1) + at];
                (r < p.hidden ? grad_weight[t * p.hidden + r] : grad_bias[t]) = sum;
            }
        });
    });
}
