// Backward of a thin 1x1 convolution [rows][C] -> [rows][R], as at the start of a kernel generator, in one pass over its
// input: libraries are made for wide ones.
//   grad_x [rows][C] (+)= grad [rows][R] x weight [R][C]         grad_weight [R][C] = grad^T x
#pragma once
#include "driver.h"
#include "gemm.h"

struct Pointwise {  // mirrored by layer.py: same names, same order, all of 64 bits
    int64_t rows, channels, hidden, add, threads;  // C is a multiple of the lanes; add: to what grad_x holds
};

// Of n rows, added to grad_x in A where it is stored as something else.
template <class F, class T, class A = Wide<T>>
void add_gradient(const Pointwise& p, int64_t n, const F* grads, const F* weight, T* grad_x) {
    const auto panel = [&](int64_t j) { return weight + j; };
    if constexpr (std::is_same_v<A, T>) {
        gemm<A>(n, p.channels, p.hidden, grads, p.hidden, 1, panel, p.channels, grad_x, p.channels, nullptr, p.add);
    } else {
        A* sums = scratch<A>(1, n * p.channels);
        if (p.add) convert<A>(grad_x, n * p.channels, sums);
        gemm<A>(n, p.channels, p.hidden, grads, p.hidden, 1, panel, p.channels, sums, p.channels, nullptr, p.add);
        convert<A>(sums, n * p.channels, grad_x);
    }
}

template <class A, class T, class F = Factor<T>>
void pointwise_backward(const Pointwise& p, const T* grad, const T* x, const T* weight, T* grad_x, A* grad_weight) {
    const int64_t tile = std::max<int64_t>(24, kTileBytes / int64_t(sizeof(A)) / (2 * p.channels + p.hidden));
    const int64_t size = p.hidden * p.channels, threads = std::min(p.threads, (p.rows + tile - 1) / tile);
    const F* const factor = as<F>(weight, size, 6);
    A* sums = scratch<A>(9, threads * size);
    int team = 1;
    on_threads(threads, [&](int thread, int count) {
        if (thread == 0) team = count;
        A* own = sums + thread * size;
        std::fill_n(own, size, A(0));
        const int64_t last = p.rows * (thread + 1) / count;
        for (int64_t row = p.rows * thread / count, n; row < last; row += n) {
            n = std::min(tile, last - row);
            const F* from = as<F>(x + row * p.channels, n * p.channels, 3);
            const F* grads = as<F>(grad + row * p.hidden, n * p.hidden, 4);
            add_gradient(p, n, grads, factor, grad_x + row * p.channels);
            const Columns<F> columns(grads, p.hidden, n, p.hidden, 2);
            gemm<A>(p.hidden, p.channels, n, columns.values, columns.row, columns.step,
                    [&](int64_t j) { return from + j; }, p.channels, own, p.channels, nullptr, true);
        }
    });
    on_threads(threads, [&](int thread, int count) {
        each_of(size, thread, count, [&](int64_t i) {
            A sum = 0;
            for (int n = 0; n < team; ++n) sum += sums[n * size + i];
            grad_weight[i] = sum;
        });
    });
}
