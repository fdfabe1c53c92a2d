// Entry points. Of the plain operator the kernel tensor is read (its gradient written) in place where its taps lie
// together in the type of the sums; else tile by tile through a converted copy.
#include "bottleneck.h"
#include "norm.h"
#include "pointwise.h"

// move(stored values, tile values, their number) for the taps of every pixel of a tile, in blocks that suit both layouts.
template <class T, class A, class F>
void each_value(const Problem& p, const Unit& unit, const Tile<A>& tile, T* image, F move) {
    const int64_t taps = unit.groups() * p.taps(), columns = tile.last_column - tile.column;
    for (int64_t i = tile.row; i < tile.last_row; ++i) {
        T* row = image + i * p.kernel_row + tile.column * p.kernel_pixel + unit.group * p.taps() * p.kernel_tap;
        A* to = tile.values + (i - tile.row) * tile.row_step;
        if (p.kernel_tap == 1) {
            for (int64_t j = 0; j < columns; ++j) move(row + j * p.kernel_pixel, to + j * tile.pixel_step, taps);
            continue;
        }
        for (int64_t t0 = 0; t0 < taps; t0 += 16)
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t t = t0; t < std::min(t0 + 16, taps); ++t)
                    move(row + j * p.kernel_pixel + t * p.kernel_tap, to + j * tile.pixel_step + t, 1);
    }
}

// The tile in place, or, where that cannot be, room for a copy of it.
template <class A, class T>
Tile<A> place_tile(const Problem& p, const Unit& unit, Tile<A> tile, T* image) {
    if constexpr (sizeof(T) == sizeof(A)) {
        if (p.kernel_tap == 1) {
            tile.values = reinterpret_cast<A*>(const_cast<std::remove_const_t<T>*>(image)) + tile.row * p.kernel_row +
                          tile.column * p.kernel_pixel + unit.group * p.taps();
            tile.row_step = p.kernel_row, tile.pixel_step = p.kernel_pixel;
            return tile;
        }
    }
    tile.pixel_step = unit.groups() * p.taps();
    tile.row_step = tile.pixel_step * (tile.last_column - tile.column);
    tile.values = scratch<A>(2, tile.row_step * (tile.last_row - tile.row));
    return tile;
}

template <class A, class T>
bool in_place(const Problem& p) {
    return sizeof(T) == sizeof(A) && p.kernel_tap == 1;
}

template <class T, class A = Wide<T>>
void read_kernels(const Problem& p, const Unit& unit, const Tile<A>& tile, const T* from) {
    if (in_place<A, T>(p)) return;
    each_value(p, unit, tile, from, [](const T* v, A* w, int64_t n) { convert<A>(v, n, w); });
}

template <class T, class A = Wide<T>>
void forward(const Problem& p, const T* x, const T* kernel, T* out) {
    const Division division(p, true);
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int threads) {
        each_of(division.units(p), thread, threads, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const Tiling<A> tiling(p, unit);
            InputRows<A, T> rows(p, unit, tiling.rows, x + unit.image * p.x_batch);
            tiling.each(p, unit, [&](Tile<A> tile) {
                const T* from = kernel + unit.image * p.kernel_batch;
                tile = place_tile<A>(p, unit, tile, from);
                read_kernels(p, unit, tile, from);
                tile_forward(unit, tile, rows, out + unit.image * p.out_height * p.out_width * p.channels);
            });
        });
    });
}

template <class T, class A = Wide<T>>
void backward(const Problem& p, const T* grad, const T* x, const T* kernel, T* grad_x, T* grad_kernel) {
    const Division division(p, false);
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int threads) {
        each_of(division.units(p), thread, threads, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const Tiling<A> tiling(p, unit);
            const T* from = kernel + unit.image * p.kernel_batch;
            const T* grads = grad + unit.image * p.out_height * p.out_width * p.channels;
            if (grad_x) {
                GradientRows<A, T> rows(p, unit, tiling.rows, grad_x + unit.image * p.height * p.width * p.channels);
                tiling.each(p, unit, [&](Tile<A> tile) {
                    tile = place_tile<A>(p, unit, tile, from);
                    read_kernels(p, unit, tile, from);
                    tile_grad_input(unit, tile, rows, grads);
                });
                rows.finish();
            }
            if (grad_kernel) {
                T* to = grad_kernel + unit.image * p.kernel_batch;
                Planes<A, T> planes(p, unit, tiling.rows, x + unit.image * p.x_batch);
                tiling.each(p, unit, [&](Tile<A> tile) {
                    tile = place_tile<A>(p, unit, tile, to);
                    tile_grad_kernel(p, unit, tile, planes, grads);
                    if (!in_place<A, T>(p))
                        each_value(p, unit, tile, to, [](T* v, A* w, int64_t n) { convert<A>(w, n, v); });
                });
            }
        });
    });
}

extern "C" {
// Copies of grad_reduced that involution_span_backward_* fills.
int64_t involution_chunks(const Problem* p) { return Division(*p, false).chunks; }

// Images, kernels, weights and the gradients of images and kernels are stored as T; what is one value a channel or a
// row of a weight, and the gradients of those and of weights, as A. grad_x and grad_kernel of the plain operator may be
// null; the kernel and its gradient have the same strides.
#define OPERATORS(NAME, T, A)                                                                                         \
    int involution_forward_##NAME(const Problem* p, const T* x, const T* kernel, T* out) {                            \
        return attempt([&] { forward(*p, x, kernel, out); });                                                         \
    }                                                                                                                 \
    int involution_backward_##NAME(const Problem* p, const T* grad, const T* x, const T* kernel, T* grad_x,           \
                                   T* grad_kernel) {                                                                  \
        return attempt([&] { backward(*p, grad, x, kernel, grad_x, grad_kernel); });                                  \
    }                                                                                                                 \
    int involution_span_forward_##NAME(const Problem* p, const T* x, const T* reduced, const T* weight,               \
                                       const A* bias, T* out) {                                                       \
        return attempt([&] { span_forward(*p, x, reduced, weight, bias, out); });                                     \
    }                                                                                                                 \
    int involution_span_backward_##NAME(const Problem* p, const T* grad, const T* x, const T* reduced,                \
                                        const T* weight, const A* bias, T* grad_x, T* grad_reduced, A* grad_weight,   \
                                        A* grad_bias) {                                                               \
        return attempt([&] { span_backward(*p, grad, x, reduced, weight, bias, grad_x, grad_reduced,                  \
                                           grad_weight, grad_bias); });                                               \
    }                                                                                                                 \
    int involution_folded_forward_##NAME(const Problem* p, const T* x, const Factor<T>* packed, T* out) {             \
        return attempt([&] { folded_forward<A>(*p, x, packed, out); });                                               \
    }                                                                                                                 \
    int involution_bottleneck_forward_##NAME(const Problem* p, const T* x, const Factor<T>* packed, T* out) {         \
        return attempt([&] { bottleneck_forward<A>(*p, x, packed, out); });                                           \
    }                                                                                                                 \
    int involution_norm_statistics_##NAME(const Norm* n, const T* x, const A* weight, const A* bias,                  \
                                          A* running_mean, A* running_var, A* coefficients) {                         \
        return attempt([&] { norm_statistics(*n, x, weight, bias, running_mean, running_var, coefficients); });       \
    }                                                                                                                 \
    int involution_norm_apply_##NAME(const Norm* n, const T* x, const T* skip, A* coefficients,                       \
                                     A* skip_coefficients, T* out) {                                                  \
        return attempt([&] { norm_apply(*n, x, skip, coefficients, skip_coefficients, out); });                       \
    }                                                                                                                 \
    int involution_norm_backward_##NAME(const Norm* n, const T* grad, const T* x, const T* out, const T* skip,        \
                                        A* coefficients, A* skip_coefficients, T* grad_x, T* grad_skip,               \
                                        A* grad_weight, A* grad_bias, A* grad_skip_weight) {                          \
        return attempt([&] { norm_backward(*n, grad, x, out, skip, coefficients, skip_coefficients, grad_x,           \
                                           grad_skip, grad_weight, grad_bias, grad_skip_weight); });                  \
    }                                                                                                                 \
    int involution_pointwise_backward_##NAME(const Pointwise* p, const T* grad, const T* x, const T* weight,          \
                                             T* grad_x, A* grad_weight) {                                             \
        return attempt([&] { pointwise_backward(*p, grad, x, weight, grad_x, grad_weight); });                        \
    }
#if defined(INVOLUTION_HALF)  // a library of its own, for those who use it
OPERATORS(half, Half, float)
#else
OPERATORS(float, float, float)
OPERATORS(double, double, double)
#endif
}
