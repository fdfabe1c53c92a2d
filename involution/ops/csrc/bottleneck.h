// Inference: a whole bottleneck in one call, its weights packed beforehand.
//   a = max(0, narrow x + bias)      b = the folded layer of a      out = max(0, widen b + bias + skip)
//   skip = x, or the 1x1 convolution of it that `projected` stands for
#pragma once
#include "folded.h"

// What one thread of a team makes of a matrix: some of its rows or, of few, some of its columns.
struct Share {
    int64_t row, last_row, column, last_column;

    Share(int64_t rows, int64_t columns, int64_t thread, int64_t count) : row(0), last_row(rows), column(0) {
        if (rows >= columns) {
            row = rows * thread / count, last_row = rows * (thread + 1) / count, last_column = columns;
        } else {
            column = columns / kPanel * thread / count * kPanel;
            last_column = columns / kPanel * (thread + 1) / count * kPanel;
        }
    }

    // f(first row, number): tiles of rows of which `depth` values each stay in the cache; each reads all of the weight,
    // so there is none for a few rows that remain
    template <class F, class Tile>
    void each(int64_t depth, Tile f) const {
        const int64_t fit = kTileBytes / 2 / int64_t(sizeof(F)) / depth / kBlockRows * kBlockRows;
        const int64_t usual = std::max<int64_t>(fit, 4 * kBlockRows);
        for (int64_t first = row, n; first < last_row; first += n) {
            n = last_row - first < usual + kBlockRows ? last_row - first : usual;
            f(first, n);
        }
    }
};

template <class A, class T, class F>
struct Convolutions {
    const Problem& p;
    Panels<A, F> narrow, widen, project;

    // x [pixels][in_channels] -> a [pixels][C]
    void make_narrow(const T* x, T* a) const {
        const int64_t pixels = p.batch * p.height * p.width, depth = p.in_channels;
        on_threads(p.threads, [&](int thread, int count) {
            const Share share(pixels, p.channels, thread, count);
            share.each<F>(depth, [&](int64_t first, int64_t n) {
                const Rows rows = read(n, depth, 14, [&](int64_t i) { return x + (first + i) * depth; });
                narrow.multiply(n, rows.values, rows.step, share.column, share.last_column,
                                a + first * p.channels + share.column, p.channels, StorePositive{});
            });
        });
    }

    // b [output pixels][C], x -> out [output pixels][out_channels]
    void make_wide(const T* b, const T* x, T* out) const {
        const int64_t pixels = p.batch * p.out_height * p.out_width, columns = p.out_channels;
        on_threads(p.threads, [&](int thread, int count) {
            const Share share(pixels, columns, thread, count);
            share.each<F>(p.projected ? std::max(p.channels, p.in_channels) : p.channels, [&](int64_t first, int64_t n) {
                const Rows rows = read(n, p.channels, 14, [&](int64_t i) { return b + (first + i) * p.channels; });
                const auto run = [&](const auto* skip) {
                    T* const to = out + first * columns;
                    const auto done = [=](T* at, auto sum) INLINED {
                        StorePositive{}(at, decltype(sum)(sum + load<decltype(sum)>(skip + (at - to))));
                    };
                    widen.multiply(n, rows.values, rows.step, share.column, share.last_column, to + share.column, columns,
                                   done);
                };
                if (!p.projected) return run(x + first * columns);
                A* skip = scratch<A>(12, n * columns);
                const Rows seen = read(n, p.in_channels, 13, [&](int64_t i) { return x + seen_by(first + i); });
                project.multiply(n, seen.values, seen.step, share.column, share.last_column, skip + share.column, columns);
                run(skip);
            });
        });
    }

private:
    struct Rows {
        const F* values;
        int64_t step;
    };

    // A tile's rows in steps that are no power of two: those would share a few sets of the first-level cache.
    template <class Row>
    static Rows read(int64_t n, int64_t depth, int slot, Row row) {
        const int64_t step = depth + 2 * kLanes<A>;
        F* const values = scratch<F>(slot, n * step);
        for (int64_t i = 0; i < n; ++i) convert<A>(row(i), depth, values + i * step);
        return {values, step};
    }

    // Where the input pixel is that a convolution of the layer's stride reads for an output pixel.
    int64_t seen_by(int64_t pixel) const {
        const int64_t row = pixel / p.out_width, image = row / p.out_height;
        const int64_t y = row % p.out_height * p.stride, z = pixel % p.out_width * p.stride;
        return ((image * p.height + y) * p.width + z) * p.in_channels;
    }
};

// The problem is that of the layer inside, its input dense.
// packed: narrow, its bias, what folded_forward takes, widen, its bias, project, its bias, one behind the other
template <class A, class T, class F = Factor<T>>
void bottleneck_forward(const Problem& p, const T* x, const F* packed, T* out) {
    const int64_t whole = p.batch * p.height * p.width, whole_out = p.batch * p.out_height * p.out_width;
    if (p.batch > 1 && Division(p, true).units(p) == p.batch) {  // an image stays in its thread's cache
        on_threads(std::min(p.threads, p.batch), [&](int thread, int count) {
            Problem one = p;
            one.batch = one.threads = 1;
            each_of(p.batch, thread, count, [&](int64_t i) {
                bottleneck_forward<A>(one, x + i * (whole / p.batch) * p.in_channels, packed,
                                      out + i * (whole_out / p.batch) * p.out_channels);
            });
        });
        return;
    }
    const int64_t hidden = whole_panels(p.hidden), columns = whole_panels(p.groups * p.taps());
    const auto panels = [&](const F* from, int64_t depth, int64_t n, int slot) {
        return Panels<A, F>{from, as<A>(from + depth * n, n, slot), depth};
    };
    const F* const layer = packed + (p.in_channels + 1) * p.channels;
    const F* const widen = layer + (p.channels + 1) * hidden + (p.hidden + 1) * columns + 2 * p.channels;
    const F* const project = widen + (p.channels + 1) * p.out_channels;
    const Convolutions<A, T, F> convolutions{
        p, panels(packed, p.in_channels, p.channels, 8), panels(widen, p.channels, p.out_channels, 9),
        p.projected ? panels(project, p.in_channels, p.out_channels, 10) : Panels<A, F>{}};
    T *const a = scratch<T>(15, (whole + whole_out) * p.channels), *const b = a + whole * p.channels;
    convolutions.make_narrow(x, a);
    folded_forward<A>(p, a, layer, b);
    convolutions.make_wide(b, x, out);
}
