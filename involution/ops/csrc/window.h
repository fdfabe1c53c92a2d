// The sliding window, forward and gradient of the input, for a few neighbouring output pixels of one row.
// Channels are innermost in memory; one register holds channels of one group, which share their kernel values.
//
// Neighbouring pixels share inputs, so with P pixels at once each loaded input serves up to K multiply-adds. Where a
// window leaves the image its pointer goes to a block of zeros (or, for stores, of scratch): no branch, no padded copy.
#pragma once
#include "vector.h"

struct Window {
    int64_t height, width;       // of the input
    int64_t size, stride, padding, dilation;
};

// Where the taps of P output pixels (row i, columns j...) lie, as offsets into an image.
// Dense form (X > 0): [size][X], X neighbouring input columns. General form (X == 0): [size * size][P].
struct Places {
    int64_t row_step, pixel_step, outside;   // strides of the image; the offset that stands for "outside"
};

INLINE int64_t place(const Window& w, const Places& s, int64_t y, int64_t x) {
    const bool inside = uint64_t(y) < uint64_t(w.height) && uint64_t(x) < uint64_t(w.width);
    return inside ? y * s.row_step + x * s.pixel_step : s.outside;
}

template <int X>
INLINE void find_places(const Window& w, const Places& s, int64_t i, int64_t j, int pixels, int64_t* out) {
    const int64_t top = i * w.stride - w.padding, left = j * w.stride - w.padding;
    for (int64_t u = 0; u < w.size; ++u) {
        const int64_t y = top + u * w.dilation;
        if constexpr (X > 0) {
            for (int x = 0; x < X; ++x) *out++ = place(w, s, y, left + x);
        } else {
            for (int64_t v = 0; v < w.size; ++v)
                for (int p = 0; p < pixels; ++p) *out++ = place(w, s, y, left + p * w.stride + v * w.dilation);
        }
    }
}

// The rows of a window that lie inside the image: [first, last).
INLINE void inside_rows(const Window& w, int64_t i, int64_t& first, int64_t& last) {
    const int64_t top = i * w.stride - w.padding;
    first = top < 0 ? (-top + w.dilation - 1) / w.dilation : 0;
    last = w.size;
    while (last > first && top + (last - 1) * w.dilation >= w.height) --last;
    if (first > last) first = last;
}

// One pointer a pixel, opaque to the compiler: it would keep an address for every tap instead, more than it has registers.
template <int P, class A>
INLINE void pixel_taps(const A* kernel, int64_t step, const A** out) {
    unroll<P>([&](auto p) INLINED {
        out[p] = kernel + p * step;
        asm("" : "+r"(out[p]));
    });
}

// What becomes of an output before it is stored: max(0, scale * value + shift), one of each a channel; or nothing.
template <class A>
struct Finish {
    const A *scale = nullptr, *shift = nullptr;

    template <int P, class V>
    INLINE void apply(int64_t channel, V* values) const {
        if (!scale) return;
        const V factor = load<V>(scale + channel), addend = load<V>(shift + channel);
        unroll<P>([&](auto p) INLINED {
            const V value = values[p] * factor + addend;
            values[p] = value < V{} ? V{} : value;  // in this order NaN stays NaN
        });
    }
};

// K, S: kernel size and stride as constants (K = 0: take them from the window); P: pixels; N: lanes.
template <class A, int K, int S, int P, int N>
struct Block {
    typedef Vec<A, N> V;
    static constexpr int X = K ? (P - 1) * S + K : 0;

    static INLINE void forward(int64_t size, int64_t first, int64_t last, const A* __restrict x,
                               const int64_t* __restrict places, const A* __restrict kernel, int64_t kernel_step,
                               A* __restrict out, int64_t out_step, const Finish<A>& finish, int64_t channel) {
        V sum[P] = {};
        for (int64_t u = first; u < last; ++u) {
            if constexpr (K > 0) {
                const int64_t* row = places + u * X;
                const A* taps[P];
                pixel_taps<P>(kernel + u * K, kernel_step, taps);
                unroll<X>([&](auto i) INLINED {
                    const V value = load<V>(x + row[i]);
                    unroll<P>([&](auto p) INLINED {
                        constexpr int v = i - p * S;
                        if constexpr (v >= 0 && v < K) sum[p] += taps[p][v] * value;
                    });
                });
            } else {
                for (int64_t t = u * size; t < (u + 1) * size; ++t)
                    unroll<P>([&](auto p) INLINED { sum[p] += kernel[p * kernel_step + t] * load<V>(x + places[t * P + p]); });
            }
        }
        finish.template apply<P>(channel, sum);
        unroll<P>([&](auto p) INLINED { store(out + p * out_step, sum[p]); });
    }

    // Adds to grad_input: the same loads, each input position kept in a register while its taps are added.
    static INLINE void grad_input(int64_t size, int64_t first, int64_t last, A* __restrict x,
                                  const int64_t* __restrict places, const A* __restrict kernel, int64_t kernel_step,
                                  const A* __restrict grad, int64_t grad_step) {
        V value[P];
        unroll<P>([&](auto p) INLINED { value[p] = load<V>(grad + p * grad_step); });
        for (int64_t u = first; u < last; ++u) {
            if constexpr (K > 0) {
                const int64_t* row = places + u * X;
                const A* taps[P];
                pixel_taps<P>(kernel + u * K, kernel_step, taps);
                unroll<X>([&](auto i) INLINED {
                    V sum = load<V>(x + row[i]);
                    unroll<P>([&](auto p) INLINED {
                        constexpr int v = i - p * S;
                        if constexpr (v >= 0 && v < K) sum += taps[p][v] * value[p];
                    });
                    store(x + row[i], sum);
                });
            } else {
                for (int64_t t = u * size; t < (u + 1) * size; ++t)
                    unroll<P>([&](auto p) INLINED {
                        A* at = x + places[t * P + p];
                        store(at, V(load<V>(at) + kernel[p * kernel_step + t] * value[p]));
                    });
            }
        }
    }
};
