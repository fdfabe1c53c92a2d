// Backward of a thin 1x1 convolution [rows][C] -> [rows][R], as at the start of a kernel generator, in one pass over its
// input: libraries are made for wide ones.
//   grad_x [rows][C] (+)= grad [rows][R] x weight [R][C]         grad_weight [R][C] = grad^T x
#pragma once
#include "driver.h"
#include "gemm.h"

struct Pointwise {  // mirrored by layer.py: same names, same order, all of 64 bits
    int64_t rows, channels, hidden, add, threads;  // C is a multiple of the lanes; add: to what grad_x holds
};

template <class A>
void pointwise_backward(const Pointwise& p, const A* grad, const A* x, const A* weight, A* grad_x, A* grad_weight) {
    const int64_t tile = std::max<int64_t>(24, kTileBytes / int64_t(sizeof(A)) / (2 * p.channels + p.hidden));
    const int64_t size = p.hidden * p.channels, threads = std::min(p.threads, (p.rows + tile - 1) / tile);
    A* sums = scratch<A>(9, threads * size);
    int team = 1;
    on_threads(threads, [&](int thread, int count) {
        if (thread == 0) team = count;
        A* own = sums + thread * size;
        std::fill_n(own, size, A(0));
        const int64_t last = p.rows * (thread + 1) / count;
        for (int64_t row = p.rows * thread / count, n; row < last; row += n) {
            n = std::min(tile, last - row);
            const A *from = x + row * p.channels, *grads = grad + row * p.hidden;
            gemm<A>(n, p.channels, p.hidden, grads, p.hidden, 1, [&](int64_t j) { return weight + j; }, p.channels,
                    grad_x + row * p.channels, p.channels, nullptr, p.add);
            gemm<A>(p.hidden, p.channels, n, grads, 1, p.hidden, [&](int64_t j) { return from + j; }, p.channels, own,
                    p.channels, nullptr, true);
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
