// What all entry points share: the problem, its division among threads and tiles, and the strips of a tile.
//
// B batch, C channels, G groups, H W input size, Ho Wo output size, K kernel size, R hidden channels (fused only).
// Images are channels_last; "taps" are the G*K*K kernel values of a pixel, group-major.
#pragma once
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "half.h"
#include "window.h"

struct Problem {  // mirrored by cpu.py: same names, same order, all 64-bit
    int64_t batch, channels, groups, height, width, out_height, out_width, size, stride, padding, dilation, hidden;
    int64_t x_batch, x_row, x_pixel;                            // strides of the input, in elements
    int64_t kernel_batch, kernel_row, kernel_pixel, kernel_tap;  // strides of the kernel
    int64_t threads;
    int64_t in_channels, out_channels, projected;  // of the bottleneck around it

    Window window() const { return {height, width, size, stride, padding, dilation}; }
    int64_t taps() const { return size * size; }
    int64_t group_channels() const { return channels / groups; }
};

// Part of the output that one thread handles alone: rows of one image, for a range of groups.
struct Unit {
    int64_t image, group, last_group, row, last_row, chunk;
    int64_t groups() const { return last_group - group; }
};

// A tile of kernels (or of their gradients) of a unit: whole rows, or part of one row.
template <class A>
struct Tile {
    int64_t row, last_row, column, last_column;
    A* values;                   // of pixel (row, column), first group of the unit
    int64_t row_step, pixel_step;
    int64_t pixels() const { return (last_row - row) * (last_column - column); }
};

constexpr int64_t kPanel = 32;  // columns of a packed panel: whole registers on every machine
inline int64_t whole_panels(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }
constexpr int64_t kTileBytes = 256 << 10;  // a tile, its input rows and packed weights share the second-level cache

// Buffers that live as long as their thread: allocating them anew costs more page faults than a small call computes.
template <class A>
A* scratch(int slot, int64_t count) {
    static thread_local std::vector<A> buffers[16];
    constexpr int64_t align = kRegisterBytes / int64_t(sizeof(A));
    if (int64_t(buffers[slot].size()) < count + align) buffers[slot].resize(count + align);
    const auto address = reinterpret_cast<uintptr_t>(buffers[slot].data());
    return reinterpret_cast<A*>((address + kRegisterBytes - 1) / kRegisterBytes * kRegisterBytes);
}

// The same values as `To`: these, or a copy in a buffer.
template <class To, class S>
const To* as(const S* from, int64_t n, int slot) {
    if constexpr (std::is_same_v<To, S>) {
        return from;
    } else {
        To* copy = scratch<To>(slot, n);
        convert<Wide<S>>(from, n, copy);
        return copy;
    }
}

// For entry points, whose callers know no exceptions: 0, or 1 where there was no memory for a buffer.
template <class F>
int attempt(F f) {
    try {
        f();
    } catch (...) {
        return 1;
    }
    return 0;
}

template <class F>
void on_threads(int64_t threads, F f) {
#if defined(_OPENMP)
    if (threads > 1) {
        std::atomic<bool> failed = false;  // no exception may leave the region
#pragma omp parallel num_threads(int(threads))
        {
            try {
                f(omp_get_thread_num(), omp_get_num_threads());
            } catch (...) {
                failed = true;
            }
        }
        if (failed) throw std::bad_alloc();
        return;
    }
#endif
    f(0, 1);
}

// [0, total) in `parts` nearly equal ranges; the same part always gets the same range, so sums are reproducible.
template <class F>
void each_of(int64_t total, int part, int parts, F f) {
    for (int64_t n = total * part / parts; n < total * (part + 1) / parts; ++n) f(n);
}

// How a problem is cut: whole images if they fill the threads, else groups or (forward only) bands of rows, whichever
// gives threads the more equal shares; groups need their threads to share what the kernels are made of.
struct Division {
    int64_t chunks = 1, bands = 1;

    Division(const Problem& p, bool by_rows) {
        if (p.batch % p.threads == 0 || p.batch >= 8 * p.threads) return;
        if (by_rows && used(p.out_height, p.threads) >= used(p.groups, p.threads)) {
            bands = std::min(p.out_height, p.threads);
        } else {
            chunks = std::min(p.groups, p.threads);
            if (by_rows && chunks < p.threads) bands = std::min(p.out_height, (p.threads + chunks - 1) / chunks);
        }
    }
    // The part of the threads' time that is work where `count` things are dealt out to them.
    static double used(int64_t count, int64_t threads) {
        return double(count) / double((count + threads - 1) / threads * threads);
    }
    int64_t units(const Problem& p) const { return p.batch * chunks * bands; }
    Unit unit(const Problem& p, int64_t n) const {
        const int64_t band = n % bands, chunk = n / bands % chunks;
        return {n / bands / chunks, p.groups * chunk / chunks, p.groups * (chunk + 1) / chunks,
                p.out_height * band / bands, p.out_height * (band + 1) / bands, chunk};
    }
};

// Whole rows to a tile, or, where one row is too much, part of a row.
template <class A>
struct Tiling {
    int64_t rows, columns;

    Tiling(const Problem& p, const Unit& unit) {
        const int64_t columns_of_pixel = whole_panels(unit.groups() * p.taps());
        const int64_t budget = std::max<int64_t>(1, kTileBytes / int64_t(sizeof(A)) / columns_of_pixel);
        rows = std::max<int64_t>(1, std::min(budget / p.out_width, unit.last_row - unit.row));
        columns = std::min(budget, p.out_width);
    }

    template <class F>
    void each(const Problem& p, const Unit& unit, F f) const {
        for (int64_t i = unit.row; i < unit.last_row; i += rows)
            for (int64_t j = 0; j < p.out_width; j += columns)
                f(Tile<A>{i, std::min(i + rows, unit.last_row), j, std::min(j + columns, p.out_width), nullptr, 0, 0});
    }
};
