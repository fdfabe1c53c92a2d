// Outputs and input gradients of one tile: by the loops of ring.h, or, where their sizes do not fit, of window.h.
#pragma once
#include "ring.h"
#include "window.h"

// f(block, taps, kernel, at): the pixels of a tile, four at a time, and the registers of their channels, over an image
// in place; at: in a dense image of the output.
template <class A, class F>
INLINE void each_block(const Problem& p, const Unit& unit, const Tile<A>& tile, const Places& steps, F f) {
    const Window w = p.window();
    const int64_t width = p.group_channels();
    int64_t* places = scratch<int64_t>(0, 4 * p.taps());
    for (int64_t i = tile.row; i < tile.last_row; ++i) {
        int64_t first, last;
        inside_rows(w, i, first, last);
        const auto run = [&](auto pixels, int64_t j) INLINED {
            find_places(w, steps, i, j, pixels, places);
            const A* kernel = tile.values + (i - tile.row) * tile.row_step + (j - tile.column) * tile.pixel_step;
            for (int64_t g = unit.group; g < unit.last_group; ++g, kernel += p.taps())
                each_register<A>(g * width, (g + 1) * width, [&](auto lanes, int64_t c) INLINED {
                    f(Block<A, decltype(pixels)::value, decltype(lanes)::value>{}, first * p.size, last * p.size, places,
                      kernel, (i * p.out_width + j) * p.channels + c, c);
                });
        };
        int64_t j = tile.column;
        for (; j + 4 <= tile.last_column; j += 4) run(Count<4>{}, j);
        for (; j < tile.last_column; ++j) run(Count<1>{}, j);
    }
}

// Outputs of one tile. out: image of the output, dense channels_last.
template <class A, class T>
void tile_forward(const Unit& unit, const Tile<A>& tile, InputRows<A, T>& rows, T* out, Finish<A> finish = {}) {
    const Problem& p = rows.p;
    if (rows.ringed) {
        rows.advance(tile.last_row);
        return void(with_window<A>(p, [&](auto k, auto s) { ring_forward<k, s>(unit, tile, rows, out, finish); }));
    }
    T* zeros = scratch<T>(1, p.channels);
    std::fill_n(zeros, p.channels, T{});
    each_block(p, unit, tile, {p.x_row, p.x_pixel, zeros - rows.image},
               [&](auto block, int64_t first, int64_t last, const int64_t* places, const A* kernel, int64_t at,
                   int64_t c) INLINED {
                   block.forward(first, last, rows.image + c, places, kernel, tile.pixel_step, out + at, p.channels,
                                 finish, c);
               });
}

// Adds one tile's part of the gradient of the input. grad: image of the output gradient, dense channels_last.
template <class A, class T>
void tile_grad_input(const Unit& unit, const Tile<A>& tile, GradientRows<A, T>& rows, const T* grad) {
    const Problem& p = rows.p;
    rows.advance(tile.row, tile.last_row);
    if (rows.ringed)
        return void(with_window<A>(p, [&](auto k, auto s) { ring_grad_input<k, s>(unit, tile, rows, grad); }));
    A* outside = scratch<A>(1, p.channels);  // takes what falls outside the image
    each_block(p, unit, tile, {p.width * p.channels, p.channels, outside - rows.sums},
               [&](auto block, int64_t first, int64_t last, const int64_t* places, const A* kernel, int64_t at,
                   int64_t c) INLINED {
                   block.grad_input(first, last, rows.sums + c, places, kernel, tile.pixel_step, grad + at, p.channels);
               });
}
