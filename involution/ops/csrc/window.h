// The sliding window of any size, stride and dilation over an image in place, forward and gradient of the input, for a
// few neighbouring output pixels of one row. ring.h has the usual sizes, many times as fast.
// Channels are innermost in memory; one register holds channels of one group, which share their kernel values.
#pragma once
#include "half.h"

struct Window {
    int64_t height, width;       // of the input
    int64_t size, stride, padding, dilation;
};

// Where the taps of P output pixels (row i, columns j...) lie, as offsets into an image: [size * size][P].
struct Places {
    int64_t row_step, pixel_step, outside;   // strides of the image; the offset that stands for "outside"
};

INLINE int64_t place(const Window& w, const Places& s, int64_t y, int64_t x) {
    const bool inside = uint64_t(y) < uint64_t(w.height) && uint64_t(x) < uint64_t(w.width);
    return inside ? y * s.row_step + x * s.pixel_step : s.outside;
}

INLINE void find_places(const Window& w, const Places& s, int64_t i, int64_t j, int pixels, int64_t* out) {
    const int64_t top = i * w.stride - w.padding, left = j * w.stride - w.padding;
    for (int64_t u = 0; u < w.size; ++u)
        for (int64_t v = 0; v < w.size; ++v)
            for (int p = 0; p < pixels; ++p)
                *out++ = place(w, s, top + u * w.dilation, left + p * w.stride + v * w.dilation);
}

// The rows of a window that lie inside the image: [first, last).
INLINE void inside_rows(const Window& w, int64_t i, int64_t& first, int64_t& last) {
    const int64_t top = i * w.stride - w.padding;
    first = top < 0 ? (-top + w.dilation - 1) / w.dilation : 0;
    last = w.size;
    while (last > first && top + (last - 1) * w.dilation >= w.height) --last;
    if (first > last) first = last;
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
            values[p] = positive(V(values[p] * factor + addend));
        });
    }
};

// P: pixels; N: lanes. Taps [first, last) of the window.
template <class A, int P, int N>
struct Block {
    typedef Vec<A, N> V;

    template <class T>
    static INLINE void forward(int64_t first, int64_t last, const T* __restrict x, const int64_t* __restrict places,
                               const A* __restrict kernel, int64_t kernel_step, T* __restrict out, int64_t out_step,
                               const Finish<A>& finish, int64_t channel) {
        V sum[P] = {};
        for (int64_t t = first; t < last; ++t)
            unroll<P>([&](auto p) INLINED { sum[p] += kernel[p * kernel_step + t] * load<V>(x + places[t * P + p]); });
        finish.template apply<P>(channel, sum);
        unroll<P>([&](auto p) INLINED { store(out + p * out_step, sum[p]); });
    }

    // Adds to grad_input.
    template <class T>
    static INLINE void grad_input(int64_t first, int64_t last, A* __restrict x, const int64_t* __restrict places,
                                  const A* __restrict kernel, int64_t kernel_step, const T* __restrict grad,
                                  int64_t grad_step) {
        V value[P];
        unroll<P>([&](auto p) INLINED { value[p] = load<V>(grad + p * grad_step); });
        for (int64_t t = first; t < last; ++t)
            unroll<P>([&](auto p) INLINED {
                A* at = x + places[t * P + p];
                store(at, V(load<V>(at) + kernel[p * kernel_step + t] * value[p]));
            });
    }
};
