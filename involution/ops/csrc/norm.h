// BatchNorm in training and the ReLU behind it, max(0, scale * x + shift [+ skip]), without a pass over memory for
// anything but the sums and the result; skip may have a BatchNorm of its own. All images are dense channels_last,
// [rows][channels].
#pragma once
#include <cmath>

#include "driver.h"

constexpr int64_t kLarge = 16 << 20;  // bytes of an image that do not stay in the last cache until the next operator

struct Norm {  // mirrored by norm.py: same names, same order, all of 64 bits
    int64_t rows, channels, threads;
    int64_t training;  // 0: normalise with the running statistics and leave them alone
    double momentum, eps;
};

// What the backward needs of the forward, [4][channels]; inverse is 1 / standard deviation.
template <class A>
struct Coefficients {
    A *mean, *inverse, *scale, *shift;
    Coefficients(A* all, int64_t n) : mean(all), inverse(all + n), scale(all + 2 * n), shift(all + 3 * n) {}
};

// f(first row, last row, thread), the rows dealt out; few values are not worth a second thread. Returns the threads.
template <class F>
int deal_rows(const Norm& n, F f) {
    int team = 1;
    on_threads(n.rows * n.channels < 1 << 15 ? 1 : std::min(n.rows, n.threads), [&](int thread, int count) {
        if (thread == 0) team = count;
        f(n.rows * thread / count, n.rows * (thread + 1) / count, thread);
        finish_stores();
    });
    return team;
}

// Adds up N values of every place over the rows, [N][channels]: f(V, place, channel, V sums[N]) for registers V.
// In A over as many rows as keep the rounding small, in double beyond.
template <class A, int N, class F>
std::vector<double> sum_rows(const Norm& n, F f) {
    const int64_t channels = n.channels;
    std::vector<double> total(N * channels * n.threads, 0.0);
    const int team = deal_rows(n, [&](int64_t row, int64_t last, int thread) {
        const F add = f;  // a copy, whose captures stay in registers: stores might change those of the original
        A* sums = scratch<A>(4, N * channels);
        while (row < last) {
            std::fill(sums, sums + N * channels, A(0));
            // row by row, as memory is read fastest: several at a time, with sums in registers, took 1.2 times as long
            for (const int64_t end = std::min(row + 256, last); row < end; ++row)
                each_register<A>(0, channels, [&](auto lanes, int64_t c) INLINED {
                    typedef Vec<A, decltype(lanes)::value> V;
                    V sum[N];
                    unroll<N>([&](auto j) INLINED { sum[j] = load<V>(sums + j * channels + c); });
                    add(V{}, row * channels + c, c, sum);
                    unroll<N>([&](auto j) INLINED { store(sums + j * channels + c, sum[j]); });
                });
            for (int64_t i = 0; i < N * channels; ++i) total[thread * N * channels + i] += sums[i];
        }
    });
    for (int64_t i = N * channels; i < team * N * channels; ++i) total[i % (N * channels)] += total[i];
    return total;
}

// f(V, place, channel) for registers V of all places.
template <class A, class F>
void each_place(const Norm& n, F f) {
    const int64_t channels = n.channels;
    deal_rows(n, [&](int64_t row, int64_t last, int) {
        const F run = f;
        for (; row < last; ++row)
            each_register<A>(0, channels, [&](auto lanes, int64_t c) INLINED {
                run(Vec<A, decltype(lanes)::value>{}, row * channels + c, c);
            });
    });
}

// f(added): with a constant 1 where there is something to add, 2 where that is normalised, else 0.
template <class F>
void with_skip(const void* skip, const void* normalised, F f) {
    !skip ? f(Count<0>{}) : normalised ? f(Count<2>{}) : f(Count<1>{});
}

// f(write): write(T*, value) stores what nobody reads soon; images that fill the caches would only be fetched for that.
template <class A, class T, class F>
void with_store(const Norm& n, F f, const T* a, const T* b = nullptr) {
    const int64_t bytes = n.rows * n.channels * int64_t(sizeof(T));
    const auto aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % kRegisterBytes == 0;
    if (bytes > kLarge && aligned && n.channels % kLanes<A> == 0)
        f([](T* to, auto value) INLINED { store_past_caches(to, value); });
    else
        f(Store{});
}

// The means (channels) of a few rows that lie apart, so that none of them alone, which may be far out, decides.
template <class A, class T>
void few_means(const Norm& n, const T* x, A* means) {
    const int64_t count = std::min<int64_t>(n.rows, 16);
    for (int64_t c = 0; c < n.channels; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += double(load<A>(x + i * n.rows / count * n.channels + c));
        means[c] = sum / count;
    }
}

// The coefficients of a batch; the running statistics follow.
template <class A, class T>
void norm_statistics(const Norm& n, const T* x, const A* weight, const A* bias, A* running_mean, A* running_var,
                     A* coefficients) {
    const Coefficients<A> k(coefficients, n.channels);
    std::vector<double> sums;
    A* const near = scratch<A>(5, n.channels);  // a value near the mean
    if (n.training) {  // sums of the distance to it: a large mean takes no digits from the variance
        few_means<A>(n, x, near);
        sums = sum_rows<A, 2>(n, [=](auto v, int64_t i, int64_t c, auto* sum) INLINED {
            typedef decltype(v) V;
            const V value = load<V>(x + i) - load<V>(near + c);
            sum[0] += value, sum[1] += value * value;
        });
    }
    for (int64_t c = 0; c < n.channels; ++c) {
        double mean = running_mean[c], variance = running_var[c];
        if (n.training) {
            const double distance = sums[c] / n.rows;
            mean = near[c] + distance;
            variance = sums[n.channels + c] / n.rows - distance * distance;
            if (variance < 0) variance = 0;  // NaN stays NaN
            running_mean[c] += n.momentum * (mean - running_mean[c]);
            running_var[c] += n.momentum * (variance * n.rows / (n.rows - 1) - running_var[c]);
        }
        k.mean[c] = mean;
        k.inverse[c] = 1 / std::sqrt(variance + n.eps);
        k.scale[c] = k.inverse[c] * weight[c];
        k.shift[c] = bias[c] - k.mean[c] * k.scale[c];
    }
}

// skip may be null; skip_coefficients is where it has no BatchNorm.
template <class A, class T>
void norm_apply(const Norm& n, const T* x, const T* skip, A* coefficients, A* skip_coefficients, T* out) {
    const Coefficients<A> k(coefficients, n.channels), of_skip(skip_coefficients ?: coefficients, n.channels);
    with_skip(skip, skip_coefficients, [&](auto added) {
        const auto run = [&](auto write) {
            each_place<A>(n, [=](auto v, int64_t i, int64_t c) INLINED {
                typedef decltype(v) V;
                V value = load<V>(x + i) * load<V>(k.scale + c) + load<V>(k.shift + c);
                if constexpr (added == 1) value += load<V>(skip + i);
                if constexpr (added == 2)
                    value += load<V>(skip + i) * load<V>(of_skip.scale + c) + load<V>(of_skip.shift + c);
                write(out + i, positive(value));
            });
        };
        with_store<A, T>(n, run, out);
    });
}

// `out`, the forward's result, and grad_skip are null where nothing was added; of what has no BatchNorm, skip, its
// coefficients and the gradient of its weight. That of its bias is grad_bias.
template <class A, class T>
void norm_backward(const Norm& n, const T* grad, const T* x, const T* out, const T* skip, A* coefficients,
                   A* skip_coefficients, T* grad_x, T* grad_skip, A* grad_weight, A* grad_bias, A* grad_skip_weight) {
    const Coefficients<A> k(coefficients, n.channels), of_skip(skip_coefficients ?: coefficients, n.channels);
    const auto run = [&](auto added, auto write) {
        // the gradient where the ReLU was open; of NaN it was
        const auto through = [=](auto v, int64_t i, int64_t c) INLINED {
            typedef decltype(v) V;
            V value;
            if constexpr (added)
                value = load<V>(out + i);
            else
                value = load<V>(x + i) * load<V>(k.scale + c) + load<V>(k.shift + c);
            return value <= V{} ? V{} : load<V>(grad + i);
        };
        const auto sums = sum_rows<A, added == 2 ? 3 : 2>(n, [=](auto v, int64_t i, int64_t c, auto* sum) INLINED {
            typedef decltype(v) V;
            const V value = through(v, i, c);
            if constexpr (added) write(grad_skip + i, value);
            sum[0] += value, sum[1] += value * (load<V>(x + i) - load<V>(k.mean + c));
            if constexpr (added == 2) sum[2] += value * (load<V>(skip + i) - load<V>(of_skip.mean + c));
        });
        A *mean = scratch<A>(5, 3 * n.channels), *slope = mean + n.channels, *skip_slope = slope + n.channels;
        // the gradient of a weight, and what a distance from the mean takes from the gradient
        const auto weigh = [&](int64_t c, double product, A inverse, A* grad_weight, A* slope) {
            grad_weight[c] = product * inverse;
            slope[c] = n.training ? product / n.rows * inverse * inverse : 0;
        };
        for (int64_t c = 0; c < n.channels; ++c) {
            grad_bias[c] = sums[c];
            mean[c] = n.training ? sums[c] / n.rows : 0;
            weigh(c, sums[n.channels + c], k.inverse[c], grad_weight, slope);
            if constexpr (added == 2)
                weigh(c, sums[2 * n.channels + c], of_skip.inverse[c], grad_skip_weight, skip_slope);
        }
        each_place<A>(n, [=](auto v, int64_t i, int64_t c) INLINED {
            typedef decltype(v) V;
            V value;
            if constexpr (added)
                value = load<V>(grad_skip + i);
            else
                value = through(v, i, c);
            value = value - load<V>(mean + c);
            const V distance = load<V>(x + i) - load<V>(k.mean + c);
            write(grad_x + i, V((value - distance * load<V>(slope + c)) * load<V>(k.scale + c)));
            if constexpr (added == 2) {
                const V distance = load<V>(skip + i) - load<V>(of_skip.mean + c);
                write(grad_skip + i, V((value - distance * load<V>(skip_slope + c)) * load<V>(of_skip.scale + c)));
            }
        });
    };
    with_skip(out, skip_coefficients, [&](auto added) {
        with_store<A, T>(n, [&](auto write) { run(added, write); }, grad_x, grad_skip);
    });
}
