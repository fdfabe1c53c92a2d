// Strips of one tile, backward: the gradient of the input is added up in place, the gradient of the kernels replaces
// the tile `into`, which may be the kernels' own tile: a strip reads its kernels before it writes their gradients.
#pragma once
#include "driver.h"

// Gradient of the kernels of one pixel, for the groups of the unit. `places`: one offset a tap.
template <class A, bool WHOLE>
NOINLINE void pixel_grad_kernel(const Problem& p, const Unit& unit, const A* x, const int64_t* places, const A* grad,
                              A* into) {
    const int64_t width = p.group_channels();
    for (int64_t g = unit.group; g < unit.last_group; ++g, into += p.taps()) {
        int64_t c = g * width;
        bool add = false;
        auto part = [&](auto self, auto lanes) {
            constexpr int N = decltype(lanes)::value;
            const int64_t count = ((g + 1) * width - c) / N * N;
            if (count > 0) {
                grad_kernel<A, N>(p.taps(), count, x + c, places, grad + c, into, add);
                c += count;
                add = true;
            }
            if constexpr (!WHOLE && N > 1) self(self, Count<N / 2>{});
        };
        part(part, Count<kLanes<A>>{});
    }
}

template <class A>
struct Gradients {
    const A* x;       // image of the unit
    const A* grad;    // its output gradient, dense channels_last
    A* grad_x;        // its input gradient, dense channels_last, zeroed by the caller; or nullptr
    int64_t outside;  // offset from x to zeros
    A* trash;         // where additions outside the image go
};

template <class A, int K, int S>
NOINLINE void tile_backward(const Problem& p, const Unit& unit, const Tile<A>& tile, const Tile<A>& into, const Gradients<A>& d) {
    const Window w = p.window();
    const int64_t width = p.group_channels(), most = 4 * p.taps() + 32 * p.size;
    int64_t* places = scratch<int64_t>(0, most);
    int64_t* pixel_places = scratch<int64_t>(1, p.taps());
    const Places from{p.x_row, p.x_pixel, d.outside};
    const Places onto{p.width * p.channels, p.channels, d.grad_x ? d.trash - d.grad_x : 0};
    for (int64_t i = tile.row; i < tile.last_row; ++i)
        each_strip<K>(tile.column, tile.last_column, [&](auto pixels, int64_t j) {
            constexpr int P = decltype(pixels)::value;
            constexpr int X = Block<A, K, S, P, 1>::X;
            const A* grad = d.grad + (i * p.out_width + j) * p.channels;
            if (d.grad_x) {
                int64_t first, last;
                inside_rows(w, i, first, last);
                find_places<X>(w, onto, i, j, P, places);
                const A* kernel = tile.values + (i - tile.row) * tile.row_step + (j - tile.column) * tile.pixel_step;
                for (int64_t g = unit.group; g < unit.last_group; ++g, kernel += p.taps())
                    each_register<A, (K > 0)>(g * width, (g + 1) * width, [&](auto lanes, int64_t c) {
                        Block<A, K, S, P, decltype(lanes)::value>::grad_input(
                            p.size, first, last, d.grad_x + c, places, kernel, tile.pixel_step, grad + c, p.channels);
                    });
            }
            if (!into.values) return;
            A* to = into.values + (i - into.row) * into.row_step + (j - into.column) * into.pixel_step;
            find_places<X>(w, from, i, j, P, places);
            for (int64_t q = 0; q < P; ++q, to += into.pixel_step) {
                for (int64_t t = 0; t < p.taps(); ++t)
                    pixel_places[t] = X > 0 ? places[t / p.size * X + q * S + t % p.size] : places[t * P + q];
                pixel_grad_kernel<A, (K > 0)>(p, unit, d.x, pixel_places, grad + q * p.channels, to);
            }
        });
}
